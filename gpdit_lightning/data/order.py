"""The order of a source's samples: an endless stream for each bucket, and how the buckets take turns.

All of it is a pure function of the seed and a position; caches save time and change nothing. Nothing here is as large
as the data: an epoch takes memory for its shards, a window for its samples, a round for its micro-batches.
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

LARGEST_ROUND = 65_536  # micro-batches that are shuffled together


@dataclass(frozen=True)
class ShuffledShards:
    """The shards of a bucket in the order of one epoch, and the windows that they form in it.

    Attributes:
        shards: (S,) their numbers.
        starts: (S + 1,) samples of the epoch before each of them, and in all.
        windows: (W + 1,) places in `shards` at which the windows begin, and S.
        window_starts: (W + 1,) samples of the epoch before each window, and in all.
    """

    shards: np.ndarray
    starts: np.ndarray
    windows: np.ndarray
    window_starts: np.ndarray

    def window_at(self, position: int) -> int:
        """The window of a sample of the epoch."""
        return int(np.searchsorted(self.window_starts, position, side="right")) - 1


class BucketOrder:
    """The endless stream of a bucket's samples, epoch after epoch, cut into micro-batches.

    In each epoch the shards are permuted. In that order they form windows, as few and as equal as whole shards allow,
    with at most about `window` samples each. The samples of a window are permuted together: what is read at a time
    stays within it. A bucket of at most `window` samples is one window.

    Args:
        seed: the run's.
        word: tells the bucket from all others of the plan.
        counts: samples of each shard, at least 1.
        sizes: samples of a micro-batch for each length that the bucket is read at; each comes once, in random order,
            before any comes again.
        window: most samples that are shuffled together, but for what is left of a shard.
    """

    def __init__(self, seed: int, word: int, counts: Sequence[int], sizes: Sequence[int], window: int) -> None:
        self.seed, self.word, self.sizes, self.window = seed, word, sizes, window
        self.firsts = np.cumsum([0, *counts])  # of each shard, the number of its first sample
        # Here, not for all buckets together: looking one up must not hash the counts of all shards.
        self.epoch = lru_cache(maxsize=2)(self._epoch)
        self.permuted = lru_cache(maxsize=2)(self._permuted)
        self.lengths = lru_cache(maxsize=2)(self._lengths)

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def cut(self, turn: int) -> tuple[int, int]:
        """The place in `sizes` of the bucket's micro-batch number `turn`, and its first position in the stream."""
        cycle, place = divmod(turn, len(self.sizes))
        lengths = self.lengths(cycle)
        return lengths[place], cycle * sum(self.sizes) + sum(self.sizes[length] for length in lengths[:place])

    def samples(self, position: int, size: int) -> np.ndarray:
        """(size,) samples from a position of the stream on, numbered through the shards as they were given."""
        parts = []
        while size:
            number, place = divmod(position, len(self))
            epoch = self.epoch(number)
            window = epoch.window_at(place)
            skipped = place - int(epoch.window_starts[window])
            part = self.permuted(number, window)[skipped : skipped + size]
            shard = np.searchsorted(epoch.starts, part, side="right") - 1
            parts.append(part - epoch.starts[shard] + self.firsts[epoch.shards[shard]])
            position, size = position + len(part), size - len(part)
        return np.concatenate(parts)

    def windows_from(self, position: int) -> Iterator[tuple[int, list[int]]]:
        """The window at a position of the stream and all that follow: where each begins, and its shards."""
        first, place = divmod(position, len(self))
        for number in count(first):
            epoch = self.epoch(number)
            for window in range(epoch.window_at(place) if number == first else 0, len(epoch.windows) - 1):
                begin, end = epoch.windows[window : window + 2]
                yield number * len(self) + int(epoch.window_starts[window]), epoch.shards[begin:end].tolist()

    def _epoch(self, number: int) -> ShuffledShards:
        counts = np.diff(self.firsts)
        shards = generator(self.seed, SHARD_ORDER, number, self.word).permutation(len(counts))
        starts = np.append(0, np.cumsum(counts[shards]))
        window_of = starts[:-1] * math.ceil(len(self) / self.window) // len(self)
        windows = np.append(np.flatnonzero(np.diff(window_of, prepend=-1)), len(counts))
        return ShuffledShards(shards, starts, windows, starts[windows])

    def _permuted(self, number: int, window: int) -> np.ndarray:
        """The samples of a window in their order, each as its position in the epoch before that."""
        positions = np.arange(*self.epoch(number).window_starts[window : window + 2])
        return generator(self.seed, SAMPLE_ORDER, number, self.word, window).permutation(positions)

    def _lengths(self, cycle: int) -> list[int]:
        """The order in which the sizes take turns."""
        return generator(self.seed, CLIP_LENGTH, cycle, self.word).permutation(len(self.sizes)).tolist()


class SourceOrder:
    """The endless sequence of a source's micro-batches, in which its buckets take turns by their numbers of samples.

    An epoch is cut into rounds, since one of a large source has more micro-batches than should be listed. By the end of
    a round each bucket has given the micro-batches that its part of the samples fills, on the average over its lengths;
    what does not fill one carries over. A round's micro-batches are shuffled; those of one bucket keep their sequence.

    Args:
        seed: the run's.
        source: number of the source in the plan.
        buckets: its buckets.

    Attributes:
        largest: samples of its largest micro-batch.
    """

    def __init__(self, seed: int, source: int, buckets: Sequence[BucketOrder]) -> None:
        self.seed, self.source, self.buckets = seed, source, buckets
        self.largest = max(max(bucket.sizes) for bucket in buckets)
        filled = [Fraction(len(bucket) * len(bucket.sizes), sum(bucket.sizes)) for bucket in buckets]
        self.micro_batches_per_epoch = sum(filled, Fraction())
        rounds = max(1, math.ceil(self.micro_batches_per_epoch / LARGEST_ROUND))
        self.micro_batches_per_round = self.micro_batches_per_epoch / rounds
        self.rates = [(fill / rounds).as_integer_ratio() for fill in filled]  # of each bucket's micro-batches by rounds
        self.shuffled = lru_cache(maxsize=2)(self._shuffled)

    def at(self, number: int) -> tuple[int, list[int]]:
        """The bucket of a micro-batch, and how many micro-batches each bucket has given before it."""
        # Before a round there are at most `micro_batches_per_round` for each of those before, and less by below one for
        # each bucket.
        low = int(number // self.micro_batches_per_round)
        high = int((number + len(self.buckets)) // self.micro_batches_per_round) + 1
        current = low - 1 + bisect_right(range(low, high), number, key=lambda other: sum(self._given(other)))
        given, buckets = self._given(current), self.shuffled(current)
        place = number - sum(given)
        within = np.bincount(buckets[:place], minlength=len(given)).tolist()
        return int(buckets[place]), [before + more for before, more in zip(given, within, strict=True)]

    def _given(self, number: int) -> list[int]:
        """Micro-batches that each bucket has given before a round."""
        return [number * above // below for above, below in self.rates]

    def _shuffled(self, number: int) -> np.ndarray:
        """The buckets of a round's micro-batches in their order."""
        amounts = np.subtract(self._given(number + 1), self._given(number))
        buckets = np.repeat(np.arange(len(self.buckets)), amounts)
        return generator(self.seed, MICRO_BATCH_ORDER, number, self.source).permutation(buckets)
