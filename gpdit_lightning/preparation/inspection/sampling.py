"""Selection of samples to read."""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from gpdit_lightning.data.shard_entry import ShardEntry


def evenly_spaced(shards: Sequence[ShardEntry], max_count: int) -> list[tuple[ShardEntry, int]]:
    """Select at most `max_count` samples, evenly spaced over all samples of the shards, as shard and number."""
    ends = list(accumulate(shard.count for shard in shards))
    total = ends[-1] if ends else 0
    count = min(max_count, total)
    samples = []
    for position in ((2 * i + 1) * total // (2 * count) for i in range(count)):
        shard = bisect_right(ends, position)
        samples.append((shards[shard], position - ends[shard] + shards[shard].count))
    return samples


def balanced(shards: Sequence[ShardEntry], count: int) -> list[tuple[ShardEntry, int]]:
    """Select `count` samples, equally many from each group of one kind, shape and split, if it has enough."""
    groups: dict[tuple[Any, ...], list[ShardEntry]] = defaultdict(list)
    for entry in shards:
        groups[entry.kind, entry.shape, entry.split].append(entry)
    remaining = {group: sum(entry.count for entry in entries) for group, entries in sorted(groups.items())}
    shares: Counter[tuple[Any, ...]] = Counter()
    while remaining and shares.total() < count:
        for group in list(remaining)[: count - shares.total()]:
            shares[group] += 1
            remaining[group] -= 1
            if not remaining[group]:
                del remaining[group]
    return [sample for group, share in shares.items() for sample in evenly_spaced(groups[group], share)]
