"""RoPE-ND over (frame, row, column) (ACDiT, section 4.2)."""

import math

import torch
from torch import Tensor

from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.model.time_conditioning import rotate_pairs


def rope_base(length: int) -> float:
    """Base b_j of the axis whose longest extent is `length` tokens: 100 ceil(8 L_j / (100 pi)) (ACDiT, section 4.2)."""
    return 100.0 * math.ceil(8 * length / (100 * math.pi))


def axis_angles(length: int, width: int, start: int, count: int) -> Tensor:
    """Rotation angles m * b^(-2(i-1)/d) of `count` positions from `start` (ACDiT, equation 4): (count, width / 2)."""
    frequencies = rope_base(length) ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.arange(start, start + count, dtype=torch.float64)[:, None] * frequencies


class Rope:
    """Cosines and sines for the tokens of consecutive frames, each `rows` x `columns` tokens.

    Made once per forward pass and shared by all blocks. Angles are computed in float64 and rounded once to `dtype`.
    """

    def __init__(
        self,
        config: GPDiTConfig,
        first_frame: int,
        frames: int,
        rows: int,
        columns: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        extents = (frames, rows, columns)
        starts = (first_frame, 0, 0)
        frame, row, column = map(axis_angles, config.rope_lengths, config.rope_widths, starts, extents)
        angles = torch.cat(
            [
                frame[:, None, None].expand(frames, rows, columns, -1),
                row[None, :, None].expand(frames, rows, columns, -1),
                column[None, None, :].expand(frames, rows, columns, -1),
            ],
            dim=-1,
        ).flatten(0, 2)
        self.cos = angles.cos().to(device, dtype)[:, None]  # (frames * rows * columns, 1, head width / 2)
        self.sin = angles.sin().to(device, dtype)[:, None]

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Rotate queries or keys (B, tokens, heads, head width) from the first frame on, then round them to `dtype`."""
        tokens = x.shape[1]
        return rotate_pairs(x, self.cos[:tokens], self.sin[:tokens]).to(dtype)
