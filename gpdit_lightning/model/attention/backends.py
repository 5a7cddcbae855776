"""The operators that compute one unmasked attention call: PyTorch's SDPA and xformers, behind one signature.

Layout everywhere is xformers': (batch, tokens, heads, head width).
"""

import importlib.util
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpdit_lightning.errors import InputError

log = logging.getLogger(__name__)

AttentionOperator = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Full attention by `torch.nn.functional.scaled_dot_product_attention`."""
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2)


def load_xformers_operator() -> Callable[..., Any]:
    """`xformers.ops.memory_efficient_attention`, imported late: it takes a second and prints warnings."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention


def xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Full attention by xformers' `memory_efficient_attention`."""
    return load_xformers_operator()(query, key, value)


def precision_of(x: Tensor) -> torch.dtype:
    """The precision of queries, keys and values that are projected from hidden states: autocast's where it is on."""
    kind = x.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # meta tensors know no autocast
    return torch.get_autocast_dtype(kind) if casts else x.dtype


def why_not_xformers(device_type: str, dtype: torch.dtype, head_width: int) -> str | None:
    """The reason why xformers cannot serve, found by one tiny forward and backward call; None if it can."""
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
    except Exception as error:  # whatever a build for another torch or GPU may raise
        reason = str(error).strip().partition("\n")[0]
        return f"xformers failed a trial call: {type(error).__name__}: {reason}"
    return None


@lru_cache(maxsize=8)
def select_backend(requested: str, device_type: str, dtype: torch.dtype, head_width: int = 128) -> AttentionOperator:
    """The operator for a device, precision and head width, chosen once per process and named in one log line.

    Args:
        requested: `auto` (xformers where it can serve, else SDPA), `sdpa` or `xformers`.
        device_type: `cpu`, `cuda`, ...
        dtype: precision of queries, keys and values (`precision_of`).
        head_width: theirs; that of the H model where nothing is said.

    Raises:
        InputError: the request is unknown, or xformers is asked for and not installed.
    """
    if requested not in ("auto", "sdpa", "xformers"):
        raise InputError(f"attention_backend '{requested}' is not known: choose auto, sdpa or xformers.")
    if requested == "xformers" and importlib.util.find_spec("xformers") is None:
        raise InputError("attention_backend is xformers, which is not installed: `pip install xformers` or take auto.")
    obstacle = why_not_xformers(device_type, dtype, head_width) if requested == "auto" else None
    operator = sdpa if requested == "sdpa" or obstacle else xformers
    reason = "asked for" if requested != "auto" else obstacle or "CUDA device with xformers installed"
    log.info("attention backend: %s (%s)", operator.__name__, reason)
    return operator
