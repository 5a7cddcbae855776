"""Which tokens attend to which, as a list of slices that any attention operator can execute.

There are two streams: the context (clean blocks, some of which may be cached and have no queries) and the noisy blocks.
GPDiT, figure 3; ACDiT, figure 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from gpdit_lightning.model.config import AttentionVariant


@dataclass(frozen=True)
class Segment:
    """One unmasked attention call.

    Attributes:
        stream: the stream of the queries. The segments of a stream follow each other and cover its queries.
        blocks: number of blocks of equal size, which fold into the batch.
        tokens: number of query tokens of each block.
        context_tokens: number of context tokens, from the first, that all queries attend to.
        own_segments: number of segments of the stream, the last of which is this one, to whose keys the queries attend.
    """

    stream: Literal["clean", "noisy"]
    blocks: int
    tokens: int
    context_tokens: int
    own_segments: int


def attention_plan(
    variant: AttentionVariant,
    context_tokens: int,
    clean_sizes: Sequence[int],
    noisy_sizes: Sequence[int],
    noisy_contexts: Sequence[int],
    causal_tokens: int | None = None,
) -> tuple[Segment, ...]:
    """Return the segments of a forward pass; they cover the queries of each stream once.

    Args:
        variant: `of2` or `of`, see :class:`~gpdit_lightning.GPDiTConfig`.
        context_tokens: number of tokens in the context.
        clean_sizes: tokens of each context block, of the last ones, that also has queries.
        noisy_sizes: tokens of each noisy block.
        noisy_contexts: for each noisy block, the number of context tokens that it attends to, from the first.
        causal_tokens: number of tokens of a frame, if a frame attends to no later frame of its block; else None.
    """
    segments, end = [], context_tokens - sum(clean_sizes)
    if variant == "of":
        segments += _alone("clean", clean_sizes, causal_tokens)
    else:
        # The keys of a clean block are the last ones of the context that it attends to: a slice, without concatenation.
        for size in clean_sizes:
            for piece in _pieces(size, causal_tokens):
                end += piece
                segments.append(Segment("clean", 1, piece, end, own_segments=0))
    for context, sizes in _runs(noisy_sizes, noisy_contexts):
        if context == 0:
            segments += _alone("noisy", sizes, causal_tokens)
        else:
            for size in sizes:
                pieces = _pieces(size, causal_tokens)
                segments += [Segment("noisy", 1, piece, context, n + 1) for n, piece in enumerate(pieces)]
    return tuple(segments)


def _alone(stream: Literal["clean", "noisy"], sizes: Sequence[int], causal_tokens: int | None) -> list[Segment]:
    """Return the segments of blocks that attend to themselves alone: equal neighbours are one segment."""
    segments = []
    for size, equal in groupby(sizes):
        count, pieces = len(list(equal)), _pieces(size, causal_tokens)
        if len(pieces) == 1:
            segments.append(Segment(stream, count, size, 0, own_segments=1))
        else:
            segments += [
                Segment(stream, 1, p, 0, own_segments=n + 1) for _ in range(count) for n, p in enumerate(pieces)
            ]
    return segments


def _pieces(size: int, causal_tokens: int | None) -> list[int]:
    """Return the tokens of each part of a block that is a segment: the frames of a causal block, or the whole block."""
    return [size] if causal_tokens is None else [causal_tokens] * (size // causal_tokens)


def _runs(sizes: Sequence[int], contexts: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Return the sizes of neighbouring blocks with equal contexts: (context, sizes) of each run."""
    pairs = groupby(zip(contexts, sizes, strict=True), key=lambda pair: pair[0])
    return [(context, [size for _, size in run]) for context, run in pairs]
