"""Frame-causal attention over the two streams, without computing masked scores (GPDiT, section 4.1)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpdit_lightning.model.attention.backends import AttentionOperator
from gpdit_lightning.model.attention.plan import Segment, attention_plan
from gpdit_lightning.model.config import AttentionVariant


class QKV(NamedTuple):
    """Queries, keys and values of the frames of one stream: each (B, frames * N, heads, head width).

    Every frame may have additional keys and values, equally many, of a prefix to which only this frame attends.
    """

    query: Tensor
    key: Tensor
    value: Tensor


class KV(NamedTuple):
    """Keys and values of the context frames, from the first frame: each (B', frames * N, heads, head width)."""

    key: Tensor
    value: Tensor


def frame_causal_attention(
    operator: AttentionOperator,
    variant: AttentionVariant,
    tokens: int,
    context: KV | None,
    clean: QKV | None,
    noisy: QKV | None,
    context_lengths: Sequence[int] | None = None,
    draws: int = 1,
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the attention of the clean and of the noisy stream.

    Args:
        operator: computes attention without a mask.
        variant: `of2` or `of`.
        tokens: N, tokens per frame.
        context: keys and values of the context; its last frames are those of `clean`. None: no clip has context.
        clean: the clean frames that have queries (B' clips), or None.
        noisy: the noisy frames (at least K * B' rows, those with context first), or None.
        context_lengths: for each noisy frame, the number of context frames that it attends to, from the first; None:
            0, 1, 2, ...
        draws: K, number of rows that share the context of a clip; row k * B' + b has that of clip b.

    Returns:
        the outputs of the clean and of the noisy stream, each with the shape of its queries, or None.
    """
    rows_with_context = draws * len(context.key) if context else 0
    if noisy is None or not rows_with_context:
        context_lengths = ()
    elif context_lengths is None:
        context_lengths = range(noisy.query.shape[1] // tokens)
    plan = attention_plan(
        variant,
        context_frames=context.key.shape[1] // tokens if context else 0,
        clean_queries=clean.query.shape[1] // tokens if clean else 0,
        context_lengths=context_lengths,
    )
    clean_out = _attend_in_segments(operator, plan, "clean", tokens, context, clean) if clean else None
    if noisy is None:
        return clean_out, None
    noisy_rows = []
    if rows_with_context:
        with_context = QKV(*(x[:rows_with_context] for x in noisy))
        noisy_rows.append(_attend_in_segments(operator, plan, "noisy", tokens, context, with_context))
    if rows_with_context < len(noisy.query):
        # Rows without context: every frame attends to itself alone.
        without_context = QKV(*(x[rows_with_context:] for x in noisy))
        all_frames = Segment("noisy", 0, without_context.query.shape[1] // tokens, context_frames=0, own_keys=True)
        noisy_rows.append(_attend_in_segments(operator, (all_frames,), "noisy", tokens, None, without_context))
    return clean_out, torch.cat(noisy_rows) if len(noisy_rows) > 1 else noisy_rows[0]


def _attend_in_segments(
    operator: AttentionOperator,
    plan: Sequence[Segment],
    stream_name: str,
    tokens: int,
    context: KV | None,
    stream: QKV,
) -> Tensor:
    """Execute the segments of one stream, which cover its frames in order: (B, frames * N, heads, head width)."""
    segments = [segment for segment in plan if segment.stream == stream_name]
    frames, lengths = stream.query.shape[1] // tokens, [segment.stop - segment.start for segment in segments]
    # One split instead of a slice per segment, whose gradient would be a mostly empty tensor of the whole stream.
    pieces = zip(*(x.unflatten(1, (frames, -1)).split(lengths, dim=1) for x in stream), strict=True)
    return torch.cat(
        [_attend(operator, segment, tokens, context, *piece) for segment, piece in zip(segments, pieces, strict=True)],
        dim=1,
    )


def _attend(
    operator: AttentionOperator,
    segment: Segment,
    tokens: int,
    context: KV | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """Execute one segment.

    Args:
        operator, tokens, context: as for :func:`frame_causal_attention`.
        segment: the segment.
        query, key, value: (B, frames of the segment, tokens, heads, head width).

    Returns:
        (B, frames of the segment * N, heads, head width).
    """
    frames = segment.stop - segment.start
    key, value = key.to(query.dtype), value.to(query.dtype)  # a cache may have another precision
    if segment.context_frames == 0:
        folded = (x.flatten(0, 1) for x in (query, key, value))
        return operator(*folded).unflatten(0, (-1, frames)).flatten(1, 2)
    query, key, value = (x.flatten(1, 2) for x in (query, key, value))
    assert context is not None
    context_key, context_value = (x[:, : segment.context_frames * tokens].to(query.dtype) for x in context)
    if not segment.own_keys:
        return operator(query, context_key, context_value)
    return operator(query, _concatenate(context_key, key), _concatenate(context_value, value))


def _concatenate(context: Tensor, own: Tensor) -> Tensor:
    """Concatenate the context (B', tokens, heads, head width) with the keys or values of each of its K * B' rows."""
    own = own.unflatten(0, (-1, len(context)))
    return torch.cat((context.expand(len(own), *context.shape), own), dim=2).flatten(0, 1)
