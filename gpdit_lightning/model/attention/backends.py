"""Operators that compute attention without a mask: PyTorch's SDPA, xformers, and custom ones.

An operator takes query (batch, M, heads, head width) and key and value (batch, N, heads, head width), all of one dtype,
and returns softmax(query key^T / sqrt(head width)) value, shaped like the query. This is the layout of xformers.
"""

import importlib.util
import logging
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.imports import check_part, report_custom_errors, resolve, value_summary

log = logging.getLogger(__name__)

AttentionOperator = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention by `torch.nn.functional.scaled_dot_product_attention`."""
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2)


def load_xformers_operator() -> Callable[..., Any]:
    """`xformers.ops.memory_efficient_attention`, imported late: it takes a second and prints warnings."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention


def xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention by xformers' `memory_efficient_attention`."""
    return load_xformers_operator()(query, key, value)


# Values of `GPDiTConfig.attention_backend`, besides import paths. None: one of the others, depending on the device.
BACKENDS: dict[str, AttentionOperator | None] = {"auto": None, "sdpa": sdpa, "xformers": xformers}
BUILT_IN = tuple(BACKENDS)

CONTRACT = (
    "give a function of query (batch, M, heads, head width), key and value (batch, N, heads, head width) that returns "
    "softmax(query key^T / sqrt(head width)) value with shape, dtype and device of the query"
)
"""Description of a custom operator, for messages."""
TOLERANCES = {torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Largest relative error (Frobenius norm) in the trial call; that of other dtypes, 1e-2, allows TF32."""


def register_attention_backend(name: str, operator: AttentionOperator) -> None:
    """Register a custom operator under a name for `attention_backend`; an import path needs no registration.

    Args:
        name: a name other than those of the built-in backends.
        operator: see the docstring of this module. For training it must be differentiable by autograd.

    Raises:
        InputError: the name is that of a built-in backend.
    """
    if name in BUILT_IN:
        raise InputError(f"attention backend '{name}' is built in: register yours under another name.")
    check_is_function(operator, name)
    BACKENDS[name] = operator
    find_and_log.cache_clear()
    check_operator.cache_clear()


def find_backend(name: str) -> AttentionOperator | None:
    """Return the operator with a name or at an import path; None for `auto`.

    Raises:
        InputError: the name is neither known nor the import path of a function.
    """
    operator = resolve(name, BACKENDS, "attention_backend")
    if name not in BUILT_IN:
        check_is_function(operator, name)
    return operator


def check_is_function(operator: Any, name: str) -> None:
    """Raise InputError for an operator that cannot be called, or that is a class."""
    check_part(operator, name, "attention_backend", base=None)
    if isinstance(operator, type):
        raise InputError(f"attention_backend '{name}' is a class: {CONTRACT}.")


def why_not_xformers(device_type: str, dtype: torch.dtype, head_width: int) -> str | None:
    """Return the reason why xformers cannot be used, by a small trial call; None if it can."""
    if device_type != "cuda":
        return f"xformers has no kernels for {device_type}"
    if dtype == torch.float64:
        return "xformers has no float64 kernels"
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    try:
        with torch.inference_mode(False), torch.enable_grad():
            probe = torch.zeros(1, 8, 1, head_width, device=device_type, dtype=dtype, requires_grad=True)
            xformers(probe, probe, probe).sum().backward()
    except Exception as error:  # a build for another torch or GPU may raise anything
        reason = str(error).strip().partition("\n")[0]
        return f"xformers failed a trial call: {type(error).__name__}: {reason}"
    return None


@lru_cache(maxsize=8)
def check_operator(
    name: str, operator: AttentionOperator, device_type: str, dtype: torch.dtype, head_width: int, gradient: bool
) -> None:
    """Compare a custom operator with SDPA in a small trial call; made once per process for the same arguments.

    The numbers of queries and keys differ, so that an operator that attends over another axis fails.

    Args:
        name: a registered name or import path.
        operator: the operator.
        device_type, dtype, head_width: as for :func:`select_backend`.
        gradient: also compare the gradients.

    Raises:
        InputError: the operator fails, or its result has another type, shape, dtype or device, or differs.
    """
    generator, (queries, keys) = torch.Generator().manual_seed(0), (8, 24)
    probes = [
        torch.randn(3, tokens, 2, head_width, generator=generator).to(device_type, dtype).requires_grad_(gradient)
        for tokens in (queries, keys, keys)
    ]
    expected = sdpa(*probes)
    with report_custom_errors("attention_backend", name, CONTRACT):
        result = operator(*probes)
        if value_summary(result) != value_summary(expected):
            raise InputError(
                f"attention_backend '{name}' returns {value_summary(result)} for queries of {value_summary(probes[0])} "
                f"and {keys} keys: {CONTRACT}."
            )
        compared = {"result": [(expected, result)]}
        if gradient:
            if not result.requires_grad:
                raise InputError(f"attention_backend '{name}' returns a result without a gradient: {CONTRACT}.")
            weights = probes[0].detach().flip(0)
            of_sdpa, of_operator = (
                torch.autograd.grad(output, probes, weights, materialize_grads=True) for output in (expected, result)
            )
            compared["gradient"] = list(zip(of_sdpa, of_operator, strict=True))
    for what, pairs in compared.items():
        error = max(((actual - right).float().norm() / right.float().norm()).item() for right, actual in pairs)
        if not error <= TOLERANCES.get(dtype, 1e-2):  # NaN included
            fault = f"differs from SDPA's by {error:.1%}" if math.isfinite(error) else "is not finite"
            raise InputError(
                f"attention_backend '{name}' has a {what} that {fault} in a trial call with {queries} queries and "
                f"{keys} keys: {CONTRACT}."
            )


@lru_cache(maxsize=8)
def find_and_log(requested: str, device_type: str, dtype: torch.dtype, head_width: int) -> AttentionOperator:
    """Find a backend and log it, once per process for the same arguments, which are those of `select_backend`."""
    operator = find_backend(requested)
    name, reason = requested, "requested"
    if operator is None or requested == "xformers":
        obstacle = why_not_xformers(device_type, dtype, head_width)
        if requested == "xformers" and obstacle and device_type != "meta":  # where nothing is computed
            raise InputError(f"attention_backend is xformers, but {obstacle}: use auto or sdpa.")
        operator, name = (sdpa, "sdpa") if obstacle else (xformers, "xformers")
        reason = obstacle or (reason if requested == "xformers" else "CUDA device with xformers installed")
    log.info("attention backend: %s (%s)", name, reason)
    return operator


def select_backend(requested: str, device_type: str, dtype: torch.dtype, head_width: int = 128) -> AttentionOperator:
    """Return the operator for a device, precision and head width; chosen, tested and logged once per process.

    Args:
        requested: `auto` (xformers if it can be used, else SDPA), `sdpa`, `xformers`, a registered name, or the import
            path of an operator.
        device_type: `cpu`, `cuda`, ...
        dtype: precision of queries, keys and values (`product_dtype` of `model/precision.py`).
        head_width: width of queries, keys and values; by default that of the H model.

    Raises:
        InputError: the backend is unknown, xformers is requested and cannot be used, or a custom operator fails.
    """
    operator = find_and_log(requested, device_type, dtype, head_width)
    if requested not in BUILT_IN and device_type != "meta":
        check_operator(requested, operator, device_type, dtype, head_width, torch.is_grad_enabled())
    return operator
