"""Precision of the matrix products of generation."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from gpdit_lightning.model import GPDiT


def cast_linear_weights(model: GPDiT, dtype: torch.dtype) -> None:
    """Round the weights of the blocks' linear layers to `dtype`, which autocast would otherwise do at every call.

    This halves the memory traffic. Layers that autocast keeps in float32 are unchanged.
    """
    for block in model.blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)


def autocast(like: Tensor, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Return a context that computes matrix products in `dtype` on the device of a tensor; None changes nothing."""
    if dtype is None or like.device.type == "meta":  # where nothing is computed, and autocast does not exist
        return nullcontext()
    return torch.autocast(like.device.type, dtype=dtype)
