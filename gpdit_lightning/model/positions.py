"""RoPE-ND over (frame, row, column) (ACDiT, section 4.2)."""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.model.time_conditioning import rotate_pairs


def rope_base(length: int) -> float:
    """Return the base of an axis with a maximum extent of L tokens: 100 ceil(8 L / (100 pi)) (ACDiT, section 4.2)."""
    return 100.0 * math.ceil(8 * length / (100 * math.pi))


def axis_angles(length: int, width: int, positions: Sequence[int]) -> Tensor:
    """Return the rotation angles m * b^(-2(i-1)/d) of positions m (ACDiT, equation 4).

    Args:
        length: the maximum extent of the axis, in tokens.
        width: d, the number of head channels of this axis.
        positions: m, in tokens.

    Returns:
        (positions, width / 2) in float64 on the CPU.
    """
    with torch.device("cpu"):  # not the default device: MPS has no float64
        frequencies = rope_base(length) ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        return torch.tensor(positions, dtype=torch.float64)[:, None] * frequencies


def shift_frames(config: GPDiTConfig, keys: Tensor, frames: int) -> Tensor:
    """Move keys (..., head width), to which RoPE is already applied, by `frames` frames."""
    precise = torch.promote_types(keys.dtype, torch.float32)
    angles = torch.zeros(config.head_width // 2, dtype=torch.float64, device="cpu")
    angles[: config.rope_widths[0] // 2] = axis_angles(config.rope_lengths[0], config.rope_widths[0], [frames])[0]
    cos, sin = (table.to(precise).to(keys.device) for table in (angles.cos(), angles.sin()))
    return rotate_pairs(keys, cos, sin)


class Rope:
    """Cosines and sines of RoPE for the tokens of some frames, shared by all blocks of a pass.

    Angles are computed in float64 on the CPU and rounded once to `dtype`.

    Args:
        config: the architecture.
        frames: the positions of the frames.
        rows, columns: tokens of a frame.
        device, dtype: device and precision of the table.
    """

    def __init__(
        self,
        config: GPDiTConfig,
        frames: Sequence[int],
        rows: int,
        columns: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        positions = (frames, range(rows), range(columns))
        frame, row, column = map(axis_angles, config.rope_lengths, config.rope_widths, positions)
        angles = torch.cat(
            [
                frame[:, None, None].expand(-1, rows, columns, -1),
                row[None, :, None].expand(len(frames), -1, columns, -1),
                column[None, None, :].expand(len(frames), rows, -1, -1),
            ],
            dim=-1,
        ).flatten(0, 2)
        self.tokens = rows * columns
        # (frames * rows * columns, 1, head width / 2)
        self.cos, self.sin = (table.to(dtype).to(device)[:, None] for table in (angles.cos(), angles.sin()))

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Rotate queries or keys (B, tokens, heads, head width) of the first frames, and round them to `dtype`."""
        tokens = x.shape[1]
        return rotate_pairs(x, self.cos[:tokens], self.sin[:tokens]).to(dtype)

    def at_first_tokens(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Rotate a copy of keys for each frame, all of them to the position of the frame's first token.

        Args:
            x: (B, tokens, heads, head width).
            dtype: precision of the result.

        Returns:
            (B, frames, tokens, heads, head width).
        """
        return rotate_pairs(x[:, None], self.cos[:: self.tokens, None], self.sin[:: self.tokens, None]).to(dtype)


# Enough for both streams of every clip length and frame size: the copy of a table to a GPU makes the host wait.
@lru_cache(maxsize=64)
@torch.inference_mode(False)  # training also uses tables that a preview has created
def rope_table(
    config: GPDiTConfig,
    frames: Sequence[int],
    rows: int,
    columns: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Rope:
    """Return a cached :class:`Rope`: all sampler steps of a frame have the same positions."""
    return Rope(config, frames, rows, columns, device, dtype)
