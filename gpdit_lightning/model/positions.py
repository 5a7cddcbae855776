"""RoPE-ND over (frame, row, column) (ACDiT, section 4.2)."""

import math
from functools import lru_cache

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


def shifted(config: GPDiTConfig, keys: Tensor, frames: int) -> Tensor:
    """Keys (..., head width) that have their positions, as they were if they stood `frames` frames later."""
    precise = torch.promote_types(keys.dtype, torch.float32)
    angles = torch.zeros(config.head_width // 2, dtype=torch.float64)
    angles[: config.rope_widths[0] // 2] = axis_angles(config.rope_lengths[0], config.rope_widths[0], frames, 1)[0]
    return rotate_pairs(keys, angles.cos().to(keys.device, precise), angles.sin().to(keys.device, precise))


class Rope:
    """Cosines and sines for the tokens of consecutive frames, each `rows` x `columns` tokens.

    Shared by all blocks of a pass. Angles are computed in float64 and rounded once to `dtype`.

    Attributes:
        first_frame: where the table begins.
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
        self.tokens = rows * columns
        self.cos = angles.cos().to(device, dtype)[:, None]  # (frames * rows * columns, 1, head width / 2)
        self.sin = angles.sin().to(device, dtype)[:, None]

    def __call__(self, x: Tensor, dtype: torch.dtype, start: int = 0) -> Tensor:
        """Rotate queries or keys (B, tokens, heads, head width), then round them to `dtype`.

        Args:
            x: of consecutive frames.
            dtype: of the result.
            start: the table's frame at which they begin.
        """
        tokens = slice(start * self.tokens, start * self.tokens + x.shape[1])
        return rotate_pairs(x, self.cos[tokens], self.sin[tokens]).to(dtype)

    def at_corners(self, x: Tensor, dtype: torch.dtype, start: int, frames: int) -> Tensor:
        """Copies of keys for each of some frames, all of them at the place of that frame's first token.

        Args:
            x: (B, tokens, heads, head width).
            dtype: of the result.
            start: the table's frame for the first copy.
            frames: how many.

        Returns:
            (B, frames, tokens, heads, head width).
        """
        corners = slice(start * self.tokens, (start + frames) * self.tokens, self.tokens)
        return rotate_pairs(x[:, None], self.cos[corners, None], self.sin[corners, None]).to(dtype)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # a table made in a preview serves training too
def rope_table(
    config: GPDiTConfig,
    first_frame: int,
    frames: int,
    rows: int,
    columns: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Rope:
    """The table of a pass, made once for all passes alike, such as the steps that denoise one frame."""
    return Rope(config, first_frame, frames, rows, columns, device, dtype)
