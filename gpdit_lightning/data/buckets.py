"""Buckets: samples of one size, read from their shards, with intact samples in place of damaged ones."""

import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from gpdit_lightning.data.cache import ShardCache
from gpdit_lightning.data.manifest import Folder, Manifest
from gpdit_lightning.data.plan import PlannedBucket
from gpdit_lightning.data.shard_entry import PREPARE_AGAIN, ShardEntry
from gpdit_lightning.data.shards import DamagedSampleError, DamagedShardError, ShardReader
from gpdit_lightning.errors import InputError

log = logging.getLogger(__name__)

MAX_DAMAGED_IN_A_ROW = 1000  # samples, of which each is read before the next one replaces it


class LoadedSample(NamedTuple):
    """A sample read from a shard.

    Attributes:
        latents: (F, C, H, W) raw, float16; the means of the codec's posterior.
        metadata: metadata of the sample.
        damaged: names of the damaged samples that it replaces; usually empty.
        std: (F, C, H, W) float16, the standard deviations of the posterior; None if they are not stored.
    """

    latents: np.ndarray
    metadata: dict[str, Any]
    damaged: tuple[str, ...]
    std: np.ndarray | None = None


class Bucket:
    """The shards of all samples of a source with one height and width that are cut to the same lengths.

    It holds only the entries of the shards, of which there may be tens of thousands.

    Args:
        shards: shards, each with the manifest that lists it.
        lengths: numbers of latent frames that samples are cut to.
        cache: cache for copies of remote shards.
    """

    def __init__(
        self, shards: Sequence[tuple[Manifest, ShardEntry]], lengths: Sequence[int], cache: ShardCache | None = None
    ) -> None:
        self.cache = cache
        self.shards = [(manifest.directory, entry) for manifest, entry in shards]
        self.lengths = tuple(lengths)
        self.height, self.width = self.shards[0][1].shape[2:]
        self.starts = [0, *accumulate(self.counts)]

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def counts(self) -> tuple[int, ...]:
        """The samples of each shard."""
        return tuple(entry.count for _, entry in self.shards)

    @property
    def planned(self) -> PlannedBucket:
        """The bucket as an input of the batch plan."""
        return PlannedBucket(self.counts, self.lengths, self.height, self.width)

    @property
    def frames(self) -> int:
        """The largest number of latent frames that samples are cut to."""
        return max(self.lengths)

    def read(self, sample: int, frames: int | None = None, flipped: bool = False) -> LoadedSample:
        """Read the first latent frames of a sample.

        A damaged one is replaced by the next intact sample of its shard, after the last one the first; if none is
        intact, by one of the following shards.

        Args:
            sample: number of the sample in the bucket.
            frames: number of latent frames; None for the largest.
            flipped: whether to read the latents of the flipped clip, if they are stored.

        Raises:
            InputError: no sample of the bucket is intact, or too many in a row are damaged.
        """
        damaged: list[str] = []
        unusable: ShardReader | None = None
        for reader, number in self._candidates(sample):
            if reader is unusable:
                continue
            try:
                arrays, metadata = reader.read_arrays(number, frames or self.frames)
            except DamagedSampleError as error:
                damaged.append(f"sample {number} of {reader.path}")
                _warn_once(f"{error} It is replaced by the next intact sample.")
                if len(damaged) == MAX_DAMAGED_IN_A_ROW:
                    raise InputError(f"{len(damaged)} samples in a row are damaged; the last: {error}") from None
                unusable = reader if isinstance(error, DamagedShardError) else None
                continue
            if flipped and reader.entry.has_flips:
                return LoadedSample(arrays["flipped_mean"], metadata, tuple(damaged), arrays.get("flipped_std"))
            return LoadedSample(arrays["mean"], metadata, tuple(damaged), arrays.get("std"))
        raise InputError(
            f"no sample of {self.height}x{self.width} latent pixels in {reader.path.parent} is intact: copy the folder "
            f"again or {PREPARE_AGAIN}."
        )

    def _candidates(self, sample: int) -> Iterator[tuple[ShardReader, int]]:
        """Yield the samples that may be read in place of a sample, itself first: their readers and numbers."""
        shard = bisect_right(self.starts, sample) - 1
        first = sample - self.starts[shard]
        for offset in range(len(self.shards)):
            reader = _reader(*self.shards[(shard + offset) % len(self.shards)], self.cache)
            yield from ((reader, (first + number) % len(reader)) for number in range(len(reader)))
            first = 0


@lru_cache(maxsize=128)
def _reader(directory: Folder, entry: ShardEntry, cache: ShardCache | None) -> ShardReader:
    """Return the reader of a shard; cached in a limited number, since each keeps two files open."""
    return ShardReader(directory, entry, cache)


@cache
def _warn_once(message: str) -> None:
    """Log a warning once per process: a damaged sample is read again in every epoch."""
    log.warning("%s", message)
