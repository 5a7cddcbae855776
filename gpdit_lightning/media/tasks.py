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
# Ours, since the paper gives none: a step between two even areas is an edge from 51 grey levels on, and from 26 on
# where it continues such an edge (OpenCV's gradient is four times the step).
CANNY_THRESHOLDS = (100, 200)


@dataclass(frozen=True)
class Task:
    """What is given, and what it shall become: two functions of one picture, uint8 (T, 3, H, W) to the same shape.

    They see pictures at the size at which these are encoded, and each frame by itself.
    """

    name: str
    source: Callable[[Tensor], Tensor]
    target: Callable[[Tensor], Tensor]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """The constants behind the functions, for the record."""


def as_it_is(pixels: Tensor) -> Tensor:
    """The picture itself."""
    return pixels


def grey(pixels: Tensor) -> Tensor:
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
    try:
        import cv2
    except ImportError as error:
        raise InputError(
            f"OpenCV, which finds edges, cannot be imported ({error}): pip install -e '.[edges]'."
        ) from None
    found = [cv2.Canny(luma, *CANNY_THRESHOLDS) for luma in grey(pixels)[:, 0].cpu().numpy()]
    return torch.from_numpy(np.stack(found))[:, None].expand_as(pixels).contiguous().to(pixels.device)


_LUMA, _CANNY = {"luma": "ITU-R BT.601"}, {"luma": "ITU-R BT.601", "canny_thresholds": list(CANNY_THRESHOLDS)}
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("grayscale", as_it_is, grey, _LUMA),
        Task("colourisation", grey, as_it_is, _LUMA),
        Task("edges", as_it_is, edges, _CANNY),
        Task("edges_to_image", edges, as_it_is, _CANNY),
        Task("copy", as_it_is, as_it_is),  # no task, but what teaches a model to look back before it learns one
    )
}


def pair_of(task: Task, picture: Tensor) -> tuple[Tensor, Tensor]:
    """The source and the target that a task makes of a picture, uint8 (T, 3, H, W) each; raises as its functions do."""
    return task.source(picture), task.target(picture)
