"""Queries, keys and values of a layer, arranged as the plan's unmasked attention calls."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpdit_lightning.model.attention.plan import AttentionPlan, RowsPlan, Segment


class QKV(NamedTuple):
    """Queries, keys and values of the rows of a part of a plan: each (rows, tokens, heads, head width).

    Every block may have additional keys and values, equally many and before its own, of a prefix to which only this
    block attends.
    """

    query: Tensor
    key: Tensor
    value: Tensor


class KV(NamedTuple):
    """Keys and values of the context, from its first token: each (B', tokens, heads, head width)."""

    key: Tensor
    value: Tensor


def attention_calls(plan: AttentionPlan, context: KV | None, parts: Sequence[QKV]) -> Iterator[QKV]:
    """Yield the inputs of one unmasked attention call for each segment of each part, in order.

    Args:
        plan: the plan.
        context: the context of the clips, of any precision; None: there is none.
        parts: the inputs of each part of the plan.

    Yields:
        query (batch, M, heads, head width), key and value (batch, N, heads, head width), of the query's precision.
    """
    for rows, part in zip(plan.parts, parts, strict=True):
        # One split instead of a slice per segment, whose gradient would be a mostly empty tensor of the whole part.
        queries = part.query.split(rows.query_lengths, dim=1)
        keys, values = (x.split(rows.key_lengths, dim=1) for x in (part.key, part.value))
        for number, (segment, query) in enumerate(zip(rows.segments, queries, strict=True)):
            own = slice(number + 1 - segment.own_segments, number + 1)
            yield _call(segment, context, query, keys[own], values[own])


def collect_outputs(plan: AttentionPlan, outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the output of each part (rows, tokens, heads, head width), from those of `attention_calls`."""
    remaining = iter(outputs)
    return [torch.cat([_unfold(rows, next(remaining)) for _ in rows.segments], dim=1) for rows in plan.parts]


def _unfold(rows: RowsPlan, output: Tensor) -> Tensor:
    """Return the output of a call as (rows, tokens, heads, head width): its batch may be rows x blocks."""
    return output.unflatten(0, (rows.rows, -1)).flatten(1, 2)


def _call(segment: Segment, context: KV | None, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> QKV:
    """Return the inputs of the call of a segment.

    Args:
        segment: the segment.
        context: the context of the clips.
        query: (rows, tokens, heads, head width).
        keys, values: those of the row's segments to which the queries attend.
    """
    # A cache may have another precision than the queries.
    own = [torch.cat(list(x), dim=1) if len(x) > 1 else x[0] for x in (keys, values)] if keys else []
    if segment.context_tokens == 0:
        return QKV(*(x.unflatten(1, (segment.blocks, -1)).flatten(0, 1).to(query.dtype) for x in (query, *own)))
    assert context is not None
    pair = [x[:, : segment.context_tokens].to(query.dtype) for x in context]
    if own:
        pair = [_concatenate(x, of_block.to(query.dtype)) for x, of_block in zip(pair, own, strict=True)]
    return QKV(query, *pair)


def _concatenate(context: Tensor, own: Tensor) -> Tensor:
    """Concatenate the context (B', tokens, heads, head width) with the keys or values of each of its K * B' rows."""
    own = own.unflatten(0, (-1, len(context)))
    return torch.cat((context.expand(len(own), *context.shape), own), dim=2).flatten(0, 1)
