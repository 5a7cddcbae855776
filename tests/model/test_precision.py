"""In bf16 only products round: norms, rotations and the residual stream stay in float32, whatever the weights are."""

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpdit_lightning import GPDiT
from gpdit_lightning.generation import cast_linear_weights
from gpdit_lightning.model.precision import RMSNorm
from tests.model.dtypes import MIXED_BF16, record_dtypes
from tests.model.toys import toy_batch, toy_model

PRODUCTS = {"mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu"}
POINTWISE = {"gelu"}  # between two products; computed in float32 inside, rounded as the second one's input
CASTS_AND_MOVES = {
    *("_to_copy", "alias", "detach", "clone", "cat", "empty", "copy_", "index_copy_"),
    *(
        "t",
        "transpose",
        "permute",
        "view",
        "_unsafe_view",
        "slice",
        "select",
        "expand",
        "unbind",
        "unsqueeze",
        "split_with_sizes",
    ),
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


def run(model: GPDiT, autocast: bool = True) -> None:
    """All frames at once, and one with a cache; a warning is an error."""
    noisy, theta, clean = (x.float() for x in toy_batch(3, 2, frames=3))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(noisy, theta, clean)
        cache = model.new_cache(2, 3, 4, 6)
        model.extend(cache, clean[:, :2])
        model.denoise(noisy[:2, 2], theta[:2, 2], cache)


@pytest.mark.parametrize(
    ("fields", "autocast"),
    [
        ({}, True),
        ({"attention": "of"}, False),
        ({"time_site": "branch_inverse", "classes": 2}, True),
        ({"time_site": "residual"}, False),
    ],
)
def test_only_products_are_in_bfloat16(fields: dict[str, Any], autocast: bool) -> None:
    model, operators = toy_model(**fields).float(), OperatorsInBfloat16()
    if not autocast:
        model.bfloat16()
    with torch.no_grad(), operators:
        run(model, autocast)
    assert {"mm", "addmm", "gelu"} <= operators.names
    assert operators.names <= PRODUCTS | POINTWISE | CASTS_AND_MOVES


def model_in(mode: str) -> GPDiT:
    """Return a model as a strategy or a verb prepares it for bf16."""
    model = toy_model().float()
    if mode == "bf16 weights":  # ZeRO, FSDP2, a bf16 export
        return model.bfloat16()
    if mode == "rounded linear weights under autocast":  # sample, evaluate, features, transform
        cast_linear_weights(model, torch.bfloat16)
    return model


@pytest.mark.parametrize("mode", ["autocast", "rounded linear weights under autocast", "bf16 weights"])
def test_every_way_to_compute_in_bfloat16_has_the_same_precisions(mode: str) -> None:
    model = model_in(mode)
    dtypes, _ = record_dtypes(model)
    run(model, autocast=mode != "bf16 weights")
    assert dtypes == MIXED_BF16


def test_float16_differs_in_the_products_only() -> None:
    dtypes, _ = record_dtypes(model := toy_model().half())
    run(model, autocast=False)
    in_float16 = {name: {dtype.replace("bfloat16", "float16") for dtype in MIXED_BF16[name]} for name in MIXED_BF16}
    assert dtypes == in_float16


def test_a_deep_stream_loses_nothing_by_the_precision_of_the_products() -> None:
    """The error of a stream in bf16 grows with the square root of the depth: 0.33 % after a block, 1.1 % after 24."""
    model, (_, _, clean) = toy_model(layers=24), toy_batch(1, frames=2)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            if parameter.ndim == 2:
                parameter.mul_(0.1)  # branches that are small beside the stream, as after initialization
    model.bfloat16()
    with torch.no_grad():
        found = model.features(clean.float(), [1, 24])
        exact = model.double().features(clean, [1, 24])
    errors = [float((found[layer] - exact[layer]).norm() / exact[layer].norm()) for layer in (1, 24)]
    assert errors[1] < 1.3 * errors[0] < 0.01


def test_a_weight_in_bfloat16_does_not_round_a_norm() -> None:
    norm, x = RMSNorm(64, eps=1e-6).bfloat16(), torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    exact = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), exact, rtol=1e-6, atol=1e-6)
    assert norm(x.double()).dtype == norm(x.bfloat16()).dtype == torch.float32
    assert norm.double()(x).dtype == torch.float64
