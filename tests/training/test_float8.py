"""Products in float8 by torchao: what is refused, and which layers are replaced."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gpdit_lightning import GPDiT, GPDiTConfig, InputError
from gpdit_lightning.training import float8
from gpdit_lightning.training.float8 import check_float8, convert_to_float8

CONFIG = GPDiTConfig(size="tiny", layers=1, float8=True, time_conditioning="adaln")
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "capability", "installed", "with_deepspeed", "message"),
    [
        (torch.device("cpu"), (9, 0), True, False, "cpu has no products in float8: set it to false"),
        (CUDA, (8, 0), True, False, r"A GPU has compute capability 8\.0 and float8 needs 8\.9: set it to false"),
        (CUDA, (9, 0), False, False, "torchao is not installed: pip install torchao, or set it to false"),
        (CUDA, (9, 0), True, True, "ZeRO does not support: use ddp or fsdp2, or set it to false"),
    ],
)
def test_what_cannot_be_used_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    capability: tuple[int, int],
    installed: bool,
    with_deepspeed: bool,
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A GPU")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if installed else None)
    with pytest.raises(InputError, match=rf"^backbone\.float8 is true, (but|which) {message}\.$"):
        check_float8(CONFIG, device, with_deepspeed)
    check_float8(CONFIG.replaced(float8=False), device, with_deepspeed)
    if not installed or with_deepspeed:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        check_float8(CONFIG, device, False)


class Float8Linear(nn.Linear):
    """Stands for torchao's layer."""


def swap(module: nn.Module, *, module_filter_fn: Callable[[nn.Module, str], bool], config: Any) -> None:
    """Replace linear layers as torchao does."""
    assert config == "any number of tokens"
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.Linear) and module_filter_fn(child, name):
            child.__class__ = Float8Linear


@pytest.mark.parametrize("is_real", [False, True])
def test_the_products_of_the_blocks_are_replaced(monkeypatch: pytest.MonkeyPatch, is_real: bool) -> None:
    """All but the modulations; names and weights remain."""
    if not is_real:
        monkeypatch.setattr(float8, "load_torchao", lambda: (swap, "any number of tokens"))
    elif importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    torch.manual_seed(0)
    plain = GPDiT(CONFIG.replaced(float8=False))
    model = GPDiT(CONFIG)
    model.load_state_dict(plain.state_dict())
    convert_to_float8(plain)
    convert_to_float8(model)
    assert not [name for name, module in plain.named_modules() if type(module).__name__ == "Float8Linear"]
    replaced = [name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"]
    layers = ("query", "key_value", "attention_output", "mlp.up", "mlp.down")
    assert replaced == [f"blocks.0.{layer}" for layer in layers]
    assert all(torch.equal(weight, plain.state_dict()[name]) for name, weight in model.state_dict().items())
