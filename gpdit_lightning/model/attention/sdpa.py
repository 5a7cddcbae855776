"""Attention by PyTorch's `scaled_dot_product_attention`, with PyTorch's FlashAttention or a later one."""

import importlib.util
from typing import Any

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor

from gpdit_lightning.model.attention.base import Sliced
from gpdit_lightning.model.attention.plan import AttentionPlan


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention by `torch.nn.functional.scaled_dot_product_attention`."""
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2)


PACKAGES = {"FA3": "flash_attn_interface", "FA4": "flash_attn"}
"""The package that PyTorch imports for an implementation of FlashAttention."""

_activated: set[str] = set()  # by this module, and not by the user


class Sdpa(Sliced):
    """SDPA on slices of the keys.

    Args:
        flash: the FlashAttention that SDPA uses, by PyTorch's name for it: `FA3` or `FA4`, which are installed beside
            PyTorch and activated for the whole process; None: PyTorch's.
    """

    def __init__(self, flash: str | None = None) -> None:
        super().__init__(sdpa)
        self.flash = flash

    def obstacle(self, device_type: str, dtype: torch.dtype, gradient: bool) -> str | None:
        """Return the reason why SDPA cannot be used, or None."""
        if self.flash is None:
            return None
        if device_type != "cuda":
            return f"{self.flash} has no kernels for {device_type}"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"{self.flash} has no kernels for {str(dtype).removeprefix('torch.')}"
        package = PACKAGES[self.flash]
        if importlib.util.find_spec(package) is None:
            return f"the package {package} of {self.flash} is not installed"
        return None

    def prepare(self, plan: AttentionPlan, device: torch.device) -> Any:
        """Activate the FlashAttention, if another one is active."""
        if self.flash is None:
            restore_flash()
        elif torch.nn.attention.current_flash_attention_impl() != self.flash:
            torch.nn.attention.activate_flash_attention_impl(self.flash)
            _activated.add(self.flash)


def restore_flash() -> None:
    """Restore PyTorch's FlashAttention, if this module has activated another one."""
    if _activated and torch.nn.attention.current_flash_attention_impl() in _activated:
        torch.nn.attention.restore_flash_attention_impl()
        _activated.clear()
