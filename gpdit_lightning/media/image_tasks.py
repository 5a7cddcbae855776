"""Image tasks for few-shot learning that make source and target from one image (GPDiT, sections 5.1 and 5.4)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpdit_lightning.errors import InputError

# ITU-R BT.601 luma in 16-bit fixed point, as in Pillow.
LUMA_WEIGHTS = (19595, 38470, 7471)
# The paper gives none. OpenCV's gradient is four times the step between two uniform areas, so a step of at least 51
# gray levels is an edge, and one of at least 26 levels is an edge where it continues a stronger one.
CANNY_THRESHOLDS = (100, 200)
# Standard deviation of the blur that a sketch divides by, as a fraction of the image's shorter side.
SKETCH_BLUR = 1 / 20


@dataclass(frozen=True)
class ImageTask:
    """The two functions that make source and target from one image.

    Both map uint8 (T, 3, H, W) to the same shape, each frame independently, after the image was scaled to the size at
    which it is encoded.

    Attributes:
        name: the task's name in options.
        source, target: the functions.
        parameters: the constants that the functions use, to be recorded with the data.
    """

    name: str
    source: Callable[[Tensor], Tensor]
    target: Callable[[Tensor], Tensor]
    parameters: Mapping[str, Any] = field(default_factory=dict)


def identity(pixels: Tensor) -> Tensor:
    """Return the image unchanged."""
    return pixels


def grayscale(pixels: Tensor) -> Tensor:
    """Return the luma (ITU-R BT.601) in all three channels, bit-equal to Pillow's mode "L".

    Args:
        pixels: uint8 (T, 3, H, W), red first.
    """
    weights = torch.tensor(LUMA_WEIGHTS, device=pixels.device)[:, None, None]
    luma = ((pixels * weights).sum(dim=1, keepdim=True) + 2**15) >> 16
    return luma.to(torch.uint8).expand_as(pixels).contiguous()


def edges(pixels: Tensor) -> Tensor:
    """Return the Canny edges of the luma, white on black and one pixel wide.

    Args:
        pixels: uint8 (T, 3, H, W), red first.

    Raises:
        InputError: OpenCV (the optional extra `edges`) is not installed.
    """
    return _apply_to_luma(pixels, lambda luma: _opencv().Canny(luma, *CANNY_THRESHOLDS))


def sketch(pixels: Tensor) -> Tensor:
    """Return a pencil sketch: the luma divided by its Gaussian blur.

    The result is white where both are equal, and black where both are 0. It replaces the style transfers of the paper
    (sections 5.1 and 5.4), whose image pairs are not published.

    Args:
        pixels: uint8 (T, 3, H, W), red first.

    Raises:
        InputError: OpenCV (the optional extra `edges`) is not installed.
    """
    deviation = SKETCH_BLUR * min(pixels.shape[-2:])

    def divide_by_blur(luma: np.ndarray) -> np.ndarray:
        cv2 = _opencv()
        return cv2.divide(luma, cv2.GaussianBlur(luma, (0, 0), deviation), scale=255)

    return _apply_to_luma(pixels, divide_by_blur)


def _apply_to_luma(pixels: Tensor, function: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """Apply a function of uint8 (H, W) to the luma of each frame, and return the result in all three channels."""
    results = [function(luma) for luma in grayscale(pixels)[:, 0].cpu().numpy()]
    return torch.from_numpy(np.stack(results))[:, None].expand_as(pixels).contiguous().to(pixels.device)


def _opencv() -> Any:
    """Import `cv2` on first use, since it is an optional dependency."""
    try:
        import cv2
    except ImportError as error:
        raise InputError(
            f"OpenCV, which the tasks edges, edges_to_image and sketch need, cannot be imported ({error}): "
            "pip install 'gpdit_lightning[edges]'."
        ) from None
    return cv2


_LUMA = {"luma": "ITU-R BT.601"}
_CANNY = {**_LUMA, "canny_thresholds": list(CANNY_THRESHOLDS)}
TASKS: dict[str, ImageTask] = {
    task.name: task
    for task in (
        ImageTask("grayscale", identity, grayscale, _LUMA),
        ImageTask("colourisation", grayscale, identity, _LUMA),
        ImageTask("edges", identity, edges, _CANNY),
        ImageTask("edges_to_image", edges, identity, _CANNY),
        ImageTask("sketch", identity, sketch, {**_LUMA, "blur": SKETCH_BLUR}),
        ImageTask("copy", identity, identity),  # trained before a task, it teaches a model to attend to earlier images
    )
}

# For image pairs that already exist, such as images and their depth maps.
EXISTING_PAIRS = ImageTask("pairs", identity, identity)


def make_pair(task: ImageTask, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the source and the target that a task makes from an image, uint8 (T, 3, H, W) each."""
    return task.source(image), task.target(image)
