"""Matrix products of the blocks in float8, by torchao, with scales that are computed for each tensor in each pass."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gpdit_lightning.errors import InputError
from gpdit_lightning.model import GPDiT, GPDiTConfig

LEAST_CAPABILITY = (8, 9)  # of GPUs with float8 products: Ada, Hopper and later
MULTIPLE = 16  # of the widths of a product in float8


def load_torchao() -> tuple[Callable[..., Any], Any]:
    """Return torchao's function that replaces linear layers, and its configuration for any number of tokens."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    return convert_to_float8_training, Float8LinearConfig(pad_inner_dim=True)


def check_float8(config: GPDiTConfig, device: torch.device, with_deepspeed: bool) -> None:
    """Check that float8 can be used, if the configuration asks for it.

    Args:
        config: the architecture.
        device: the device.
        with_deepspeed: whether the strategy is DeepSpeed's.

    Raises:
        InputError: the device, a package or the strategy does not fit.
    """
    if not config.float8:
        return
    cure = "set it to false"
    if device.type != "cuda":
        raise InputError(f"backbone.float8 is true, but {device.type} has no products in float8: {cure}.")
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        raise InputError(
            f"backbone.float8 is true, but {torch.cuda.get_device_name(device)} has compute capability "
            f"{'.'.join(map(str, capability))} and float8 needs {'.'.join(map(str, LEAST_CAPABILITY))}: {cure}."
        )
    if importlib.util.find_spec("torchao") is None:
        raise InputError(f"backbone.float8 is true, but torchao is not installed: pip install torchao, or {cure}.")
    if with_deepspeed:
        raise InputError(f"backbone.float8 is true, which ZeRO does not support: use ddp or fsdp2, or {cure}.")


def convert_to_float8(backbone: GPDiT) -> None:
    """Replace the linear layers of the blocks by those of torchao; names and weights remain."""
    if not backbone.config.float8:
        return
    convert, config = load_torchao()
    convert(backbone.blocks, module_filter_fn=_is_converted, config=config)


def _is_converted(module: nn.Module, name: str) -> bool:
    """Return whether a layer computes in float8: modulations have few rows, and remain as they are."""
    fits = isinstance(module, nn.Linear) and not (module.in_features % MULTIPLE or module.out_features % MULTIPLE)
    return fits and not name.endswith("modulation")
