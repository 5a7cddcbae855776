"""Frame-causal attention over the two streams, computing only what the mask leaves (GPDiT, section 4.1)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpdit_lightning.model.attention.backends import AttentionOperator
from gpdit_lightning.model.attention.plan import Segment, attention_plan
from gpdit_lightning.model.config import AttentionVariant


class Queries(NamedTuple):
    """The asking blocks of one stream, (B, blocks * N, heads, head width), with their own keys and values.

    A block may have more keys than queries, the same number in all blocks: a prefix that only it sees.
    """

    query: Tensor
    key: Tensor
    value: Tensor


class Context(NamedTuple):
    """Keys and values of the context blocks, from the first frame on: each (B', blocks * N, heads, head width)."""

    key: Tensor
    value: Tensor


def frame_causal_attention(
    operator: AttentionOperator,
    variant: AttentionVariant,
    tokens: int,
    context: Context | None,
    clean: Queries | None,
    noisy: Queries | None,
    noisy_sees: Sequence[int] | None = None,
    draws: int = 1,
) -> tuple[Tensor | None, Tensor | None]:
    """Attention output of the clean and of the noisy stream, each shaped like its query.

    Args:
        operator: computes one unmasked call.
        variant: `of2` or `of`.
        tokens: N, tokens per block.
        context: keys and values of the context; the clean queries belong to its last blocks. None: no clip has any.
        clean: the asking clean blocks (B' clips), or None.
        noisy: the noisy blocks (at least K * B' rows, those with context first), or None.
        noisy_sees: for each noisy block, how many context blocks it sees, from the first; None: 0, 1, 2, ...
        draws: K, rows that share the context of a clip; row k * B' + b has that of clip b.
    """
    rows = draws * len(context.key) if context else 0
    if noisy is None or not rows:
        noisy_sees = ()
    elif noisy_sees is None:
        noisy_sees = range(noisy.query.shape[1] // tokens)
    plan = attention_plan(
        variant,
        context=context.key.shape[1] // tokens if context else 0,
        clean_queries=clean.query.shape[1] // tokens if clean else 0,
        noisy_sees=noisy_sees,
    )
    parts: dict[str, list[Tensor]] = {"clean": [], "noisy": []}
    for segment in plan:
        queries = clean if segment.stream == "clean" else noisy
        assert queries is not None
        with_context = Queries(*(x[:rows] for x in queries))
        parts[segment.stream].append(_attend(operator, segment, tokens, context, with_context))
    clean_out = torch.cat(parts["clean"], dim=1) if clean else None
    if noisy is None:
        return clean_out, None
    outputs = [torch.cat(parts["noisy"], dim=1)] if rows else []
    if rows < len(noisy.query):
        # Rows without context: every block sees itself alone.
        alone = Queries(*(x[rows:] for x in noisy))
        everything = Segment("noisy", 0, alone.query.shape[1] // tokens, context=0, own=True)
        outputs.append(_attend(operator, everything, tokens, None, alone))
    return clean_out, torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _attend(
    operator: AttentionOperator, segment: Segment, tokens: int, context: Context | None, queries: Queries
) -> Tensor:
    """Execute one segment: (B, asking blocks * N, heads, head width)."""
    blocks, all_blocks = segment.stop - segment.start, queries.query.shape[1] // tokens
    query, key, value = (x.unflatten(1, (all_blocks, -1))[:, segment.start : segment.stop] for x in queries)
    key, value = key.to(query.dtype), value.to(query.dtype)  # a cache may have been made in another precision
    if segment.context == 0:
        folded = (x.flatten(0, 1) for x in (query, key, value))
        return operator(*folded).unflatten(0, (-1, blocks)).flatten(1, 2)
    query, key, value = (x.flatten(1, 2) for x in (query, key, value))
    assert context is not None
    seen_key, seen_value = (x[:, : segment.context * tokens].to(query.dtype) for x in context)
    if segment.own:
        seen_key, seen_value = _join(seen_key, key), _join(seen_value, value)
    return operator(query, seen_key, seen_value)


def _join(seen: Tensor, own: Tensor) -> Tensor:
    """Put what is seen (B', tokens, heads, head width) before what each of K * B' rows has of its own."""
    own = own.unflatten(0, (-1, len(seen)))
    return torch.cat((seen.expand(len(own), *seen.shape), own), dim=2).flatten(0, 1)
