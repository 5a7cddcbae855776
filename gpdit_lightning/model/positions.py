"""RoPE-ND over (frame, row, column) (ACDiT, section 4.2)."""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.model.layout import BlockLayout
from gpdit_lightning.model.time_conditioning import rotate_pairs


def rope_base(length: int) -> float:
    """Return the base of an axis with a maximum extent of L tokens: 100 ceil(8 L / (100 pi)) (ACDiT, section 4.2)."""
    return 100.0 * math.ceil(8 * length / (100 * math.pi))


def axis_angles(length: int, width: int, positions: Sequence[int] | Tensor) -> Tensor:
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
        return torch.as_tensor(positions, dtype=torch.float64)[:, None] * frequencies


def shift_frames(config: GPDiTConfig, keys: Tensor, frames: int) -> Tensor:
    """Move keys (..., head width), to which RoPE is already applied, by `frames` frames."""
    precise = torch.promote_types(keys.dtype, torch.float32)
    angles = torch.zeros(config.head_width // 2, dtype=torch.float64, device="cpu")
    angles[: config.rope_widths[0] // 2] = axis_angles(config.rope_lengths[0], config.rope_widths[0], [frames])[0]
    cos, sin = (table.to(precise).to(keys.device) for table in (angles.cos(), angles.sin()))
    return rotate_pairs(keys, cos, sin)


class Rope:
    """Cosines and sines of RoPE for the tokens of some blocks, shared by all blocks of the transformer in a pass.

    Angles are computed in float64 on the CPU and rounded once to `dtype`.

    Args:
        config: the architecture.
        layout: the blocks of a clip.
        blocks: the numbers of the blocks in the clip.
        frames: latent frames of the clip.
        device, dtype: device and precision of the table.
    """

    def __init__(
        self,
        config: GPDiTConfig,
        layout: BlockLayout,
        blocks: Sequence[int],
        frames: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        places = layout.places(blocks, frames).unbind(1)
        angles = torch.cat(list(map(axis_angles, config.rope_lengths, config.rope_widths, places)), dim=-1)
        starts = [0, *accumulate(layout.sizes(blocks, frames))][:-1]
        first_tokens = angles[torch.tensor(starts, dtype=torch.long, device="cpu")]
        # (tokens, 1, head width / 2) and (blocks, 1, 1, head width / 2)
        self.cos, self.sin = (table.to(dtype).to(device)[:, None] for table in (angles.cos(), angles.sin()))
        self.first_cos, self.first_sin = (
            table.to(dtype).to(device)[:, None, None] for table in (first_tokens.cos(), first_tokens.sin())
        )

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Rotate queries or keys (B, tokens, heads, head width) of the first tokens, and round them to `dtype`."""
        tokens = x.shape[1]
        return rotate_pairs(x, self.cos[:tokens], self.sin[:tokens]).to(dtype)

    def at_first_tokens(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Rotate a copy of keys for each block, all of them to the position of the block's first token.

        Args:
            x: (B, tokens, heads, head width).
            dtype: precision of the result.

        Returns:
            (B, blocks, tokens, heads, head width).
        """
        return rotate_pairs(x[:, None], self.first_cos, self.first_sin).to(dtype)


# Enough for both streams of every clip length and frame size: the copy of a table to a GPU makes the host wait.
@lru_cache(maxsize=64)
@torch.inference_mode(False)  # training also uses tables that a preview has created
def rope_table(
    config: GPDiTConfig,
    layout: BlockLayout,
    blocks: Sequence[int],
    frames: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Rope:
    """Return a cached :class:`Rope`: all sampler steps of a block have the same positions."""
    return Rope(config, layout, blocks, frames, device, dtype)
