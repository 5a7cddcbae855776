"""The batch plan: the samples of each optimizer step's global batch, as a pure function of (seed, step).

The plan has no state. To resume is to start at a later step. The order is the same at every world size, and in every
micro-batch all ranks have the same shape and the same number of clips with context.

Example: images of two sizes, in shards of 3 and 2 samples (wide) and of 4 (high), and clips cut to 3 latent frames, in
a shard of 10. The samples of one size form a bucket; each micro-batch is drawn from one bucket:

    >>> wide, high = PlannedBucket((3, 2), (1,), height=4, width=8), PlannedBucket((4,), (1,), height=8, width=4)
    >>> images = PlannedSource("images", (wide, high), SourceConfig(batch_size=4, micro_batches=2))
    >>> videos = PlannedSource("videos", (PlannedBucket((10,), (3,), 4, 4),), SourceConfig(batch_size=4))
    >>> plan = Plan((images, videos), seed=0, context_dropout=0.5, max_ranks=2)
    >>> for batch in map(plan.micro_batch, range(plan.micro_batches_per_step)):  # of step 0
    ...     print(plan.sources[batch.source].name, batch.bucket, batch.samples.tolist(), batch.positions.tolist())
    images 0 [4, 1] [0, 1]
    images 1 [0, 2] [2, 3]
    videos 0 [3, 1, 5, 2] [4, 5, 6, 7]
    >>> shares = [batch.share(rank, world_size=2) for rank in (0, 1)]  # the last micro-batch, divided among two ranks
    >>> [(share.samples.tolist(), share.context.tolist()) for share in shares]
    [([3, 1], [True, False]), ([5, 2], [True, False])]

Samples are numbered through the shards of their bucket, positions through the global batch of the step. With
`context_dropout=0.5` half of the clips of each rank have no context.

With `sampling="alternate"` an optimizer step uses one source. Weights of 2 and 1 give images two steps of three; the
order of the samples within a source is the same as above:

    >>> weighted = (replace(images, config=replace(images.config, weight=2.0, micro_batches=1)), videos)
    >>> plan = Plan(weighted, seed=0, context_dropout=0.5, max_ranks=2, sampling="alternate")
    >>> [plan.sources[batch.source].name for batch in map(plan.micro_batch, range(6))]
    ['images', 'images', 'videos', 'images', 'images', 'videos']
"""

import math
from bisect import bisect_right
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, islice
from typing import Any, Literal, get_args

import numpy as np

from gpdit_lightning.data.order import BucketOrder, SourceOrder
from gpdit_lightning.data.source import SourceConfig
from gpdit_lightning.errors import InputError

Sampling = Literal["joint", "alternate"]


@dataclass(frozen=True)
class PlannedBucket:
    """Counts and shape of a bucket: samples of a source with one height and width that are cut to the same lengths.

    Attributes:
        counts: samples of each shard, at least 1.
        lengths: numbers of latent frames that samples are cut to, each in equally many micro-batches.
        height: height of a latent frame, in latent pixels.
        width: width of a latent frame, in latent pixels.
    """

    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    height: int
    width: int


@dataclass(frozen=True)
class PlannedSource:
    """A source of samples, as input of the plan and of the estimates of memory and FLOPs.

    Attributes:
        name: name for logs and messages.
        buckets: buckets of the source; each micro-batch is drawn from one of them.
        config: its options in the recipe.
        patch_size: side of the square patch of latent pixels that is one token.
    """

    name: str
    buckets: tuple[PlannedBucket, ...]
    config: SourceConfig
    patch_size: int = 2

    def micro_batch_size(self, frames: int, height: int, width: int, max_ranks: int) -> int:
        """Return the samples of a micro-batch over all ranks, a multiple of `max_ranks`.

        Args:
            frames: latent frames of a sample.
            height: height in latent pixels.
            width: width in latent pixels.
            max_ranks: equal parts of the micro-batch.

        Raises:
            InputError: the batch size is not a multiple of micro_batches x max_ranks, or the token budget is too small
                for one sample on each rank.
        """
        config = self.config
        parts = config.micro_batches * max_ranks
        if config.batch_size % parts:
            raise InputError(
                f"data.{self.name}.batch_size is {config.batch_size}, which is no multiple of micro_batches x "
                f"data.max_ranks = {config.micro_batches} x {max_ranks}: make it a multiple, or lower one of these."
            )
        if config.batch_size:
            return config.batch_size // config.micro_batches
        pixels, pixel_budget = parts * frames * height * width, config.tokens * self.patch_size**2
        if pixel_budget < pixels:
            raise InputError(
                f"data.{self.name}.tokens is {config.tokens}, too few for one sample of {frames}x{height}x{width} "
                f"latent pixels in each of {config.micro_batches} micro-batches on each of {max_ranks} ranks: give at "
                f"least {math.ceil(pixels / self.patch_size**2)}, or lower micro_batches or max_ranks."
            )
        return pixel_budget // pixels * max_ranks


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one forward and backward pass, all of one shape.

    Attributes:
        source: index of the source in the plan.
        bucket: index of the bucket in the source.
        samples: (n,) indices into the bucket.
        positions: (n,) position of each sample in the global batch of the optimizer step, which keys its noise.
        context: (n,) whether the sample keeps its context.
        weight: factor of the mean loss of this micro-batch; the factors of an optimizer step sum to 1.
        frames: latent frames to keep from the start of every sample.
        counts: whether the samples count; False for a rank without samples of a small micro-batch, which computes
            one of another rank, so that all ranks compute equally often.
    """

    source: int
    bucket: int
    samples: np.ndarray
    positions: np.ndarray
    context: np.ndarray
    weight: float
    frames: int
    counts: bool = True

    def share(self, rank: int, world_size: int) -> "MicroBatch":
        """Return the share of one rank, samples with context first: equal shares, if the samples divide into them."""
        first, stop = (number * len(self.samples) // world_size for number in (rank, rank + 1))
        chosen = np.arange(first, max(stop, first + 1))
        chosen = chosen[np.argsort(~self.context[chosen], kind="stable")]
        return replace(
            self,
            samples=self.samples[chosen],
            positions=self.positions[chosen],
            context=self.context[chosen],
            counts=stop > first,
        )


@dataclass(frozen=True)
class Plan:
    """The order of training over a list of sources.

    Each bucket has its epochs: all samples are used once, in a new order, before any is repeated, and a remainder that
    does not fill a micro-batch carries over to the next epoch. So sources mix in exact proportions: `joint` sampling
    takes a batch of every source in each optimizer step, and `alternate` takes all micro-batches of a step from one
    source, which has a fraction of the steps that is proportional to its weight.

    Attributes:
        sources: the sources of the mixture.
        seed: seed of all random orders.
        context_dropout: fraction of clips without context; the number dropped so far differs from the exact fraction
            by less than one clip per part.
        max_ranks: equal parts of every micro-batch, alike in shape and in the number of clips with context. The order
            is the same at every world size that divides it.
        sampling: how the sources share the optimizer steps.

    Raises:
        InputError: a setting is out of range, a batch cannot be divided, a source has no samples, or alternating
            sources have different numbers of micro-batches.
    """

    sources: tuple[PlannedSource, ...]
    seed: int = 0
    context_dropout: float = 0.1
    max_ranks: int = 1
    sampling: Sampling = "joint"

    def __post_init__(self) -> None:
        if not self.sources:
            raise InputError("no source of data is in use: give one of them a batch_size above 0.")
        if not 0 <= self.context_dropout <= 1:
            raise InputError(f"context_dropout is {self.context_dropout}; it must lie between 0 and 1.")
        for source in self.sources:
            if not source.buckets:
                raise InputError(
                    f"the source '{source.name}' holds no samples: prepare some, or set its batch_size to 0."
                )
            config = source.config
            if (config.batch_size > 0) == (config.tokens > 0):
                raise InputError(
                    f"data.{source.name} has batch_size = {config.batch_size} and tokens = {config.tokens}: give one "
                    "of them, and 0 for the other."
                )
            config.check(source.name)
            shapes = [(max(bucket.lengths), bucket.height, bucket.width) for bucket in source.buckets]
            source.micro_batch_size(*max(shapes, key=math.prod), self.max_ranks)  # raises if it cannot be divided
        self._check_sampling()

    def _check_sampling(self) -> None:
        if self.sampling not in get_args(Sampling):
            raise InputError(f"data.sampling is {self.sampling}: choose one of {', '.join(get_args(Sampling))}.")
        if self.sampling == "alternate" and len({source.config.micro_batches for source in self.sources}) > 1:
            given = " and ".join(f"data.{s.name}.micro_batches = {s.config.micro_batches}" for s in self.sources)
            raise InputError(
                f"data.sampling is alternate, where all optimizer steps have the same number of micro-batches, but the "
                f"recipe has {given}: give all sources the same number, or set data.sampling to joint."
            )

    def __getstate__(self) -> dict[str, Any]:
        # Without the cached properties, which the receiver computes again.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def micro_batches_per_step(self) -> int:
        """The number of micro-batches per optimizer step, which is the gradient accumulation of the trainer."""
        if self.sampling == "alternate":
            return self.sources[0].config.micro_batches
        return sum(source.config.micro_batches for source in self.sources)

    @cached_property
    def step_shares(self) -> tuple[Fraction, ...]:
        """The fraction of the optimizer steps that use each source."""
        if self.sampling == "joint":
            return (Fraction(1),) * len(self.sources)
        return tuple(weight / sum(self._weights) for weight in self._weights)

    @cached_property
    def _weights(self) -> tuple[Fraction, ...]:
        """The weights of the sources as written in decimal, so that 0.1 is exactly a tenth."""
        return tuple(Fraction(str(source.config.weight)) for source in self.sources)

    def micro_batch(self, number: int) -> MicroBatch:
        """Return micro-batch `number` of the run, counted over all optimizer steps from 0."""
        index, earlier = self._locate(number)
        source, order = self.sources[index], self._orders[index]
        within = earlier[index] % source.config.micro_batches
        reserved = zip(self.sources[:index], self._orders[:index], strict=True)
        first_position = sum(other.config.micro_batches * other_order.largest for other, other_order in reserved)
        bucket, counts = order.locate(earlier[index])
        next_batches = [other.locate(count) for other, count in zip(order.buckets, counts, strict=True)]
        length, position = next_batches[bucket]
        size = order.buckets[bucket].sizes[length]
        return MicroBatch(
            source=index,
            bucket=bucket,
            samples=order.buckets[bucket].samples(position, size),
            # Positions are reserved for the largest micro-batch, so that they are unique within a step.
            positions=first_position + within * order.largest + np.arange(size),
            context=self._context(sum(samples for _, samples in next_batches), size),
            weight=self.weight_in_step(source) / source.config.micro_batches,
            frames=source.buckets[bucket].lengths[length],
        )

    def samples(self, source: int, bucket: int, position: int, size: int) -> np.ndarray:
        """Return (size,) samples from a position of the order of a bucket on, whose first epoch begins at 0."""
        return self._orders[source].buckets[bucket].samples(position, size)

    def shards_ahead(self, number: int) -> list[tuple[int, int, int]]:
        """Return the shards to fetch for micro-batch `number` and later ones, in the order in which they are needed.

        Returns:
            (source, bucket, shard) of all shards in the current window and the next window of each bucket. No other
            shard is read before a bucket reaches the window after these.
        """
        _, earlier = self._locate(number)
        windows = []
        for index, (source, order) in enumerate(zip(self.sources, self._orders, strict=True)):
            _, counts = order.locate(earlier[index])
            per_step = source.config.micro_batches * self.step_shares[index]
            steps_per_epoch = float(order.micro_batches_per_epoch / per_step)
            for bucket, (bucket_order, count) in enumerate(zip(order.buckets, counts, strict=True)):
                _, position = bucket_order.locate(count)
                for start, shards in islice(bucket_order.windows_from(position), 2):
                    steps_until_start = max(0, start - position) / len(bucket_order) * steps_per_epoch
                    windows.append((steps_until_start, [(index, bucket, shard) for shard in shards]))
        windows.sort(key=lambda window: window[0])
        return list(dict.fromkeys(shard for _, shards in windows for shard in shards))

    def weight_in_step(self, source: PlannedSource) -> float:
        """Return the weight of a source's mean loss in the loss of an optimizer step that uses it."""
        if self.sampling == "alternate":
            return 1.0
        return source.config.weight / sum(other.config.weight for other in self.sources)

    def _locate(self, number: int) -> tuple[int, list[int]]:
        """Return the source of micro-batch `number`, and the number of earlier micro-batches of each source."""
        step, within = divmod(number, self.micro_batches_per_step)
        if self.sampling == "alternate":
            index, steps = self._source_of_step(step)
            earlier = [count * self.micro_batches_per_step for count in steps]
            earlier[index] += within
            return index, earlier
        sizes = [source.config.micro_batches for source in self.sources]
        ends = list(accumulate(sizes))
        earlier = [step * size + min(max(within - end + size, 0), size) for size, end in zip(sizes, ends, strict=True)]
        return bisect_right(ends, within), earlier

    def _source_of_step(self, step: int) -> tuple[int, list[int]]:
        """Return the source of an optimizer step of alternating sources, and the number of earlier steps of each.

        The first source has the steps at which ceil(step x share) increases. The second divides the remaining steps in
        the same way, and so on. So if the weights are proportional to integers with the sum n, each source has exactly
        its number of steps in any n consecutive ones.
        """
        index, counts, remaining = len(self.sources), [], sum(self._weights)
        for number, weight in enumerate(self._weights):
            share = weight / remaining
            counts.append(math.ceil(step * share))
            if math.ceil((step + 1) * share) > counts[-1]:
                index = min(index, number)
            step, remaining = step - counts[-1], remaining - weight
        return index, counts

    @cached_property
    def _orders(self) -> list[SourceOrder]:
        orders = []
        for index, source in enumerate(self.sources):
            buckets = []
            for number, bucket in enumerate(source.buckets):
                shapes = [(frames, bucket.height, bucket.width) for frames in bucket.lengths]
                sizes = [source.micro_batch_size(*shape, self.max_ranks) for shape in shapes]
                bucket_id = index << 32 | number  # one integer, since a generator's key has room for one only
                buckets.append(BucketOrder(self.seed, bucket_id, bucket.counts, sizes, source.config.shuffle_window))
            orders.append(SourceOrder(self.seed, index, buckets))
        return orders

    def _context(self, samples_before: int, size: int) -> np.ndarray:
        """Return (size,) whether each sample keeps its context: equally many in each of the `max_ranks` parts.

        The last samples of a part lose it, since samples are in random order already. Fractions carry over to the next
        micro-batch.

        Args:
            samples_before: samples of the source in earlier micro-batches.
            size: samples of this micro-batch.
        """
        before, part = samples_before // self.max_ranks, size // self.max_ranks
        dropped = math.floor((before + part) * self.context_dropout) - math.floor(before * self.context_dropout)
        return np.arange(size) % part < part - dropped
