"""Which blocks of tokens attend to which, as a list of slices that any attention operator can execute.

A *block* is the unit of autoregression: one latent frame in GPDiT. There are two streams: the context (clean blocks,
some of which may be cached and have no queries) and the noisy blocks. GPDiT, figure 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gpdit_lightning.model.config import AttentionVariant


@dataclass(frozen=True)
class Segment:
    """One unmasked attention call.

    Attributes:
        stream: the stream of the query blocks.
        start: the first query block, counted among the blocks of the stream that have queries.
        stop: one past the last query block.
        context_blocks: number of context blocks, from the first, that every query block attends to.
        own_keys: whether each query block also attends to its own keys (several blocks fold into the batch).
    """

    stream: Literal["clean", "noisy"]
    start: int
    stop: int
    context_blocks: int
    own_keys: bool


def attention_plan(
    variant: AttentionVariant, context_blocks: int, clean_queries: int, context_lengths: Sequence[int]
) -> tuple[Segment, ...]:
    """Return the segments of a forward pass for clips that have context; they cover each query block once.

    Args:
        variant: `of2` or `of`, see :class:`~gpdit_lightning.GPDiTConfig`.
        context_blocks: number of blocks in the context.
        clean_queries: number of these blocks, the last ones, that also have queries.
        context_lengths: for each noisy block, the number of context blocks that it attends to, from the first.
    """
    segments = []
    if clean_queries and variant == "of":
        segments.append(Segment("clean", 0, clean_queries, context_blocks=0, own_keys=True))
    elif clean_queries:
        # The keys of a clean block are the last ones of the context that it attends to: a slice, without concatenation.
        first = context_blocks - clean_queries
        segments += [Segment("clean", j, j + 1, first + j + 1, own_keys=False) for j in range(clean_queries)]
    segments += [Segment("noisy", i, i + 1, length, own_keys=True) for i, length in enumerate(context_lengths)]
    return tuple(segments)
