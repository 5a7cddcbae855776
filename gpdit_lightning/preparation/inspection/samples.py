"""Which samples to look at, where there are too many to look at all."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from gpdit_lightning.data.manifest import ShardEntry


def spread(shards: Sequence[ShardEntry], most: int) -> list[tuple[ShardEntry, int]]:
    """At most so many samples, at even distances among all samples of the shards: each one's shard and number."""
    ends = list(accumulate(shard.count for shard in shards))
    total = ends[-1] if ends else 0
    count = min(most, total)
    chosen = []
    for place in ((2 * i + 1) * total // (2 * count) for i in range(count)):
        shard = bisect_right(ends, place)
        chosen.append((shards[shard], place - ends[shard] + shards[shard].count))
    return chosen
