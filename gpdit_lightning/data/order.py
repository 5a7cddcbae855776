"""Order of the samples of a source: an endless stream for each bucket, and the sequence of the buckets.

Everything is a pure function of the seed and a position; the caches change no result. Memory is needed for the shards
of an epoch, the samples of a window and the micro-batches of a round, never for all samples of the data.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import count

import numpy as np

from gpdit_lightning.randomness import CLIP_LENGTH, MICRO_BATCH_ORDER, SAMPLE_ORDER, SHARD_ORDER, generator

MAX_ROUND = 65_536  # micro-batches that are shuffled together


@dataclass(frozen=True)
class ShuffledShards:
    """The S shards of a bucket in the order of one epoch, divided into W windows.

    Attributes:
        shards: (S,) shard numbers, in the order of the epoch.
        starts: (S + 1,) position in the epoch of the first sample of each shard, and the number of samples.
        windows: (W + 1,) index into `shards` of the first shard of each window, and S.
        window_starts: (W + 1,) position in the epoch of the first sample of each window, and the number of samples.
    """

    shards: np.ndarray
    starts: np.ndarray
    windows: np.ndarray
    window_starts: np.ndarray

    def window_at(self, position: int) -> int:
        """Return the window that contains a position of the epoch."""
        return int(np.searchsorted(self.window_starts, position, side="right")) - 1


class BucketOrder:
    """Endless stream of the samples of a bucket, epoch after epoch, cut into micro-batches.

    In each epoch the shards are permuted. Consecutive shards form windows, as few and as equal in size as whole shards
    allow, with at most about `window` samples each. The samples of a window are permuted together, so that reads stay
    within one window at a time. A bucket of at most `window` samples is one window.

    Args:
        seed: seed of the run.
        bucket_id: number that is unique to the bucket within the plan.
        counts: samples of each shard, at least 1.
        sizes: samples of a micro-batch, for each clip length of the bucket. Each length is used once, in random order,
            before any is repeated.
        window: most samples that are shuffled together, up to the rest of a shard.
    """

    def __init__(self, seed: int, bucket_id: int, counts: Sequence[int], sizes: Sequence[int], window: int) -> None:
        self.seed, self.bucket_id, self.sizes, self.window = seed, bucket_id, sizes, window
        self.shard_starts = np.cumsum([0, *counts])  # number of the first sample of each shard
        # Caches of the instance: as caches of the methods, they would hash the counts of all shards at each lookup.
        self.epoch = lru_cache(maxsize=2)(self._epoch)
        self.window_order = lru_cache(maxsize=2)(self._window_order)
        self.length_order = lru_cache(maxsize=2)(self._length_order)

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    def locate(self, number: int) -> tuple[int, int]:
        """Return the length, as an index into `sizes`, and the first stream position of the bucket's `number`-th batch.

        Args:
            number: index of a micro-batch among those of this bucket, from 0.
        """
        cycle, index = divmod(number, len(self.sizes))
        lengths = self.length_order(cycle)
        return lengths[index], cycle * sum(self.sizes) + sum(self.sizes[length] for length in lengths[:index])

    def samples(self, position: int, size: int) -> np.ndarray:
        """Return `size` samples from a position of the stream on, as (size,) numbers through the shards as given."""
        parts = []
        while size:
            number, offset = divmod(position, len(self))
            epoch = self.epoch(number)
            window = epoch.window_at(offset)
            skipped = offset - int(epoch.window_starts[window])
            part = self.window_order(number, window)[skipped : skipped + size]
            shard = np.searchsorted(epoch.starts, part, side="right") - 1
            parts.append(part - epoch.starts[shard] + self.shard_starts[epoch.shards[shard]])
            position, size = position + len(part), size - len(part)
        return np.concatenate(parts)

    def windows_from(self, position: int) -> Iterator[tuple[int, list[int]]]:
        """Yield the window at a stream position and all later ones: the first position of each, and its shards."""
        first, offset = divmod(position, len(self))
        for number in count(first):
            epoch = self.epoch(number)
            for window in range(epoch.window_at(offset) if number == first else 0, len(epoch.windows) - 1):
                begin, end = epoch.windows[window : window + 2]
                yield number * len(self) + int(epoch.window_starts[window]), epoch.shards[begin:end].tolist()

    def _epoch(self, number: int) -> ShuffledShards:
        counts = np.diff(self.shard_starts)
        shards = generator(self.seed, SHARD_ORDER, number, self.bucket_id).permutation(len(counts))
        starts = np.append(0, np.cumsum(counts[shards]))
        window_of_shard = starts[:-1] * math.ceil(len(self) / self.window) // len(self)
        windows = np.append(np.flatnonzero(np.diff(window_of_shard, prepend=-1)), len(counts))
        return ShuffledShards(shards, starts, windows, starts[windows])

    def _window_order(self, number: int, window: int) -> np.ndarray:
        """Return the permuted samples of a window of epoch `number`, as positions in the epoch before permutation."""
        positions = np.arange(*self.epoch(number).window_starts[window : window + 2])
        return generator(self.seed, SAMPLE_ORDER, number, self.bucket_id, window).permutation(positions)

    def _length_order(self, cycle: int) -> list[int]:
        """Return the order of the lengths in a cycle, which uses each of them once."""
        return generator(self.seed, CLIP_LENGTH, cycle, self.bucket_id).permutation(len(self.sizes)).tolist()


class SourceOrder:
    """Endless sequence of the micro-batches of a source, from its buckets in proportion to their samples.

    An epoch is divided into rounds, so that no list is as long as an epoch of a large source. In each round a bucket
    has the micro-batches that its share of the samples fills, on average over its lengths; fractions of a micro-batch
    carry over to the next round. The micro-batches of a round are shuffled; those of one bucket keep their order.

    Args:
        seed: seed of the run.
        source: index of the source in the plan.
        buckets: buckets of the source.

    Attributes:
        largest: samples of the largest micro-batch.
    """

    def __init__(self, seed: int, source: int, buckets: Sequence[BucketOrder]) -> None:
        self.seed, self.source, self.buckets = seed, source, buckets
        self.largest = max(max(bucket.sizes) for bucket in buckets)
        per_epoch = [Fraction(len(bucket) * len(bucket.sizes), sum(bucket.sizes)) for bucket in buckets]
        self.micro_batches_per_epoch = sum(per_epoch, Fraction())
        rounds = max(1, math.ceil(self.micro_batches_per_epoch / MAX_ROUND))
        self.micro_batches_per_round = self.micro_batches_per_epoch / rounds
        self.ratios = [(number / rounds).as_integer_ratio() for number in per_epoch]  # per round, of each bucket
        self.round_order = lru_cache(maxsize=2)(self._round_order)

    def locate(self, number: int) -> tuple[int, list[int]]:
        """Return the bucket of micro-batch `number` of the source, and the earlier micro-batches of each bucket."""
        # With m micro-batches per round and B buckets: before round r bucket b has had floor(r * ratio_b)
        # micro-batches, so the sum lies in (r m - B, r m]; bisect the rounds in that range.
        low = int(number // self.micro_batches_per_round)
        high = int((number + len(self.buckets)) // self.micro_batches_per_round) + 1
        current = low - 1 + bisect_right(range(low, high), number, key=lambda other: sum(self._counts_before(other)))
        counts, buckets = self._counts_before(current), self.round_order(current)
        index = number - sum(counts)
        within = np.bincount(buckets[:index], minlength=len(counts)).tolist()
        return int(buckets[index]), [before + more for before, more in zip(counts, within, strict=True)]

    def _counts_before(self, round_number: int) -> list[int]:
        """Return the number of micro-batches of each bucket before a round."""
        return [round_number * numerator // denominator for numerator, denominator in self.ratios]

    def _round_order(self, round_number: int) -> np.ndarray:
        """Return the buckets of the micro-batches of a round, shuffled."""
        counts = np.subtract(self._counts_before(round_number + 1), self._counts_before(round_number))
        buckets = np.repeat(np.arange(len(self.buckets)), counts)
        return generator(self.seed, MICRO_BATCH_ORDER, round_number, self.source).permutation(buckets)
