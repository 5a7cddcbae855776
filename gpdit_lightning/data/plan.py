"""The batch plan: which samples make up the global batch of an optimizer step, as a pure function of (seed, step).

Nothing here has state. Resuming is asking for a later step; the order is the same at every world size; every rank gets
the same shape and the same number of clips with context at the same moment.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from gpdit_lightning.errors import InputError

# First words of the counter-based generators' keys: every use of the seed draws from a stream of its own.
SAMPLE_ORDER, MICRO_BATCH_ORDER, TRAIN_NOISE, VALIDATION_NOISE, CLIP_LENGTH = range(5)


def generator(seed: int, purpose: int, *counter: int) -> np.random.Generator:
    """A counter-based generator: the same numbers for the same words on every machine, rank and worker.

    Args:
        seed: the run's.
        purpose: one of the constants above.
        counter: up to three further words.
    """
    words = [0, *counter, *[0] * (3 - len(counter))]
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=words))


@dataclass(frozen=True)
class PlannedSource:
    """What the plan knows of one source of samples.

    Attributes:
        name: for logs and messages.
        counts: samples in each bucket; a bucket is all samples of one latent shape.
        batch_size: samples per optimizer step over all ranks.
        micro_batches: equal parts into which that batch is cut, each of one shape.
        weight: of the mean loss over this source's batch, relative to the other sources'.
        lengths: for each bucket the numbers of latent frames that its samples are cut to, each for as many
            micro-batches as the others; empty: samples stay whole.
    """

    name: str
    counts: tuple[int, ...]
    batch_size: int
    micro_batches: int = 1
    weight: float = 1.0
    lengths: tuple[tuple[int, ...], ...] = ()

    @property
    def micro_batch_size(self) -> int:
        """Samples of one micro-batch over all ranks."""
        return self.batch_size // self.micro_batches


@dataclass(frozen=True)
class MicroBatch:
    """Samples that go through the network together, all of one shape.

    Attributes:
        source: index of the source in the plan.
        bucket: index of the bucket in the source.
        samples: (n,) indices into the bucket.
        places: (n,) place of each sample in the global batch of the optimizer step: the key of its noise.
        context: (n,) whether the sample keeps its context.
        weight: factor of this micro-batch's mean loss; the factors of an optimizer step sum to 1.
        frames: latent frames to keep from the start of every sample; None: all.
    """

    source: int
    bucket: int
    samples: np.ndarray
    places: np.ndarray
    context: np.ndarray
    weight: float
    frames: int | None = None

    def share(self, rank: int, world_size: int) -> "MicroBatch":
        """The equal slice of one rank, with the samples that keep their context first."""
        size = len(self.samples) // world_size
        places = np.arange(rank * size, (rank + 1) * size)
        places = places[np.argsort(~self.context[places], kind="stable")]
        return replace(self, samples=self.samples[places], places=self.places[places], context=self.context[places])


@dataclass(frozen=True)
class Plan:
    """The whole training order over a list of sources.

    Each source keeps its own epochs: all samples of a bucket are used once, in a new order, before any is used again,
    and what does not fill a micro-batch carries over to the next epoch. Sources therefore mix in the exact proportion
    of their batch sizes.

    Attributes:
        sources: what is mixed.
        seed: of every order.
        context_dropout: fraction of clips that lose their context, held exactly over time.
        max_ranks: equal parts of every micro-batch that are alike in shape and number of contexts; world sizes that
            divide it all see the same order.

    Raises:
        InputError: batch sizes that cannot be cut as asked, or a source without samples.
    """

    sources: tuple[PlannedSource, ...]
    seed: int = 0
    context_dropout: float = 0.1
    max_ranks: int = 1

    def __post_init__(self) -> None:
        if not self.sources:
            raise InputError("no source of data is in use: give `images` or `videos` a batch_size above 0.")
        if not 0 <= self.context_dropout <= 1:
            raise InputError(f"context_dropout is {self.context_dropout}; it must lie between 0 and 1.")
        for source in self.sources:
            if sum(source.counts) < 1:
                raise InputError(f"the source '{source.name}' holds no samples: prepare some, or set its batch_size 0.")
            if source.micro_batches < 1 or source.batch_size % (source.micro_batches * self.max_ranks):
                raise InputError(
                    f"the batch of {source.batch_size} {source.name} cannot be cut into {source.micro_batches} "
                    f"micro-batches for {self.max_ranks} ranks: make it a multiple of micro_batches x max_ranks."
                )
            if not source.weight > 0:
                raise InputError(f"the weight of '{source.name}' is {source.weight}; it must be positive.")

    @cached_property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of one optimizer step: the gradient accumulation of the trainer."""
        return sum(source.micro_batches for source in self.sources)

    def micro_batch(self, number: int) -> MicroBatch:
        """Micro-batch `number` of the run, counted over all optimizer steps from 0."""
        step, within = divmod(number, self.micro_batches_per_step)
        index = first_place = 0
        while within >= self.sources[index].micro_batches:
            within -= self.sources[index].micro_batches
            first_place += self.sources[index].batch_size
            index += 1
        source = self.sources[index]
        size = source.micro_batch_size
        own_number = step * source.micro_batches + within
        bucket, turn = _locate(self.seed, index, source.counts, size, own_number)
        return MicroBatch(
            source=index,
            bucket=bucket,
            samples=_stream(self.seed, index, bucket, source.counts[bucket], turn * size, size),
            places=first_place + within * size + np.arange(size),
            context=self._context(own_number, size),
            weight=source.weight / sum(s.weight for s in self.sources) / source.micro_batches,
            frames=self._length(index, bucket, turn),
        )

    def _length(self, source: int, bucket: int, turn: int) -> int | None:
        """Latent frames of a bucket's micro-batch: every length once, in random order, before any again."""
        if not self.sources[source].lengths:
            return None
        lengths = self.sources[source].lengths[bucket]
        cycle, place = divmod(turn, len(lengths))
        return int(generator(self.seed, CLIP_LENGTH, cycle, source, bucket).permutation(lengths)[place])

    def _context(self, own_number: int, size: int) -> np.ndarray:
        """Which samples of a micro-batch keep their context: the same number in each of the `max_ranks` parts.

        The samples stand in random order already, so the last ones of a part lose it; fractions carry over to the next
        micro-batch.
        """
        part = size // self.max_ranks
        share = self.context_dropout * part
        dropped = math.floor((own_number + 1) * share) - math.floor(own_number * share)
        return np.arange(size) % part < part - dropped


def _epoch_start(counts: tuple[int, ...], size: int, epoch: int) -> int:
    """Micro-batches before an epoch: each bucket gives what its samples so far fill, the rest carries over."""
    return sum(epoch * count // size for count in counts)


def _locate(seed: int, source: int, counts: tuple[int, ...], size: int, number: int) -> tuple[int, int]:
    """The bucket of a source's micro-batch, and which of that bucket's micro-batches it is."""
    low = number * size // sum(counts)  # an epoch gives at most sum(counts) / size micro-batches
    high = (number + len(counts) + 1) * size // sum(counts) + 1  # and together they lag by less than one per bucket
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _epoch_start(counts, size, middle) <= number else (low, middle)
    buckets, turns = _epoch(seed, source, counts, size, low)
    place = number - _epoch_start(counts, size, low)
    return int(buckets[place]), int(turns[place])


@lru_cache(maxsize=16)
def _epoch(seed: int, source: int, counts: tuple[int, ...], size: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """All micro-batches of an epoch in their order: their buckets, and their numbers within the bucket.

    The buckets are shuffled; a bucket's own micro-batches keep their sequence, for its samples are shuffled already and
    the rest of its last epoch must come first.
    """
    firsts = [epoch * count // size for count in counts]
    sizes = [(epoch + 1) * count // size - first for count, first in zip(counts, firsts, strict=True)]
    buckets = np.repeat(np.arange(len(counts)), sizes)
    buckets = generator(seed, MICRO_BATCH_ORDER, epoch, source).permutation(buckets)
    turns = np.empty_like(buckets)
    for bucket, first in enumerate(firsts):
        own = np.flatnonzero(buckets == bucket)
        turns[own] = first + np.arange(len(own))
    return buckets, turns


@lru_cache(maxsize=64)
def _permutation(seed: int, source: int, bucket: int, count: int, epoch: int) -> np.ndarray:
    return generator(seed, SAMPLE_ORDER, epoch, source, bucket).permutation(count)


def _stream(seed: int, source: int, bucket: int, count: int, start: int, size: int) -> np.ndarray:
    """`size` samples from position `start` of a bucket's endless stream of shuffled epochs."""
    epochs = range(start // count, (start + size - 1) // count + 1)
    joined = np.concatenate([_permutation(seed, source, bucket, count, epoch) for epoch in epochs])
    offset = start - epochs.start * count
    return joined[offset : offset + size]
