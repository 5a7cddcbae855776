"""Colours of image files: conversion to sRGB by an ICC profile or by PNG's colour chunks (Pillow with LittleCMS)."""

import io
import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
from PIL import Image, ImageCms

# ICC's names of the colour spaces of Pillow's modes.
COLOUR_SPACES = {"RGB": "RGB ", "L": "GRAY", "I;16": "GRAY", "CMYK": "CMYK", "LAB": "Lab "}
# PNG's gAMA of sRGB images. sRGB's curve is not a power, but most files state this one, so it is taken for that curve.
SRGB_GAMMA, GAMMA_TOLERANCE = 0.45455, 0.005
# x and y of white (D65), red, green and blue of sRGB, in the order of PNG's cHRM.
SRGB_CHROMATICITIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)  # g, a, b, c, d of ICC's parametric curve 3
# Whites are adapted to D50, the white of ICC profiles, by Bradford's matrix (ICC.1:2022, annex E).
D50 = np.array((0.9642, 1.0, 0.8249))
BRADFORD = np.array(((0.8951, 0.2664, -0.1614), (-0.7502, 1.7135, 0.0367), (0.0389, -0.0685, 1.0296)))


def to_srgb(image: Image.Image) -> Image.Image:
    """Return an image in sRGB with 8 bits per channel: "RGBA" if it has transparency, else "RGB".

    Colours are converted by the ICC profile, or else by PNG's chunks sRGB, gAMA and cHRM, with relative colorimetric
    intent and black point compensation. As in browsers, a profile is ignored if it is damaged or made for another kind
    of image. CMYK without a profile is converted by Pillow's formula.

    Args:
        image: of any mode of Pillow but "I" and "F".
    """
    colours = _opaque_srgb(image)
    if not image.has_transparency_data:
        return colours
    if image.mode.startswith("I;16"):  # a PNG may declare one gray level transparent
        alpha = Image.fromarray(np.array(image) != image.info["transparency"]).convert("L")
    else:
        alpha = image.convert("RGBA").getchannel("A")
    return Image.merge("RGBA", (*colours.split(), alpha))


def _opaque_srgb(image: Image.Image) -> Image.Image:
    """Return the colours of an image in sRGB, without its transparency."""
    if image.mode.startswith("I;16"):
        deep = Image.fromarray(np.array(image).astype(np.uint16))  # in the byte order of the machine
        forms = [deep, _to_8_bits(deep)]
    elif image.mode in ("1", "L", "LA"):
        forms = [image.convert("L")]
    else:
        forms = [image if image.mode in COLOUR_SPACES else image.convert("RGBA").convert("RGB")]
    if forms[-1].mode == "L":
        forms.append(forms[-1].convert("RGB"))  # for a gray image with an RGB profile
    if profile := _profile(image.info):
        for form in forms:
            if transform := _transform(profile, form.mode):
                return transform.apply(form)
    return forms[-1] if forms[-1].mode == "RGB" else forms[-1].convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grayscale to 8 bits, the exact inverse of multiplying by 257. Pillow would clip values at 255."""
    return Image.fromarray(((np.array(image).astype(np.int32) + 128) // 257).astype(np.uint8))


def _profile(info: Mapping[Any, Any]) -> bytes | None:
    """Return the ICC profile of an image, or one that is equivalent to its PNG chunks; None for sRGB."""
    if profile := info.get("icc_profile"):
        return bytes(profile)
    if "srgb" in info or not {"gamma", "chromaticity"} & info.keys():
        return None
    gamma = info.get("gamma", SRGB_GAMMA)
    return profile_of(
        None if abs(gamma - SRGB_GAMMA) < GAMMA_TOLERANCE or gamma <= 0 else 1 / gamma,
        info.get("chromaticity", SRGB_CHROMATICITIES),
    )


@lru_cache(maxsize=8)  # the images of a data set share few profiles
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform of a mode of Pillow to sRGB.

    None if the profile is damaged or of another colour space, or if it is sRGB's: then it would change colours by a
    level, due to rounding.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space != COLOUR_SPACES[mode]:
            return None
        flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
        if mode == "I;16":  # the optimized curves are too coarse: level 300 of a linear image became 7 instead of 14
            flags |= ImageCms.Flags.NOOPTIMIZE
        intent, srgb = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, srgb, mode, "RGB", intent, flags)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if mode not in ("RGB", "L"):
        return transform
    grid = np.array(list(product(range(0, 256, 15), repeat=3)) if mode == "RGB" else range(256), np.uint8)
    before = Image.fromarray(grid[None])
    change = np.array(transform.apply(before)).astype(int) - np.array(before.convert("RGB"))
    return transform if np.abs(change).max() > 1 else None


def profile_of(gamma: float | None, chromaticities: Sequence[float]) -> bytes | None:
    """Return an ICC profile (version 4) of RGB with these primaries.

    Args:
        gamma: exponent of the curve from values to light; None for sRGB's curve.
        chromaticities: x and y of white, red, green and blue.

    Returns:
        The bytes of the profile; None if the chromaticities are not those of colours.
    """
    x, y = np.array(chromaticities).reshape(4, 2).T
    if (y <= 0).any():
        return None
    white, *primaries = np.stack((x / y, np.ones(4), (1 - x - y) / y), axis=1)  # XYZ with Y = 1
    try:
        to_xyz = np.stack(primaries, axis=1)
        to_xyz = to_xyz * np.linalg.solve(to_xyz, white)  # red + green + blue = white
        to_xyz = np.linalg.solve(BRADFORD, np.diag(BRADFORD @ D50 / (BRADFORD @ white)) @ BRADFORD) @ to_xyz
    except np.linalg.LinAlgError:
        return None
    if not np.isfinite(to_xyz).all() or np.abs(to_xyz).max() > 100:
        return None
    exponents = SRGB_CURVE if gamma is None else (gamma,)
    curve = struct.pack(">4sIHH", b"para", 0, 3 if gamma is None else 0, 0) + _fixed(exponents)
    tags = {b"wtpt": b"XYZ \0\0\0\0" + _fixed(D50)}
    for letter, column in zip("rgb", to_xyz.T, strict=True):
        tags |= {f"{letter}XYZ".encode(): b"XYZ \0\0\0\0" + _fixed(column), f"{letter}TRC".encode(): curve}
    start, table, data = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(data), len(content))
        data += content
    header = struct.pack(">I4xI4s4s4s12x4s28x", start + len(data), 0x04200000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    return (header + _fixed(D50)).ljust(128, b"\0") + table + data


def _fixed(values: Sequence[float] | np.ndarray) -> bytes:
    """Return numbers in ICC's s15Fixed16 format."""
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)
