"""Image tasks of few-shot learning whose two pictures are both made from one (GPDiT, sections 5.1 and 5.4)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpdit_lightning.errors import InputError

# ITU-R BT.601 luma in 16-bit fixed point, as Pillow has it.
LUMA_WEIGHTS = (19595, 38470, 7471)
# Ours, since the paper gives none: a step between two even areas is an edge from 51 grayscale levels on, and from 26 on
# where it continues such an edge (OpenCV's gradient is four times the step).
CANNY_THRESHOLDS = (100, 200)
# Ours: the standard deviation of the blur that a sketch divides by, as a fraction of the picture's shorter side.
SKETCH_BLUR = 1 / 20


@dataclass(frozen=True)
class ImageTask:
    """What is given, and what it shall become: two functions of one picture, uint8 (T, 3, H, W) to the same shape.

    They see pictures at the size at which these are encoded, and each frame by itself.
    """

    name: str
    source: Callable[[Tensor], Tensor]
    target: Callable[[Tensor], Tensor]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """The constants behind the functions, for the record."""


def identity(pixels: Tensor) -> Tensor:
    """The picture itself."""
    return pixels


def grayscale(pixels: Tensor) -> Tensor:
    """The luma (ITU-R BT.601) in all three channels: bit for bit the mode "L" of Pillow.

    Args:
        pixels: uint8 (T, 3, H, W), red first.
    """
    weights = torch.tensor(LUMA_WEIGHTS, device=pixels.device)[:, None, None]
    luma = ((pixels * weights).sum(dim=1, keepdim=True) + 2**15) >> 16
    return luma.to(torch.uint8).expand_as(pixels).contiguous()


def edges(pixels: Tensor) -> Tensor:
    """Canny edges of the luma, by OpenCV (the optional extra `edges`): white on black, one pixel wide.

    Args:
        pixels: uint8 (T, 3, H, W), red first.

    Raises:
        InputError: OpenCV is missing.
    """
    return _of_luma(pixels, lambda luma: _opencv().Canny(luma, *CANNY_THRESHOLDS))


def sketch(pixels: Tensor) -> Tensor:
    """A pencil drawing, by OpenCV (the extra `edges`): the luma divided by its Gaussian blur, white where both agree,
    and black where all is black.

    Stands for the style transfers of the paper (section 5.1), which it does not define.

    Args:
        pixels: uint8 (T, 3, H, W), red first.

    Raises:
        InputError: OpenCV is missing.
    """
    deviation = SKETCH_BLUR * min(pixels.shape[-2:])

    def drawn(luma: np.ndarray) -> np.ndarray:
        cv2 = _opencv()
        return cv2.divide(luma, cv2.GaussianBlur(luma, (0, 0), deviation), scale=255)

    return _of_luma(pixels, drawn)


def _of_luma(pixels: Tensor, function: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """What a function of the luma, uint8 (H, W) to the same, makes of each frame, in all three channels."""
    made = [function(luma) for luma in grayscale(pixels)[:, 0].cpu().numpy()]
    return torch.from_numpy(np.stack(made))[:, None].expand_as(pixels).contiguous().to(pixels.device)


def _opencv() -> Any:
    """The module `cv2`, which is imported where it is needed only: an optional extra."""
    try:
        import cv2
    except ImportError as error:
        raise InputError(
            f"OpenCV, which finds edges and draws sketches, cannot be imported ({error}): pip install -e '.[edges]'."
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
        ImageTask("copy", identity, identity),  # no task, but what teaches a model to look back before it learns one
    )
}

# The task of pairs that are there already: depth, skeletons, styles, whatever has a picture for both sides.
EXISTING_PAIRS = ImageTask("pairs", identity, identity)


def make_pair(task: ImageTask, picture: Tensor) -> tuple[Tensor, Tensor]:
    """The source and the target that a task makes of a picture, uint8 (T, 3, H, W) each; raises as its functions do."""
    return task.source(picture), task.target(picture)
