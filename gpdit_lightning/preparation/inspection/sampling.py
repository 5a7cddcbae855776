"""Selection of samples to read."""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from gpdit_lightning.data.manifest import ShardEntry


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
    """Select `count` samples, equally many from each bucket (kind, shape and split) if it has enough."""
    buckets: dict[tuple[Any, ...], list[ShardEntry]] = defaultdict(list)
    for entry in shards:
        buckets[entry.kind, entry.shape, entry.split].append(entry)
    remaining = {bucket: sum(entry.count for entry in entries) for bucket, entries in sorted(buckets.items())}
    shares: Counter[tuple[Any, ...]] = Counter()
    while remaining and shares.total() < count:
        for bucket in list(remaining)[: count - shares.total()]:
            shares[bucket] += 1
            remaining[bucket] -= 1
            if not remaining[bucket]:
                del remaining[bucket]
    return [sample for bucket, share in shares.items() for sample in evenly_spaced(buckets[bucket], share)]
