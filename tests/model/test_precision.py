"""Under bf16 autocast only products round: norms, rotations and the residual stream stay in float32."""

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gpdit_lightning import GPDiT
from tests.model.toys import toy_batch, toy_model

PRODUCTS = {"mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu"}
POINTWISE = {"gelu"}  # between two products; computed in float32 inside, rounded as the second one's input
CASTS_AND_MOVES = {
    *("_to_copy", "alias", "detach", "clone", "cat", "empty", "copy_", "index_copy_"),
    *("t", "transpose", "permute", "view", "_unsafe_view", "slice", "select", "expand", "unbind"),
}


class OperatorsInBfloat16(TorchDispatchMode):
    """Collects the names of the operators whose results are in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else [result]
        if any(isinstance(x, Tensor) and x.dtype == torch.bfloat16 for x in outputs):
            self.names.add(func.overloadpacket.__name__)
        return result


def run(model: GPDiT) -> None:
    """All frames at once, and one with a cache; a warning is an error."""
    noisy, theta, clean = (x.float() for x in toy_batch(3, 2, frames=3))
    with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(noisy, theta, clean)
        cache = model.new_cache(2, 3, 4, 6)
        model.extend(cache, clean[:, :2])
        model.denoise(noisy[:2, 2], theta[:2, 2], cache)


@pytest.mark.parametrize("variant", ["of2", "of"])
def test_only_products_are_in_bfloat16(variant: str) -> None:
    model, operators = toy_model(attention=variant).float(), OperatorsInBfloat16()
    with torch.no_grad(), operators:
        run(model)
    assert {"mm", "addmm", "gelu"} <= operators.names
    assert operators.names <= PRODUCTS | POINTWISE | CASTS_AND_MOVES


def test_norms_have_float32_inputs_and_outputs() -> None:
    model, norms = toy_model().float(), []
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.register_forward_hook(lambda module, inputs, output: norms.append((inputs[0].dtype, output.dtype)))
    run(model)
    assert len(norms) > 4 * 2
    assert set(norms) == {(torch.float32, torch.float32)}


def test_blocks_have_float32_inputs_and_outputs() -> None:
    model, streams = toy_model().float(), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: streams.append((inputs[0].dtype, output.dtype)))
    run(model)
    assert set(streams) == {(torch.float32, torch.float32)}
