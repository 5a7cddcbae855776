"""Reading of whole videos."""

from pathlib import Path

import torch
from torch import Tensor

from gpdit_lightning.media.video import iterate_frames


def read_video(path: Path, start: int = 0, stride: int = 1, max_frames: int | None = None) -> Tensor:
    """Return frames as uint8 (T, 3, H, W); the arguments are those of `iterate_frames`."""
    return torch.stack([frame.pixels for frame in iterate_frames(path, start, stride, max_frames)])


def gray_steps(frames: int, height: int = 48, width: int = 64) -> torch.Tensor:
    """Frame i has the gray level 10 i, from which `numbers` computes i."""
    return (torch.arange(frames, dtype=torch.uint8) * 10).view(-1, 1, 1, 1).expand(-1, 3, height, width).contiguous()


def numbers(frames: torch.Tensor) -> list[int]:
    return [round(value / 10) for value in frames.float().mean(dim=(1, 2, 3)).tolist()]
