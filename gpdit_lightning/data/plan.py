"""The batch plan: which samples make up the global batch of an optimizer step, as a pure function of (seed, step).

The plan has no state. To resume is to start at a later step; the order is the same at every world size; at every
micro-batch all ranks have the same shape and the same number of clips with context.

An example: images of two sizes, in shards of 3, 2 and 4, and clips that are cut to 3 latent frames. Samples of one
size are a bucket, and a micro-batch comes from one bucket:

    >>> wide, high = PlannedBucket((3, 2), (1,), height=4, width=8), PlannedBucket((4,), (1,), height=8, width=4)
    >>> images = PlannedSource("images", (wide, high), batch_size=4, micro_batches=2)
    >>> videos = PlannedSource("videos", (PlannedBucket((10,), (3,), 4, 4),), batch_size=4)
    >>> plan = Plan((images, videos), seed=0, context_dropout=0.5, max_ranks=2)
    >>> for batch in map(plan.micro_batch, range(plan.micro_batches_per_step)):  # of step 0
    ...     print(plan.sources[batch.source].name, batch.bucket, batch.samples.tolist(), batch.places.tolist())
    images 0 [4, 1] [0, 1]
    images 1 [0, 2] [2, 3]
    videos 0 [3, 1, 5, 2] [4, 5, 6, 7]
    >>> shares = [batch.share(rank, world_size=2) for rank in (0, 1)]  # of the clips
    >>> [(share.samples.tolist(), share.context.tolist()) for share in shares]
    [([3, 1], [True, False]), ([5, 2], [True, False])]

Samples are numbered through the shards of their bucket, and their places through the global batch of the step. Half of
the clips of each rank have lost their context.
"""

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import numpy as np

from gpdit_lightning.data.order import BucketOrder, SourceOrder
from gpdit_lightning.errors import InputError

LossFrames = Literal["all", "targets"]


def noisy_frames(source: str, loss_frames: LossFrames, frames: int) -> tuple[int, ...] | None:
    """The positions of the frames that have noise and loss in clips of `frames` latent frames; None: all.

    Args:
        source: the name of the clips' source.
        loss_frames: `targets`: every second frame, as in a sequence (source, target, source, target, ...).
        frames: F.

    Raises:
        InputError: targets are requested where there are none.
    """
    if loss_frames == "all":
        return None
    if source != "sequences":
        raise InputError(f"data.{source}.loss_frames is targets, which only data.sequences has: set it to all.")
    if frames < 2:
        raise InputError(
            "data.sequences.loss_frames is targets, but a sequence of one latent frame has none: take at least 2 "
            "frames of each, or set it to all."
        )
    return tuple(range(1, frames, 2))


@dataclass(frozen=True)
class PlannedBucket:
    """Samples of a source that have one height and width and are cut to the same lengths, as the plan sees them.

    Attributes:
        counts: samples of each of its shards, at least 1.
        lengths: the numbers of latent frames that its samples are cut to, each in equally many micro-batches.
        height, width: of a latent frame, in latent pixels.
    """

    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    height: int
    width: int


@dataclass(frozen=True)
class PlannedSource:
    """A source of samples, as the plan and the estimates of memory and FLOPs see it.

    Attributes:
        name: for logs and messages.
        buckets: each micro-batch comes from one of them.
        batch_size: samples per optimizer step over all ranks; 0 where `tokens` sets the batch.
        tokens: tokens per optimizer step over all ranks, from which each length of a bucket gets the number of samples
            that comes closest from below.
        micro_batches: equal parts into which that batch is cut, each of one shape.
        weight: of the mean loss over this source's batch, relative to the other sources'.
        shuffle_window: samples of a bucket that are shuffled together: those of whole shards, about this many.
        loss_frames: the frames with noise and loss.
        patch_size: side of the square patch of latent pixels that is one token.
    """

    name: str
    buckets: tuple[PlannedBucket, ...]
    batch_size: int = 0
    tokens: int = 0
    micro_batches: int = 1
    weight: float = 1.0
    shuffle_window: int = 65_536
    loss_frames: LossFrames = "all"
    patch_size: int = 2

    def noisy_frames(self, frames: int) -> tuple[int, ...] | None:
        """The positions of the frames with noise and loss in clips of `frames` latent frames; None: all."""
        return noisy_frames(self.name, self.loss_frames, frames)

    def micro_batch_size(self, frames: int, height: int, width: int, max_ranks: int) -> int:
        """Samples of a micro-batch over all ranks, a multiple of `max_ranks`.

        Raises:
            InputError: the batch cannot be divided so, or the tokens are too few for one sample on each rank.
        """
        parts = self.micro_batches * max_ranks
        if parts < 1 or self.batch_size % parts:
            raise InputError(
                f"the batch of {self.batch_size} {self.name} cannot be divided into {self.micro_batches} micro-batches "
                f"for {max_ranks} ranks: make it a multiple of micro_batches x max_ranks."
            )
        if self.batch_size:
            return self.batch_size // self.micro_batches
        pixels, pixels_of_budget = parts * frames * height * width, self.tokens * self.patch_size**2
        if pixels_of_budget < pixels:
            raise InputError(
                f"data.{self.name}.tokens is {self.tokens}, too few for one sample of {frames}x{height}x{width} latent "
                f"pixels in each of {self.micro_batches} micro-batches on each of {max_ranks} ranks: give at least "
                f"{math.ceil(pixels / self.patch_size**2)}, or lower micro_batches or max_ranks."
            )
        return pixels_of_budget // pixels * max_ranks


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
        frames: latent frames to keep from the start of every sample.
    """

    source: int
    bucket: int
    samples: np.ndarray
    places: np.ndarray
    context: np.ndarray
    weight: float
    frames: int

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
    of their batches.

    Attributes:
        sources: what is mixed.
        seed: of every order.
        context_dropout: fraction of clips that lose their context, held exactly over time.
        max_ranks: equal parts of every micro-batch that are alike in shape and number of contexts; world sizes that
            divide it all see the same order.

    Raises:
        InputError: batches that cannot be cut as asked, or a source without samples.
    """

    sources: tuple[PlannedSource, ...]
    seed: int = 0
    context_dropout: float = 0.1
    max_ranks: int = 1

    def __post_init__(self) -> None:
        if not self.sources:
            raise InputError("no source of data is in use: give one of them a batch_size above 0.")
        if not 0 <= self.context_dropout <= 1:
            raise InputError(f"context_dropout is {self.context_dropout}; it must lie between 0 and 1.")
        for source in self.sources:
            if not source.buckets:
                raise InputError(f"the source '{source.name}' holds no samples: prepare some, or set its batch_size 0.")
            if (source.batch_size > 0) == (source.tokens > 0):
                raise InputError(
                    f"data.{source.name} has batch_size = {source.batch_size} and tokens = {source.tokens}: give one "
                    "of them, and 0 for the other."
                )
            if not source.weight > 0:
                raise InputError(f"the weight of '{source.name}' is {source.weight}; it must be positive.")
            if source.shuffle_window < 1:
                raise InputError(
                    f"data.{source.name}.shuffle_window is {source.shuffle_window}; it must be at least 1 sample."
                )
            shapes = [(max(bucket.lengths), bucket.height, bucket.width) for bucket in source.buckets]
            source.micro_batch_size(*max(shapes, key=math.prod), self.max_ranks)  # raises if it cannot be divided so

    def __getstate__(self) -> dict[str, Any]:
        # Cached properties are computed again where they are needed.
        return {field.name: getattr(self, field.name) for field in fields(self)}

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
            first_place += self.sources[index].micro_batches * self._orders[index].largest
            index += 1
        source, order = self.sources[index], self._orders[index]
        bucket, turns = order.at(step * source.micro_batches + within)
        cuts = [other.cut(turn) for other, turn in zip(order.buckets, turns, strict=True)]
        length, position = cuts[bucket]
        size = order.buckets[bucket].sizes[length]
        return MicroBatch(
            source=index,
            bucket=bucket,
            samples=order.buckets[bucket].samples(position, size),
            # As if every micro-batch had the largest size, so that no two samples of a step have the same place.
            places=first_place + within * order.largest + np.arange(size),
            context=self._context(sum(given for _, given in cuts), size),
            weight=source.weight / sum(s.weight for s in self.sources) / source.micro_batches,
            frames=source.buckets[bucket].lengths[length],
        )

    def shards_ahead(self, number: int) -> list[tuple[int, int, int]]:
        """The shards to fetch for micro-batch `number` and those after it, soonest needed first.

        Returns:
            (source, bucket, shard) of all shards in the current window of each bucket and in its next one: no other
            shard is read before a bucket reaches the window after that.
        """
        step, within = divmod(number, self.micro_batches_per_step)
        windows = []
        for index, (source, order) in enumerate(zip(self.sources, self._orders, strict=True)):
            _, turns = order.at(step * source.micro_batches + min(max(within, 0), source.micro_batches))
            within -= source.micro_batches
            steps_per_epoch = float(order.micro_batches_per_epoch / source.micro_batches)
            for bucket, (samples, turn) in enumerate(zip(order.buckets, turns, strict=True)):
                _, position = samples.cut(turn)
                for begins, shards in islice(samples.windows_from(position), 2):
                    needed = max(0, begins - position) / len(samples) * steps_per_epoch  # in so many steps
                    windows.append((needed, [(index, bucket, shard) for shard in shards]))
        windows.sort(key=lambda window: window[0])
        return list(dict.fromkeys(shard for _, shards in windows for shard in shards))

    @cached_property
    def _orders(self) -> list[SourceOrder]:
        orders = []
        for index, source in enumerate(self.sources):
            buckets = []
            for number, bucket in enumerate(source.buckets):
                shapes = [(frames, bucket.height, bucket.width) for frames in bucket.lengths]
                sizes = [source.micro_batch_size(*shape, self.max_ranks) for shape in shapes]
                word = index << 32 | number  # a generator has no room for both
                buckets.append(BucketOrder(self.seed, word, bucket.counts, sizes, source.shuffle_window))
            orders.append(SourceOrder(self.seed, index, buckets))
        return orders

    def _context(self, given: int, size: int) -> np.ndarray:
        """Which samples of a micro-batch keep their context: the same number in each of the `max_ranks` parts.

        The samples are in random order already, so the last ones of a part lose it; fractions carry over to the next
        micro-batch.

        Args:
            given: samples of the source in earlier micro-batches.
            size: its samples.
        """
        before, part = given // self.max_ranks, size // self.max_ranks
        dropped = math.floor((before + part) * self.context_dropout) - math.floor(before * self.context_dropout)
        return np.arange(size) % part < part - dropped
