"""Which blocks of tokens attend to which, as a list of slices that any attention operator can execute.

A *block* is the unit of autoregression: one latent frame in GPDiT. There are two streams: the context (clean blocks,
some of which may be cached and ask nothing) and the noisy blocks. GPDiT, figure 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gpdit_lightning.model.config import AttentionVariant


@dataclass(frozen=True)
class Segment:
    """One unmasked attention call.

    Attributes:
        stream: the stream that asks.
        start: first asking block; counted among the blocks that ask, not among the cached ones.
        stop: one past the last asking block.
        context: how many context blocks, from the first, are seen by all of them.
        own: each asking block sees itself through its own keys (several blocks fold into the batch).
    """

    stream: Literal["clean", "noisy"]
    start: int
    stop: int
    context: int
    own: bool


def attention_plan(
    variant: AttentionVariant, context: int, clean_queries: int, noisy_sees: Sequence[int]
) -> tuple[Segment, ...]:
    """The segments of a forward pass for clips that have context; together they cover each asking block once.

    Args:
        variant: `of2` or `of`, see :class:`~gpdit_lightning.GPDiTConfig`.
        context: number of context blocks whose keys are at hand.
        clean_queries: how many of them, the last ones, ask as well.
        noisy_sees: for each noisy block, how many context blocks it sees, from the first.
    """
    segments = []
    if clean_queries and variant == "of":
        segments.append(Segment("clean", 0, clean_queries, context=0, own=True))
    elif clean_queries:
        # A clean block's own keys are the last of the context it sees: one contiguous slice, nothing to join.
        first = context - clean_queries
        segments += [Segment("clean", j, j + 1, context=first + j + 1, own=False) for j in range(clean_queries)]
    segments += [Segment("noisy", i, i + 1, context=seen, own=True) for i, seen in enumerate(noisy_sees)]
    return tuple(segments)
