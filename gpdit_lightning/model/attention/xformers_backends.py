"""Attention by xformers: one call per segment, or one call per layer with a block-diagonal mask."""

import importlib.util
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gpdit_lightning.model.attention.base import AttentionBackend, Sliced
from gpdit_lightning.model.attention.gather import KV, QKV, attention_calls, collect_outputs
from gpdit_lightning.model.attention.plan import AttentionPlan


def load_xformers_operator() -> Callable[..., Any]:
    """`xformers.ops.memory_efficient_attention`, imported late: it takes a second and prints warnings."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention


def xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention by xformers' `memory_efficient_attention`."""
    return load_xformers_operator()(query, key, value)


def xformers_obstacle(device_type: str, dtype: torch.dtype) -> str | None:
    """Return the reason why xformers cannot be used, if one is known without a call; else None."""
    if device_type != "cuda":
        return f"xformers has no kernels for {device_type}"
    if dtype == torch.float64:
        return "xformers has no float64 kernels"
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    return None


class SlicedXformers(Sliced):
    """xformers' operator on slices of the keys."""

    def __init__(self) -> None:
        super().__init__(xformers)

    def obstacle(self, device_type: str, dtype: torch.dtype, gradient: bool) -> str | None:
        """Return the reason why xformers cannot be used, or None."""
        return xformers_obstacle(device_type, dtype)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # training also uses masks that a preview has created
def block_diagonal_mask(lengths: tuple[tuple[int, int], ...], device: torch.device) -> Any:
    """Return xformers' mask of blocks of (queries, keys), on a device."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    queries, keys = zip(*lengths, strict=True)
    return BlockDiagonalMask.from_seqlens(list(queries), list(keys), device=device)


def block_lengths(plan: AttentionPlan) -> tuple[tuple[int, int], ...]:
    """Return the numbers of queries and keys of each block of the mask: of each row of each call of a plan."""
    lengths: list[tuple[int, int]] = []
    for rows in plan.parts:
        keys = rows.key_lengths
        for number, segment in enumerate(rows.segments):
            own = sum(keys[number + 1 - segment.own_segments : number + 1]) // segment.blocks
            lengths += [(segment.tokens, segment.context_tokens + own)] * (rows.rows * segment.blocks)
    return tuple(lengths)


class BlockDiagonalXformers(AttentionBackend):
    """One call of xformers' operator per layer, over keys that are gathered for each segment.

    The gathered keys are copies: over a clip of F frames about F / 2 times the keys of each stream.
    """

    def obstacle(self, device_type: str, dtype: torch.dtype, gradient: bool) -> str | None:
        """Return the reason why xformers cannot be used, or None."""
        return xformers_obstacle(device_type, dtype)

    def prepare(self, plan: AttentionPlan, device: torch.device) -> Any:
        """Return the block-diagonal mask."""
        return block_diagonal_mask(block_lengths(plan), device)

    def attend(self, plan: AttentionPlan, prepared: Any, context: KV | None, parts: Sequence[QKV]) -> list[Tensor]:
        """Compute the attention of a layer."""
        calls = list(attention_calls(plan, context, parts))
        packed = (torch.cat([x.flatten(0, 1) for x in of_calls])[None] for of_calls in zip(*calls, strict=True))
        output = load_xformers_operator()(*packed, attn_bias=prepared)[0]
        outputs = output.split([call.query.shape[0] * call.query.shape[1] for call in calls])
        return collect_outputs(
            plan, [out.unflatten(0, call.query.shape[:2]) for out, call in zip(outputs, calls, strict=True)]
        )
