"""The loss (GPDiT, equation 3 with the target of section 4.2; ACDiT, equation 3), in total and by noise level."""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor

from gpdit_lightning.devices import check_device
from gpdit_lightning.errors import InputError


class QuartileLoss(NamedTuple):
    """Squared errors by quarter of the range of noise levels, as sums and counts to be added over batches and ranks.

    Attributes:
        sums: (4,) mean squared errors, summed over blocks; entry k has t in [k/4, (k+1)/4), the last one t = 1 too.
        counts: (4,) number of blocks.
    """

    sums: Tensor
    counts: Tensor


class DenoisingLoss(NamedTuple):
    """The objective, and its detached parts by noise level and by clip.

    Attributes:
        mean: the scalar to minimize.
        quartiles: the loss by noise level.
        per_clip: (B,) mean over each row of the batch; each noisy copy of a clip is a row.
    """

    mean: Tensor
    quartiles: QuartileLoss
    per_clip: Tensor

    @classmethod
    def from_blocks(cls, per_block: Tensor, t: Tensor) -> Self:
        """Return the mean over all blocks, and its parts.

        Args:
            per_block: (B, S) loss of each block.
            t: (B, S) noise levels in [0, 1].

        Raises:
            InputError: the shapes or the devices differ.
        """
        check_device(per_block.device, "the loss per block", t=t)
        if per_block.shape != t.shape:
            raise InputError(
                f"the loss per block has shape {tuple(per_block.shape)}; it must have that of the noise levels, "
                f"{tuple(t.shape)} (noisy rows, blocks)."
            )
        quartile = (t * 4).long().clamp(0, 3).flatten()
        values = per_block.detach().flatten()
        sums = values.new_zeros(4).index_add_(0, quartile, values)
        counts = values.new_zeros(4).index_add_(0, quartile, torch.ones_like(values))
        return cls(per_block.mean(), QuartileLoss(sums, counts), per_block.detach().mean(dim=1))


def frame_mean(latents: Tensor) -> Tensor:
    """Average latents over each frame: (B, F, C, H, W) -> (B, F)."""
    return latents.mean(dim=(2, 3, 4))


def denoising_loss(
    prediction: Tensor, target: Tensor, t: Tensor, block_mean: Callable[[Tensor], Tensor] = frame_mean
) -> DenoisingLoss:
    """Compute the mean squared error of a prediction, in float32 or better.

    Args:
        prediction, target: (B, F, C, H, W), velocity or epsilon.
        t: (B, S) noise levels in [0, 1] of the blocks.
        block_mean: averages latents over each block: (B, F, C, H, W) -> (B, S). By default blocks are frames.

    Raises:
        InputError: the tensors are on several devices.
    """
    check_device(prediction.device, "the prediction", target=target)
    precise = torch.promote_types(prediction.dtype, torch.float32)
    return DenoisingLoss.from_blocks(block_mean((prediction.to(precise) - target.to(precise)).square()), t)
