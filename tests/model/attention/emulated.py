"""The operators of xformers and of FlexAttention in plain torch, with gradients on a CPU, for tests of the backends."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from gpdit_lightning.model.attention import backends, flex, xformers_backends

PLAN_BACKENDS = ("xformers_block_diagonal", "flex_attention")
"""Backends that compute a layer in one call."""


def masked_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | float, scale: float | None) -> Tensor:
    """Attention in (B, M, H, K) with a bias of the scores that broadcasts to (B, H, M, N)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bmhk,bnhk->bhmn", query * scale, key) + bias
    return torch.einsum("bhmn,bnhk->bmhk", scores.softmax(dim=-1), value)


class ReferenceOperator:
    """`xformers.ops.memory_efficient_attention` by its definition, in (B, M, H, K); it records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, ...], tuple[int, ...]]] = []  # shapes of the query and of the keys

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Any = None,
        p: float = 0.0,
        scale: float | None = None,
        *,
        op: Any = None,
    ) -> Tensor:
        assert p == 0.0, "dropout was requested"
        assert op is None
        assert query.dtype == key.dtype == value.dtype, "xformers refuses mixed precisions"
        assert key.shape == value.shape
        self.calls.append((tuple(query.shape), tuple(key.shape)))
        bias: Tensor | float = 0.0
        if attn_bias is not None:
            from xformers.ops.fmha.attn_bias import BlockDiagonalMask

            assert type(attn_bias) is BlockDiagonalMask, "the masks with padding have no backward pass"
            assert query.shape[0] == 1, "xformers takes packed sequences as a batch of one"
            bias = attn_bias.materialize((query.shape[1], key.shape[1]), dtype=query.dtype)
        return masked_attention(query, key, value, bias, scale)


def allowed_pairs(mask: Any) -> Tensor:
    """(queries, keys), True where FlexAttention computes a pair: all of a full block, and those of `mask_mod` of a
    partial one; blocks that are in neither list are skipped."""
    queries, keys = mask.seq_lengths
    grid = torch.arange(queries)[:, None], torch.arange(keys)
    allowed = mask.mask_mod(None, None, *grid)
    kinds = []
    for counts, indices in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)):
        kind = torch.zeros(indices.shape[2:], dtype=torch.bool)
        for row, (count, numbers) in enumerate(zip(counts[0, 0].tolist(), indices[0, 0], strict=True)):
            kind[row, numbers[:count].long()] = True
        kinds.append(kind.repeat_interleave(flex.BLOCK, 0).repeat_interleave(flex.BLOCK, 1))
    partial, full = kinds
    assert not (partial & full).any()
    return full | (partial & allowed)


def flex_attention(query: Tensor, key: Tensor, value: Tensor, block_mask: Any) -> Tensor:
    """FlexAttention by its definition, in (B, H, M, K)."""
    bias = torch.zeros((), dtype=query.dtype).masked_fill(~allowed_pairs(block_mask), -torch.inf)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return masked_attention(query, key, value, bias, None).transpose(1, 2)


def forget_choices() -> None:
    """Forget which backends were tried and logged in this process."""
    for cache in (backends.find_backend, backends.built_in_failure, backends._selected):
        cache.cache_clear()
    backends._announced.clear()


@contextmanager
def emulated_operators() -> Iterator[ReferenceOperator]:
    """Put the definitions in place of the operators, which have no kernels with gradients for a CPU."""
    reference = ReferenceOperator()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xformers_backends, "load_xformers_operator", lambda: reference)
        patch.setattr(flex, "load_flex_attention", lambda _: flex_attention)
        forget_choices()
        patch.setattr(backends, "built_in_failure", lambda *_, **__: None)
        patch.setattr(xformers_backends, "xformers_obstacle", lambda *_: None)
        patch.setattr(flex.Flex, "obstacle", lambda *_, **__: None)
        yield reference
    forget_choices()
