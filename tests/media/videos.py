"""Reading of whole videos."""

from pathlib import Path

import torch
from torch import Tensor

from gpdit_lightning.media.video import iterate_frames


def read_video(path: Path, start: int = 0, stride: int = 1, max_frames: int | None = None) -> Tensor:
    """Return frames as uint8 (T, 3, H, W); the arguments are those of `iterate_frames`."""
    return torch.stack(list(iterate_frames(path, start, stride, max_frames)))
