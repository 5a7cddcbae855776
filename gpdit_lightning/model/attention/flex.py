"""Attention by PyTorch's FlexAttention: one call per layer with a block mask, without copies of keys per segment.

All queries of a layer are one sequence, and all keys another one: the context of each clip, then the keys of each row.
A query attends to two ranges of keys: the first tokens of its context, and keys of its row. Runs of tokens, such as
frames, are padded to whole blocks of the mask, where that adds at most a quarter, so that few blocks are partial.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from gpdit_lightning.model.attention.base import AttentionBackend
from gpdit_lightning.model.attention.gather import KV, QKV
from gpdit_lightning.model.attention.plan import AttentionPlan, RowsPlan
from gpdit_lightning.model.compilation import MANY_GRAPHS

BLOCK = 128
"""Tokens of a block of the mask, of queries and of keys."""
MAX_PADDING = 1.25
"""Largest ratio of the padded to the unpadded length of runs of tokens that are padded."""


@dataclass(frozen=True)
class Runs:
    """Runs of tokens of a sequence, padded to blocks.

    Attributes:
        starts: (runs + 1,) the first token of each run, and the number of tokens.
        padded_starts: the same in the padded sequence, whose length is a multiple of `BLOCK`.
    """

    starts: Tensor
    padded_starts: Tensor

    @classmethod
    def of(cls, lengths: Tensor) -> "Runs":
        """Return the runs of the given lengths (runs,), none of which is 0."""
        padded = (lengths + BLOCK - 1) // BLOCK * BLOCK
        if padded.sum() > MAX_PADDING * lengths.sum():
            padded = lengths.clone()
        padded[-1] += -padded.sum() % BLOCK
        zero = lengths.new_zeros(1)
        return cls(torch.cat((zero, lengths.cumsum(0))), torch.cat((zero, padded.cumsum(0))))

    @property
    def padded_length(self) -> int:
        """Return the number of tokens of the padded sequence."""
        return int(self.padded_starts[-1])

    def positions(self) -> Tensor:
        """Return the position of each token in the padded sequence: (tokens,)."""
        shifts = (self.padded_starts - self.starts)[:-1]
        return torch.arange(int(self.starts[-1])) + shifts.repeat_interleave(self.starts.diff())

    def padded(self, boundaries: Tensor) -> Tensor:
        """Return boundaries of runs as positions in the padded sequence."""
        return self.padded_starts[torch.searchsorted(self.starts, boundaries.contiguous())]


def key_ranges(plan: AttentionPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Return the runs of queries, the keys to which each run attends, and the runs of keys.

    Returns:
        the lengths of the runs of queries (R,); their ranges of keys (R, 2, 2), as first key and end of the context's
        and of the row's keys; and the lengths of the runs of keys, at whose boundaries all ranges begin and end.
    """
    ends = {s.context_tokens for rows in plan.parts for s in rows.segments if s.context_tokens} | {plan.context_tokens}
    cuts = torch.tensor(sorted(ends), dtype=torch.long)
    key_runs = [cuts.diff(prepend=cuts.new_zeros(1)).repeat(plan.clips)]
    query_runs, ranges, first_key = [], [], plan.clips * plan.context_tokens
    for rows in plan.parts:
        row_queries, row_ranges, row_keys = _runs_of_row(rows)
        numbers = torch.arange(rows.rows)[:, None, None]
        of_rows = row_ranges.expand(rows.rows, -1, -1, -1).clone()
        of_rows[:, :, 0] += numbers % max(plan.clips, 1) * plan.context_tokens
        of_rows[:, :, 1] += first_key + numbers * int(row_keys.sum())
        query_runs.append(row_queries.repeat(rows.rows))
        ranges.append(of_rows.flatten(0, 1))
        key_runs.append(row_keys[row_keys > 0].repeat(rows.rows))
        first_key += rows.rows * int(row_keys.sum())
    return torch.cat(query_runs), torch.cat(ranges), torch.cat(key_runs)


@lru_cache(maxsize=256)
def padded_lengths(plan: AttentionPlan) -> tuple[int, int]:
    """Return the lengths of the padded sequences of queries and of keys."""
    with torch.device("cpu"):
        queries, _, keys = key_ranges(plan)
        return Runs.of(queries).padded_length, Runs.of(keys).padded_length


def _runs_of_row(rows: RowsPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same as `key_ranges` for one row, whose context and keys begin at 0."""
    queries, ranges, keys, end = [], [], [], 0
    lengths = rows.key_lengths
    for number, segment in enumerate(rows.segments):
        for _ in range(segment.blocks):
            of_block = lengths[number] // segment.blocks if rows.has_own_keys else 0
            end += of_block
            earlier = sum(lengths[number + 1 - segment.own_segments : number]) if segment.own_segments else 0
            own = (end - of_block - earlier, end) if segment.own_segments else (0, 0)
            queries.append(segment.tokens)
            keys.append(of_block)
            ranges.append(((0, segment.context_tokens), own))
    return torch.tensor(queries), torch.tensor(ranges), torch.tensor(keys if rows.has_own_keys else [0])


@dataclass(frozen=True)
class FlexTables:
    """A plan for FlexAttention, on a device.

    Attributes:
        mask: the block mask.
        queries, keys: positions of the tokens in the padded sequences.
        padded_queries, padded_keys: lengths of the padded sequences.
    """

    mask: Any
    queries: Tensor
    keys: Tensor
    padded_queries: int
    padded_keys: int


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # training also uses tables that a preview has created
def flex_tables(plan: AttentionPlan, device: torch.device) -> FlexTables:
    """Return the tables of a plan, computed on the CPU and copied to the device."""
    from torch.nn.attention.flex_attention import BlockMask

    with torch.device("cpu"):
        query_lengths, ranges, key_lengths = key_ranges(plan)
        queries, keys = Runs.of(query_lengths), Runs.of(key_lengths)
        ranges = keys.padded(ranges)
        is_key = torch.zeros(keys.padded_length, dtype=torch.bool)
        is_key[keys.positions()] = True
        blocks = _block_kinds(queries, ranges, is_key)
        # Padded queries attend to what their run attends to, so that no softmax is over nothing.
        of_query = ranges.int().repeat_interleave(queries.padded_starts.diff(), dim=0)
    partial, full = (_indices(kind.to(device)) for kind in blocks)
    mask = BlockMask.from_kv_blocks(
        *partial,
        *full,
        BLOCK_SIZE=BLOCK,
        mask_mod=_mask_mod(of_query.flatten(1).to(device), is_key.to(device)),
        seq_lengths=(queries.padded_length, keys.padded_length),
    )
    of_queries, of_keys = (runs.positions().to(device) for runs in (queries, keys))
    return FlexTables(mask, of_queries, of_keys, queries.padded_length, keys.padded_length)


def _mask_mod(ranges: Tensor, is_key: Tensor) -> Callable[..., Tensor]:
    """Return the mask of single tokens; it always depends on its arguments, since a kernel may skip a trivial one."""
    context_start, context_end, own_start, own_end = ranges.mT.contiguous().unbind()

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_context = (key >= context_start[query]) & (key < context_end[query])
        in_row = (key >= own_start[query]) & (key < own_end[query])
        return is_key[key] & (in_context | in_row)

    return mask_mod


def _block_kinds(queries: Runs, ranges: Tensor, is_key: Tensor) -> tuple[Tensor, Tensor]:
    """Return which blocks are partial and which are full: each (blocks of queries, blocks of keys), bool.

    Args:
        queries: runs of queries.
        ranges: (R, 2, 2) of each run, in padded positions of keys.
        is_key: (padded keys,), False where the position is padding.
    """
    keys_before = torch.cat((torch.zeros(1, dtype=torch.long), is_key.long().cumsum(0)))
    edges = torch.arange(0, len(is_key) + 1, BLOCK)
    start, end = (torch.clamp(edge[..., None], edges[:-1], edges[1:]) for edge in ranges.unbind(-1))
    counts = (keys_before[end] - keys_before[start]).sum(dim=1)  # keys of each run in each block
    # A block of queries has the runs from `first` to `last`.
    block_starts = torch.arange(0, queries.padded_length, BLOCK)
    first = torch.searchsorted(queries.padded_starts, block_starts, right=True) - 1
    last = torch.searchsorted(queries.padded_starts, block_starts + BLOCK - 1, right=True) - 1

    def runs_with(keys: Tensor) -> Tensor:
        before = torch.cat((torch.zeros(1, keys.shape[1], dtype=torch.long), keys.long().cumsum(0)))
        return before[last + 1] - before[first]

    full = runs_with(counts == BLOCK) == (last + 1 - first)[:, None]
    return (runs_with(counts > 0) > 0) & ~full, full


def _indices(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each block of queries the number of its blocks of keys, and all blocks of keys, those first."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(dim=1).int()[None, None], order.int()[None, None]


@cache
def load_flex_attention(device_type: str) -> Callable[..., Any]:
    """FlexAttention, compiled except on a CPU; imported late.

    Not compiled, as beyond torch's limit of graphs, it would compute all pairs of queries and keys.
    """
    from torch.nn.attention.flex_attention import flex_attention

    operator: Callable[..., Any] = flex_attention
    if device_type == "cpu":
        return operator
    compiled = torch.compile(operator)

    def run(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():  # as a part of a compiled block, to which the limit of graphs applies
            return compiled(*arguments, **options)
        with torch._dynamo.config.patch(**MANY_GRAPHS):
            return compiled(*arguments, **options)

    return run


class Flex(AttentionBackend):
    """One call of FlexAttention per layer with a block mask."""

    kernel = "FlexAttention"

    def obstacle(self, device_type: str, dtype: torch.dtype, gradient: bool) -> str | None:
        """Return the reason why FlexAttention cannot be used, or None."""
        if device_type == "cpu":
            return "FlexAttention has no backward pass on cpu" if gradient else None
        if device_type != "cuda":
            return f"FlexAttention is not used on {device_type}"
        return "FlexAttention has no float64 kernels" if dtype == torch.float64 else None

    def prepare(self, plan: AttentionPlan, device: torch.device) -> FlexTables:
        """Return the block mask and the positions of the tokens."""
        return flex_tables(plan, device)

    def attend(
        self, plan: AttentionPlan, prepared: FlexTables, context: KV | None, parts: Sequence[QKV]
    ) -> list[Tensor]:
        """Compute the attention of a layer."""
        queries = [part.query.flatten(0, 1) for part in parts]
        sources = ([] if context is None or not plan.context_tokens else [context]) + [
            KV(part.key, part.value) for rows, part in zip(plan.parts, parts, strict=True) if rows.has_own_keys
        ]
        keys, values = (
            torch.cat([x.flatten(0, 1).to(queries[0].dtype) for x in of_sources])
            for of_sources in zip(*sources, strict=True)
        )
        query = _padded(torch.cat(queries), prepared.queries, prepared.padded_queries)
        key, value = (_padded(x, prepared.keys, prepared.padded_keys) for x in (keys, values))
        output = load_flex_attention(query.device.type)(query, key, value, block_mask=prepared.mask)
        tokens = output[0].transpose(0, 1).index_select(0, prepared.queries)
        outputs = tokens.split([len(query) for query in queries])
        return [out.unflatten(0, part.query.shape[:2]) for out, part in zip(outputs, parts, strict=True)]


class _Placed(torch.autograd.Function):
    """Places tokens at positions of a longer sequence of zeros; torch's `index_copy` would save the tokens."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, positions: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(positions)
        return tokens.new_zeros(length, *tokens.shape[1:]).index_copy_(0, positions, tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (positions,) = ctx.saved_tensors
        return gradient.index_select(0, positions), None, None


def _padded(tokens: Tensor, positions: Tensor, length: int) -> Tensor:
    """Place tokens (tokens, heads, head width) in a padded sequence (1, heads, length, head width)."""
    placed: Tensor = _Placed.apply(tokens, positions, length)
    return placed.transpose(0, 1)[None]
