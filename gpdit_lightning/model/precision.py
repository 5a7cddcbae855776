"""The precision of every tensor of a pass, the same under each strategy, in training and in inference.

Matrix products and attention have the precision of autocast or, without it, of the weights (`product_dtype`): their
inputs and results are in bf16 with `bf16-mixed`. Everything else is in float32, or in float64 for float64 weights
(`stream_dtype`): the residual stream, the norms with input and output, queries and keys through QK-norm and RoPE, both
kinds of rotation and their tables, theta and the loss. DeepSpeed and FSDP2 compute with weights that are already in
bf16, and without autocast; therefore the model converts explicitly.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def product_dtype(weight: Tensor) -> torch.dtype:
    """Return the precision of matrix products with a weight and of attention: that of autocast if it is enabled."""
    kind = weight.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # meta tensors have no autocast
    return torch.get_autocast_dtype(kind) if casts else weight.dtype


def stream_dtype(weight: Tensor) -> torch.dtype:
    """Return the precision of the residual stream, norms and rotations: float32, or float64 for float64 weights."""
    return torch.promote_types(weight.dtype, torch.float32)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` with input, computation and output in `stream_dtype`, whatever the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        dtype = stream_dtype(self.weight)
        return F.rms_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps)
