"""Clips of frames in memory, in the forms in which Python code passes them: images of Pillow, arrays and tensors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import image_pixels

OutputType = Literal["pil", "np", "pt", "latent"]

FORMS = (
    "a path, a Pillow image or a list of them, a numpy array (T, H, W, 3), or a torch tensor (T, 3, H, W), with values "
    "uint8 or floats in [0, 1]"
)


def sources_of(context: Any) -> list[str | Tensor]:
    """Return the contexts of a call as a list of paths, and clips uint8 (T, 3, H, W).

    Raises:
        InputError: a context is of another type or shape than a call accepts.
    """
    if context is None:
        return []
    if isinstance(context, np.ndarray | Tensor) and context.ndim == 5:
        context = list(context)
    if not isinstance(context, Sequence) or isinstance(context, str) or _is_frame_list(context):
        context = [context]
    if not context:
        raise InputError("the list of contexts is empty: give at least one, or None to generate from noise alone.")
    return [str(item) if isinstance(item, str | Path) else clip_pixels(item) for item in context]


def clip_pixels(value: Any) -> Tensor:
    """Convert the frames of one clip to uint8 (T, 3, H, W).

    Args:
        value: an image of Pillow or a list of them, converted to sRGB by their colour profiles; a numpy array
            (T, H, W, 3) or (H, W, 3); or a torch tensor (T, 3, H, W) or (3, H, W) on any device. Arrays and tensors
            are uint8, or floating-point in [0, 1].

    Raises:
        InputError: another type, shape or range of values, no frames, or images of different sizes or that cannot be
            read.
    """
    if isinstance(value, Image.Image):
        value = [value]
    if _is_frame_list(value):
        sizes = {image.size for image in value}
        if len(sizes) > 1:
            (width, height), (other_width, other_height) = sorted(sizes)[:2]
            raise InputError(
                f"the images of a clip are of {height}x{width} and {other_height}x{other_width} pixels: give all of "
                "them one size."
            )
        frames = np.stack([_image_pixels(image, f"image {number} of a clip") for number, image in enumerate(value)])
        return torch.from_numpy(frames).permute(0, 3, 1, 2)
    if isinstance(value, np.ndarray):
        if value.ndim not in (3, 4) or value.shape[-1] != 3:
            raise InputError(f"an array of frames has shape {value.shape}: give (T, H, W, 3), or (H, W, 3) for one.")
        if value.dtype != np.uint8 and value.dtype.kind != "f":
            raise InputError(f"the frames of a clip are {value.dtype}: give uint8, or floats in [0, 1].")
        # torch accepts neither negative strides, as those of reversed channels, nor another order of bytes.
        native = value.astype(value.dtype.newbyteorder("="), order="C")
        pixels = torch.from_numpy(native).movedim(-1, -3)
    elif isinstance(value, Tensor):
        if value.ndim not in (3, 4) or value.shape[-3] != 3:
            raise InputError(
                f"a tensor of frames has shape {tuple(value.shape)}: give (T, 3, H, W), or (3, H, W) for one."
            )
        pixels = value.detach().cpu()
    else:
        raise InputError(f"a clip is an object of type {type(value).__name__}: give {FORMS}.")
    return _as_uint8(pixels if pixels.ndim == 4 else pixels[None])


def _image_pixels(image: Image.Image, name: str) -> np.ndarray:
    """Return an image of Pillow as uint8 (H, W, 3) in sRGB; its content may be read only now."""
    try:
        return image_pixels(image.copy(), name)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # truncated, closed, or of a mode that has no colours
        raise InputError(f"{name} cannot be read ({error}): give another one.") from None


def _is_frame_list(value: Any) -> bool:
    """Return whether a value is a non-empty list of images of Pillow: the frames of one clip."""
    return isinstance(value, Sequence) and bool(value) and all(isinstance(item, Image.Image) for item in value)


def _as_uint8(pixels: Tensor) -> Tensor:
    """Return frames (T, 3, H, W) of uint8 or of floats in [0, 1] as uint8."""
    if 0 in pixels.shape:
        raise InputError(f"a clip has shape {tuple(pixels.shape)}, without frames or pixels: give at least one frame.")
    if pixels.dtype == torch.uint8:
        return pixels
    if not pixels.is_floating_point():
        raise InputError(f"the frames of a clip are {pixels.dtype}: give uint8, or floats in [0, 1].")
    if not bool((pixels.min() >= 0) & (pixels.max() <= 1)):  # also false if a value is not a number
        raise InputError(
            f"the frames of a clip have values from {pixels.min():g} to {pixels.max():g}: give uint8, or floats in "
            "[0, 1]."
        )
    return (pixels * 255).round().to(torch.uint8)


def converted(pixels: Tensor, latents: Tensor, output_type: OutputType) -> Any:
    """Return generated frames in the form of an output type.

    Args:
        pixels: uint8 (T, 3, H, W).
        latents: the raw latents of `pixels`, (k, C, h, w).
        output_type: `pil` for a list of T images of Pillow, `np` for a uint8 array (T, H, W, 3), `pt` for a float32
            tensor (T, 3, H, W) in [0, 1], `latent` for `latents`.
    """
    if output_type == "latent":
        return latents
    if output_type == "pt":
        return pixels.float() / 255
    array = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    return array if output_type == "np" else [Image.fromarray(frame) for frame in array]


def check_output_type(output_type: str) -> None:
    """Raise `InputError` if there is no such output type."""
    if output_type not in ("pil", "np", "pt", "latent"):
        raise InputError(f"output_type is {output_type!r}: give 'pil', 'np', 'pt' or 'latent'.")
