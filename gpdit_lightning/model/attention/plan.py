"""Which frames attend to which, as a list of slices that any attention operator can execute.

There are two streams: the context (clean frames, some of which may be cached and have no queries) and the noisy frames.
GPDiT, figure 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gpdit_lightning.model.config import AttentionVariant


@dataclass(frozen=True)
class Segment:
    """One unmasked attention call.

    Attributes:
        stream: the stream of the query frames.
        start: the first query frame, counted among the frames of the stream that have queries.
        stop: one past the last query frame.
        context_frames: number of context frames, from the first, that every query frame attends to.
        own_keys: whether each query frame also attends to its own keys (several frames fold into the batch).
    """

    stream: Literal["clean", "noisy"]
    start: int
    stop: int
    context_frames: int
    own_keys: bool


def attention_plan(
    variant: AttentionVariant, context_frames: int, clean_queries: int, context_lengths: Sequence[int]
) -> tuple[Segment, ...]:
    """Return the segments of a forward pass for clips that have context; they cover each query frame once.

    Args:
        variant: `of2` or `of`, see :class:`~gpdit_lightning.GPDiTConfig`.
        context_frames: number of frames in the context.
        clean_queries: number of these frames, the last ones, that also have queries.
        context_lengths: for each noisy frame, the number of context frames that it attends to, from the first.
    """
    segments = []
    if clean_queries and variant == "of":
        segments.append(Segment("clean", 0, clean_queries, context_frames=0, own_keys=True))
    elif clean_queries:
        # The keys of a clean frame are the last ones of the context that it attends to: a slice, without concatenation.
        first = context_frames - clean_queries
        segments += [Segment("clean", j, j + 1, first + j + 1, own_keys=False) for j in range(clean_queries)]
    segments += [Segment("noisy", i, i + 1, length, own_keys=True) for i, length in enumerate(context_lengths)]
    return tuple(segments)
