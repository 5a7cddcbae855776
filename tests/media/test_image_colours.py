"""Colours are compared with equations written here, from published matrices."""

import io
import struct
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from gpdit_lightning.media.image_colours import SRGB_CHROMATICITIES, profile_of
from gpdit_lightning.media.images import read_image

# White, red, green and blue; the exponent (None: sRGB's curve); linear values to linear values of sRGB.
DISPLAY_P3 = (
    (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
    None,
    ((1.2249, -0.2249, 0.0), (-0.0421, 1.0421, 0.0), (-0.0196, -0.0786, 1.0983)),
)
ADOBE_RGB = (
    (0.3127, 0.329, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06),
    2.19921875,
    ((1.3984, -0.3984, 0.0), (0.0, 1.0, 0.0), (0.0, -0.0429, 1.0429)),
)
PROPHOTO = (
    (0.3457, 0.3585, 0.7347, 0.2653, 0.1596, 0.8404, 0.0366, 0.0001),
    1.8,
    ((2.0343, -0.7275, -0.3068), (-0.2288, 1.2317, -0.0029), (-0.0086, -0.1533, 1.1618)),
)
XYZ_TO_SRGB = ((3.1339, -1.6169, -0.4906), (-0.9788, 1.9161, 0.0335), (0.0719, -0.2290, 1.4052))  # from D50


def encoded(light: Any) -> np.ndarray:
    """Return sRGB values, 0 to 255, of linear light."""
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def linear(values: Any, gamma: float | None) -> np.ndarray:
    values = np.asarray(values) / 255
    return (
        np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        if gamma is None
        else values**gamma
    )


def srgb_of_lab(lab: Any) -> np.ndarray:
    """Return sRGB values of CIE L*a*b* relative to D50."""
    y = (lab[0] + 16) / 116
    roots = np.array((y + lab[1] / 500, y, y - lab[2] / 200))
    xyz = np.where(roots > 6 / 29, roots**3, (roots - 4 / 29) * 3 * (6 / 29) ** 2) * (0.9642, 1.0, 0.8249)
    return encoded(np.array(XYZ_TO_SRGB) @ xyz)


def icc_profile(device_class: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """Return an ICC profile, version 2."""
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    table, data, start = b"", b"", 132 + 12 * (len(tags) + 1)
    for name, content in {b"wtpt": white, **tags}.items():
        table += struct.pack(">4sII", name, start + len(data), len(content))
        data += content + b"\0" * (-len(content) % 4)
    header = struct.pack(">I4xI4s4s4s12x4s28x", start + len(data), 0x02400000, device_class, space, connection, b"acsp")
    return (header + white[8:]).ljust(128, b"\0") + struct.pack(">I", len(tags) + 1) + table + data


def gray_profile(gamma: float) -> bytes:
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * gamma))
    return icc_profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": curve})


def lab_of_inks(inks: tuple[int, ...]) -> tuple[float, float, float]:
    """Return the L*a*b* of full cyan, magenta, yellow and black inks, 0 or 1 each, in the profile of the test."""
    cyan, magenta, yellow, black = inks
    if black:
        return (0.0, 0.0, 0.0)
    return (100 - 20.0 * (cyan + magenta) - 5 * yellow, -20.0 * cyan + 24 * magenta, 28.0 * yellow - 16 * cyan)


def cmyk_profile() -> bytes:
    ramp = bytes(range(256))
    grid = b"".join(
        bytes((round(lightness * 2.55), round(a) + 128, round(b) + 128))
        for lightness, a, b in map(lab_of_inks, product((0, 1), repeat=4))
    )
    identity = struct.pack(">9i", *(65536 if index % 4 == 0 else 0 for index in range(9)))
    table = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + identity + 4 * ramp + grid + 3 * ramp
    return icc_profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table, b"A2B1": table})


def colour_of(image: Image.Image, path: Path, **options: Any) -> list[float]:
    """Save an image of one colour and read its mean colour."""
    image.save(path, **options)
    return read_image(path).float().mean(dim=(0, 2, 3)).tolist()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.jpg", {"quality": 100, "subsampling": 0}),
        ("a.tif", {}),
        ("a.webp", {"lossless": True}),
        ("a.avif", {"quality": 100, "subsampling": "4:4:4"}),
    ],
)
def test_rgb_profiles_are_applied_in_every_format(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    for primaries, gamma, matrix in (DISPLAY_P3, ADOBE_RGB, PROPHOTO):
        profile = profile_of(gamma, primaries)
        for stored in ((120, 100, 90), (100, 115, 110), (235, 235, 235)):
            expected = encoded(np.array(matrix) @ linear(stored, gamma))
            colour = colour_of(Image.new("RGB", (16, 16), stored), tmp_path / name, icc_profile=profile, **options)
            assert colour == pytest.approx(expected, abs=2 if name.endswith(("png", "tif", "webp")) else 4)


def test_display_p3_of_phones(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 16), (200, 60, 60))
    profile = profile_of(DISPLAY_P3[1], DISPLAY_P3[0])
    assert colour_of(image, tmp_path / "a.png", icc_profile=profile) == pytest.approx((217, 42, 52), abs=1)


def test_profiles_of_palettes_and_transparent_images_are_applied(tmp_path: Path) -> None:
    profile = profile_of(DISPLAY_P3[1], DISPLAY_P3[0])
    opaque = Image.new("RGB", (16, 16), (200, 60, 60))
    assert colour_of(opaque.quantize(4), tmp_path / "p.png", icc_profile=profile) == pytest.approx((217, 42, 52), abs=1)
    half = opaque.convert("RGBA")
    half.putalpha(128)
    on_white = [255 - (255 - value) * 128 / 255 for value in (217, 42, 52)]
    assert colour_of(half, tmp_path / "half.png", icc_profile=profile) == pytest.approx(on_white, abs=2)
    gray = Image.new("LA", (16, 16), (64, 128))
    on_white = [255 - (255 - encoded(64 / 255)) * 128 / 255] * 3
    assert colour_of(gray, tmp_path / "g.png", icc_profile=gray_profile(1)) == pytest.approx(on_white, abs=2)


def test_gray_profiles_are_applied_to_8_and_16_bits(tmp_path: Path) -> None:
    expected = [float(encoded(10 / 255))] * 3
    image = Image.new("L", (16, 16), 10)
    assert colour_of(image, tmp_path / "a.png", icc_profile=gray_profile(1)) == pytest.approx(expected, abs=1)
    for level in (300, 20000):  # 300 of 65535 is between two levels of 8 bits
        deep = Image.fromarray(np.full((16, 16), level, np.uint16))
        expected = [float(encoded(level / 65535))] * 3
        for name in ("deep.png", "deep.tif"):
            assert colour_of(deep, tmp_path / name, icc_profile=gray_profile(1)) == pytest.approx(expected, abs=1)
    p3_gray = [float(encoded(linear(77, None)))] * 3  # an RGB profile of a gray image
    profile = profile_of(None, DISPLAY_P3[0])
    assert colour_of(Image.new("L", (16, 16), 77), tmp_path / "b.png", icc_profile=profile) == pytest.approx(
        p3_gray, abs=1
    )


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk_is_converted_by_its_profile(tmp_path: Path, name: str) -> None:
    options = {"quality": 100, "subsampling": 0} if name == "a.jpg" else {}
    for inks in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (1, 1, 0, 0), (0, 0, 0, 1)):
        image = Image.new("CMYK", (16, 16), tuple(255 * ink for ink in inks))
        colour = colour_of(image, tmp_path / name, icc_profile=cmyk_profile(), **options)
        assert colour == pytest.approx(srgb_of_lab(lab_of_inks(inks)), abs=3)
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 51))
    assert colour_of(image, tmp_path / name, **options) == pytest.approx((204, 0, 0), abs=2)  # without a profile


def test_lab_is_converted(tmp_path: Path) -> None:
    image = Image.frombytes("LAB", (16, 16), bytes((153, 20, 256 - 30)) * 256)  # a* and b* are signed
    assert colour_of(image, tmp_path / "a.tif") == pytest.approx(srgb_of_lab((60, 20, -30)), abs=2)


@pytest.mark.parametrize(
    ("chunks", "primaries", "gamma", "matrix"),
    [
        ({"gAMA": 100000}, SRGB_CHROMATICITIES, 1.0, np.eye(3)),
        ({"gAMA": 45455, "cHRM": DISPLAY_P3[0]}, DISPLAY_P3[0], None, DISPLAY_P3[2]),
        ({"gAMA": 45470, "cHRM": ADOBE_RGB[0]}, ADOBE_RGB[0], None, ADOBE_RGB[2]),
        ({"gAMA": 55556}, SRGB_CHROMATICITIES, 1.8, np.eye(3)),
        ({"gAMA": 45455}, SRGB_CHROMATICITIES, None, np.eye(3)),
        ({"gAMA": 100000, "sRGB": 0}, SRGB_CHROMATICITIES, None, np.eye(3)),
        ({"gAMA": 100000, "cHRM": (0,) * 8}, SRGB_CHROMATICITIES, None, np.eye(3)),
    ],
)
def test_colour_chunks_of_png(
    tmp_path: Path, chunks: dict[str, Any], primaries: Any, gamma: float, matrix: Any
) -> None:
    content = PngImagePlugin.PngInfo()
    for name, value in chunks.items():
        numbers = [round(100000 * number) for number in value] if name == "cHRM" else [value]
        content.add(name.encode(), struct.pack(">B" if name == "sRGB" else f">{len(numbers)}I", *numbers))
    stored = (120, 100, 90)
    colour = colour_of(Image.new("RGB", (16, 16), stored), tmp_path / "a.png", pnginfo=content)
    assert colour == pytest.approx(encoded(np.array(matrix) @ linear(stored, gamma)), abs=1)


def test_srgb_damaged_and_unsuitable_profiles_change_nothing(tmp_path: Path) -> None:
    image = Image.effect_noise((32, 32), 80).convert("RGB")
    p3 = profile_of(None, DISPLAY_P3[0])
    assert p3
    pillows = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (
        pillows,
        profile_of(None, SRGB_CHROMATICITIES),
        b"junk",
        p3[:200],
        p3[:128] + b"\xff" * 300,
        cmyk_profile(),
    ):
        image.save(tmp_path / "a.png", icc_profile=profile)
        assert np.array_equal(read_image(tmp_path / "a.png")[0].permute(1, 2, 0), np.array(image))


def test_profile_of_an_image_in_memory() -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 60, 60)).save(file, "PNG", icc_profile=profile_of(None, DISPLAY_P3[0]))
    assert read_image(file, "a.png of b.tar")[0, :, 0, 0].tolist() == pytest.approx((217, 42, 52), abs=1)
