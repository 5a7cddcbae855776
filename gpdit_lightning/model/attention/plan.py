"""Which tokens attend to which in a layer, without masked scores (GPDiT, section 4.1 and figure 3; ACDiT, figure 3).

There are two streams: the context (clean blocks, some of which may be cached and have no queries) and the noisy
blocks. A condition adds the stream of its prefixes. A backend (`base.py`) executes the `AttentionPlan` of all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Literal, NamedTuple

from gpdit_lightning.model.config import AttentionVariant

StreamName = Literal["prefix", "clean", "noisy"]


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


@dataclass(frozen=True)
class Segment:
    """Queries of a row that attend to the same keys: one unmasked attention call for all rows.

    Attributes:
        stream: the stream of the queries. The segments of a stream follow each other and cover its queries.
        blocks: number of blocks of equal size, which fold into the batch.
        tokens: number of query tokens of each block.
        context_tokens: number of context tokens, from the first, that all queries attend to.
        own_segments: number of segments of the stream, the last of which is this one, to whose keys the queries attend.
    """

    stream: StreamName
    blocks: int
    tokens: int
    context_tokens: int
    own_segments: int


@dataclass(frozen=True)
class RowsPlan:
    """The attention of equal rows: clean clips, noisy rows with context, those without, or prefixes.

    Attributes:
        rows: number of rows.
        segments: the segments of a row, which cover its queries in order.
        prefix_tokens: number of keys, before those of each block and only for it, that belong to the row's prefix.
    """

    rows: int
    segments: tuple[Segment, ...]
    prefix_tokens: int = 0

    @property
    def has_own_keys(self) -> bool:
        """Return whether the queries attend to keys of their row, and not to the context alone."""
        return any(segment.own_segments for segment in self.segments)

    @property
    def query_lengths(self) -> list[int]:
        """Return the number of queries of each segment."""
        return [segment.blocks * segment.tokens for segment in self.segments]

    @property
    def key_lengths(self) -> list[int]:
        """Return the number of the row's keys that belong to each segment; its prefix precedes a block's first one."""
        return [
            segment.blocks * (segment.tokens + (self.prefix_tokens if segment.own_segments <= 1 else 0))
            for segment in self.segments
        ]


@dataclass(frozen=True)
class AttentionPlan:
    """The attention of a layer.

    Attributes:
        clips: B', number of clips with context.
        context_tokens: number of tokens of the context of each of these clips.
        parts: the rows with queries. Row k * B' + b of noisy rows with context has that of clip b.
    """

    clips: int
    context_tokens: int
    parts: tuple[RowsPlan, ...]


@lru_cache(maxsize=256)
def plan_attention(
    variant: AttentionVariant,
    sizes: BlockSizes,
    clips: int,
    rows: int,
    draws: int = 1,
    prefix_tokens: int = 0,
    cached_tokens: int = 0,
    all_queries: bool = True,
) -> AttentionPlan:
    """Return the plan of a layer, whose parts are: prefixes, clean clips, noisy rows with context, and those without.

    Parts without queries are left out.

    Args:
        variant: `of2` or `of`, see :class:`~gpdit_lightning.GPDiTConfig`.
        sizes: the blocks of both streams.
        clips: B', number of clips with context; 0 if there is no context.
        rows: number of noisy rows, those with context first.
        draws: K, number of noisy rows that share the context of a clip.
        prefix_tokens: number of tokens of the prefix of each noisy row.
        cached_tokens: number of context tokens before the clean blocks of the pass.
        all_queries: whether prefixes and clean blocks have queries too, as in all layers but the last.
    """
    context_tokens = cached_tokens + sum(sizes.clean) if clips else 0
    with_context = min(draws * clips, rows) if context_tokens else 0
    parts = []
    if prefix_tokens and all_queries:
        parts.append(RowsPlan(rows, (Segment("prefix", 1, prefix_tokens, 0, own_segments=1),)))
    if clips and sizes.clean and all_queries:
        segments = plan_segments(variant, context_tokens, sizes.clean, (), (), sizes.causal_tokens)
        parts.append(RowsPlan(clips, segments))
    if with_context:
        segments = plan_segments(variant, context_tokens, (), sizes.noisy, sizes.contexts, sizes.causal_tokens)
        parts.append(RowsPlan(with_context, segments, prefix_tokens))
    if rows > with_context:  # every block attends to itself alone
        no_context = (0,) * len(sizes.noisy)
        segments = plan_segments(variant, 0, (), sizes.noisy, no_context, sizes.causal_tokens)
        parts.append(RowsPlan(rows - with_context, segments, prefix_tokens))
    return AttentionPlan(clips if context_tokens else 0, context_tokens, tuple(parts))


def plan_segments(
    variant: AttentionVariant,
    context_tokens: int,
    clean_sizes: Sequence[int],
    noisy_sizes: Sequence[int],
    noisy_contexts: Sequence[int],
    causal_tokens: int | None = None,
) -> tuple[Segment, ...]:
    """Return the segments of a row with context; they cover the queries of each stream once.

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


def _alone(stream: StreamName, sizes: Sequence[int], causal_tokens: int | None) -> list[Segment]:
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
