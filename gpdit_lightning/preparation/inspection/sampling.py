"""Which samples to read, where there are too many to read all."""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from gpdit_lightning.data.manifest import ShardEntry


def evenly_spaced(shards: Sequence[ShardEntry], most: int) -> list[tuple[ShardEntry, int]]:
    """At most `most` samples, evenly spaced over all samples of the shards: the shard and the number of each."""
    ends = list(accumulate(shard.count for shard in shards))
    total = ends[-1] if ends else 0
    count = min(most, total)
    samples = []
    for position in ((2 * i + 1) * total // (2 * count) for i in range(count)):
        shard = bisect_right(ends, position)
        samples.append((shards[shard], position - ends[shard] + shards[shard].count))
    return samples


def balanced(shards: Sequence[ShardEntry], count: int) -> list[tuple[ShardEntry, int]]:
    """`count` samples, equally many of each bucket (kind, shape and split) as far as it has them."""
    buckets: dict[tuple[Any, ...], list[ShardEntry]] = defaultdict(list)
    for entry in shards:
        buckets[entry.kind, entry.shape, entry.split].append(entry)
    left = {bucket: sum(entry.count for entry in entries) for bucket, entries in sorted(buckets.items())}
    shares: Counter[tuple[Any, ...]] = Counter()
    while left and shares.total() < count:
        for bucket in list(left)[: count - shares.total()]:
            shares[bucket] += 1
            left[bucket] -= 1
            if not left[bucket]:
                del left[bucket]
    return [sample for bucket, share in shares.items() for sample in evenly_spaced(buckets[bucket], share)]
