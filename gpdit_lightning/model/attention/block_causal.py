"""Block-causal attention over the two streams, without computing masked scores (GPDiT, section 4.1; ACDiT, 4.1)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpdit_lightning.model.attention.backends import AttentionOperator
from gpdit_lightning.model.attention.plan import Segment, attention_plan
from gpdit_lightning.model.config import AttentionVariant


class QKV(NamedTuple):
    """Queries, keys and values of the blocks of one stream: each (B, tokens, heads, head width).

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


class BlockSizes(NamedTuple):
    """Numbers of tokens in the blocks of a pass.

    Attributes:
        clean: tokens of each clean block of the pass, which are the last ones of the context.
        noisy: tokens of each noisy block.
        contexts: for each noisy block, the number of context tokens that it attends to, from the first.
        causal_tokens: tokens of a frame, if a frame attends to no later frame of its block; else None.
    """

    clean: tuple[int, ...] = ()
    noisy: tuple[int, ...] = ()
    contexts: tuple[int, ...] = ()
    causal_tokens: int | None = None

    @classmethod
    def of_frames(cls, frames: int, tokens: int) -> "BlockSizes":
        """Return the sizes of a clip whose blocks are frames: all but the last clean, and all noisy.

        Args:
            frames: number of frames.
            tokens: tokens of a frame.
        """
        return cls((tokens,) * (frames - 1), (tokens,) * frames, tuple(tokens * frame for frame in range(frames)))

    def along_time(self, tokens: int) -> "BlockSizes":
        """Return the sizes at one place of a frame, where a frame of `tokens` tokens has one."""
        clean, noisy, contexts = (
            tuple(count // tokens for count in counts) for counts in (self.clean, self.noisy, self.contexts)
        )
        return BlockSizes(clean, noisy, contexts, None if self.causal_tokens is None else 1)


def block_causal_attention(
    operator: AttentionOperator,
    variant: AttentionVariant,
    sizes: BlockSizes,
    context: KV | None,
    clean: QKV | None,
    noisy: QKV | None,
    draws: int = 1,
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the attention of the clean and of the noisy stream.

    Args:
        operator: computes attention without a mask.
        variant: `of2` or `of`.
        sizes: the blocks of both streams.
        context: keys and values of the context; its last tokens are those of `clean`. None: no clip has context.
        clean: the clean blocks that have queries (B' clips), or None.
        noisy: the noisy blocks (at least K * B' rows, those with context first), or None.
        draws: K, number of rows that share the context of a clip; row k * B' + b has that of clip b.

    Returns:
        the outputs of the clean and of the noisy stream, each with the shape of its queries, or None.
    """
    rows_with_context = draws * len(context.key) if context and noisy else 0
    plan = attention_plan(
        variant,
        context_tokens=context.key.shape[1] if context else 0,
        clean_sizes=sizes.clean if clean else (),
        noisy_sizes=sizes.noisy if rows_with_context else (),
        noisy_contexts=sizes.contexts if rows_with_context else (),
        causal_tokens=sizes.causal_tokens,
    )
    clean_out = _attend_in_segments(operator, plan, "clean", context, clean) if clean else None
    if noisy is None:
        return clean_out, None
    noisy_rows = []
    if rows_with_context:
        with_context = QKV(*(x[:rows_with_context] for x in noisy))
        noisy_rows.append(_attend_in_segments(operator, plan, "noisy", context, with_context))
    if rows_with_context < len(noisy.query):
        # Rows without context: every block attends to itself alone.
        without_context = QKV(*(x[rows_with_context:] for x in noisy))
        alone = attention_plan(variant, 0, (), sizes.noisy, (0,) * len(sizes.noisy), sizes.causal_tokens)
        noisy_rows.append(_attend_in_segments(operator, alone, "noisy", None, without_context))
    return clean_out, torch.cat(noisy_rows) if len(noisy_rows) > 1 else noisy_rows[0]


def _attend_in_segments(
    operator: AttentionOperator, plan: Sequence[Segment], stream_name: str, context: KV | None, stream: QKV
) -> Tensor:
    """Execute the segments of one stream, which cover its queries in order: (B, tokens, heads, head width)."""
    segments = [segment for segment in plan if segment.stream == stream_name]
    # The prefix is before the keys of the first segment of each block.
    blocks = sum(segment.blocks for segment in segments if segment.own_segments <= 1)
    prefix_tokens = (stream.key.shape[1] - stream.query.shape[1]) // blocks
    query_lengths = [segment.blocks * segment.tokens for segment in segments]
    key_lengths = [
        segment.blocks * (segment.tokens + (prefix_tokens if segment.own_segments <= 1 else 0)) for segment in segments
    ]
    # One split instead of a slice per segment, whose gradient would be a mostly empty tensor of the whole stream.
    queries = stream.query.split(query_lengths, dim=1)
    keys, values = (x.split(key_lengths, dim=1) for x in (stream.key, stream.value))
    outputs = []
    for number, (segment, query) in enumerate(zip(segments, queries, strict=True)):
        own = slice(number + 1 - segment.own_segments, number + 1)
        outputs.append(_attend(operator, segment, context, query, keys[own], values[own]))
    return torch.cat(outputs, dim=1)


def _attend(
    operator: AttentionOperator,
    segment: Segment,
    context: KV | None,
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
) -> Tensor:
    """Execute one segment.

    Args:
        operator, context: as for :func:`block_causal_attention`.
        segment: the segment.
        query: (B, tokens, heads, head width).
        keys, values: those of the stream's segments to which the queries attend.

    Returns:
        the shape of `query`.
    """
    # A cache may have another precision than the queries.
    own = [torch.cat(list(x), dim=1) if len(x) > 1 else x[0] for x in (keys, values)] if keys else []
    if segment.context_tokens == 0:
        folded = (x.unflatten(1, (segment.blocks, -1)).flatten(0, 1).to(query.dtype) for x in (query, *own))
        return operator(*folded).unflatten(0, (-1, segment.blocks)).flatten(1, 2)
    assert context is not None
    pair = [x[:, : segment.context_tokens].to(query.dtype) for x in context]
    if own:
        pair = [_concatenate(x, of_block.to(query.dtype)) for x, of_block in zip(pair, own, strict=True)]
    return operator(query, *pair)


def _concatenate(context: Tensor, own: Tensor) -> Tensor:
    """Concatenate the context (B', tokens, heads, head width) with the keys or values of each of its K * B' rows."""
    own = own.unflatten(0, (-1, len(context)))
    return torch.cat((context.expand(len(own), *context.shape), own), dim=2).flatten(0, 1)
