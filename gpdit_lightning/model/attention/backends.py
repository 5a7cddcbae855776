"""The attention backends: those by name, custom ones, and the choice of one.

A custom backend is a function, which is called for each segment of a plan (`AttentionOperator` in `base.py`), or a
subclass of `AttentionBackend`, which computes a layer.
"""

import logging
import math
from functools import lru_cache
from typing import Any

import torch

from gpdit_lightning.errors import InputError
from gpdit_lightning.imports import check_part, report_custom_errors, resolve, value_summary
from gpdit_lightning.model.attention.base import AttentionBackend, AttentionOperator, Sliced
from gpdit_lightning.model.attention.flex import Flex
from gpdit_lightning.model.attention.sdpa import Sdpa, sdpa
from gpdit_lightning.model.attention.trial import failure, small_trial_kernel, tolerance
from gpdit_lightning.model.attention.xformers_backends import BlockDiagonalXformers, SlicedXformers

log = logging.getLogger(__name__)

AUTO = "auto"
# Values of `GPDiTConfig.attention_backend`, besides import paths and `auto`, in the order in which `auto` tries them.
BACKENDS: dict[str, AttentionBackend] = {
    "xformers": SlicedXformers(),
    "xformers_block_diagonal": BlockDiagonalXformers(),
    "sdpa": Sdpa(),
    "sdpa_fa3": Sdpa("FA3"),
    "sdpa_fa4": Sdpa("FA4"),
    "flex_attention": Flex(),
}
BUILT_IN = tuple(BACKENDS)

CONTRACT = (
    "give a function of query (batch, M, heads, head width), key and value (batch, N, heads, head width) that returns "
    "softmax(query key^T / sqrt(head width)) value with shape, dtype and device of the query, or a subclass of "
    "AttentionBackend"
)
"""Description of a custom backend, for messages."""


def register_attention_backend(name: str, backend: AttentionOperator | type[AttentionBackend]) -> None:
    """Register a custom backend under a name for `attention_backend`; an import path needs no registration.

    Args:
        name: a name other than those of the built-in backends.
        backend: see the docstring of this module. For training it must be differentiable by autograd.

    Raises:
        InputError: the name is that of a built-in backend, or the backend is neither a function nor such a class.
    """
    if name in (AUTO, *BUILT_IN):
        raise InputError(f"attention backend '{name}' is built in: register yours under another name.")
    BACKENDS[name] = as_backend(backend, name)
    find_backend.cache_clear()
    _selected.cache_clear()


@lru_cache(maxsize=32)  # the same object in all passes, for compiled blocks
def find_backend(name: str) -> AttentionBackend | None:
    """Return the backend with a name or at an import path; None for `auto`.

    Raises:
        InputError: the name is neither known nor the import path of a function or of a subclass of `AttentionBackend`.
    """
    found: Any = resolve(name, {AUTO: None, **BACKENDS}, "attention_backend")
    return found if found is None or isinstance(found, AttentionBackend) else as_backend(found, name)


def as_backend(custom: Any, name: str) -> AttentionBackend:
    """Return a custom function or class as a backend; raise InputError for anything else."""
    if isinstance(custom, type) and issubclass(custom, AttentionBackend):
        check_part(custom, name, "attention_backend", base=AttentionBackend)
        with report_custom_errors("attention_backend", name, CONTRACT):
            return custom()
    check_part(custom, name, "attention_backend", base=None)
    if isinstance(custom, type):
        raise InputError(f"attention_backend '{name}' is a class: {CONTRACT}.")
    return Sliced(custom)


def check_custom(
    name: str, backend: AttentionBackend, device_type: str, dtype: torch.dtype, head_width: int, gradient: bool
) -> None:
    """Compare a custom backend with SDPA in a small trial.

    Args:
        name: a registered name or import path.
        backend: the backend.
        device_type, dtype, head_width: as for :func:`select_backend`.
        gradient: also compare the gradients.

    Raises:
        InputError: the backend fails, or its result has another type, shape, dtype or device, or differs.
    """
    if type(backend) is Sliced:
        check_operator(name, backend.operator, device_type, dtype, head_width, gradient)
    elif (reason := failure(backend, device_type, dtype, head_width, gradient)) is not None:
        raise InputError(f"attention_backend '{name}' cannot be used, since {reason}: {CONTRACT}.")


def check_operator(
    name: str, operator: AttentionOperator, device_type: str, dtype: torch.dtype, head_width: int, gradient: bool
) -> None:
    """Compare a custom operator with SDPA; arguments and errors as of :func:`check_custom`.

    The numbers of queries and keys differ, so that an operator that attends over another axis fails.
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
        if not error <= tolerance(dtype):  # NaN included
            fault = f"differs from SDPA's by {error:.1%}" if math.isfinite(error) else "is not finite"
            raise InputError(
                f"attention_backend '{name}' has a {what} that {fault} in a trial call with {queries} queries and "
                f"{keys} keys: {CONTRACT}."
            )


@lru_cache(maxsize=64)
def built_in_failure(name: str, device_type: str, dtype: torch.dtype, head_width: int, gradient: bool) -> str | None:
    """Return the reason why a built-in backend cannot be used, found once per process; None if it can."""
    return None if name == "sdpa" else failure(BACKENDS[name], device_type, dtype, head_width, gradient)


def announce(name: str, reason: str) -> None:
    """Log a backend with the reason for it, once per process."""
    if name not in _announced:
        _announced.add(name)
        log.info("attention backend: %s (%s)", name, reason)


_announced: set[str] = set()


def select_backend(requested: str, device_type: str, dtype: torch.dtype, head_width: int = 128) -> AttentionBackend:
    """Return the backend for a device, precision and head width; chosen, tested and logged once per process.

    Args:
        requested: `auto` (xformers if it can be used, else SDPA), another name in `BACKENDS`, or the import path of a
            custom backend. A training run on CUDA replaces `auto` by the fastest backend at its shapes.
        device_type: `cpu`, `cuda`, ...
        dtype: precision of queries, keys and values (`product_dtype` of `model/precision.py`).
        head_width: width of queries, keys and values; by default that of the H model.

    Raises:
        InputError: the backend is unknown, or cannot be used.
    """
    return _selected(requested, device_type, dtype, head_width, torch.is_grad_enabled())


@lru_cache(maxsize=32)
def _selected(
    requested: str, device_type: str, dtype: torch.dtype, head_width: int, gradient: bool
) -> AttentionBackend:
    """Return the backend for `select_backend`, with or without a backward pass."""
    backend, name, reason = find_backend(requested), requested, "requested"
    facts = (device_type, dtype, head_width, gradient)
    if backend is None:
        obstacle = built_in_failure("xformers", *facts)
        name = "sdpa" if obstacle else "xformers"
        backend, reason = BACKENDS[name], obstacle or "CUDA device with xformers installed"
    elif device_type == "meta":  # where nothing is computed
        return BACKENDS["sdpa"] if requested in BUILT_IN else backend
    elif requested not in BUILT_IN:
        check_custom(requested, backend, *facts)
    elif (obstacle := built_in_failure(requested, *facts)) is not None:
        raise InputError(f"attention_backend is {requested}, but {obstacle}: use auto or sdpa.")
    kernel = f"; {small_trial_kernel(backend, *facts)}" if device_type == "cuda" else ""
    announce(name, reason + kernel)
    return backend
