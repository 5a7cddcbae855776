"""One pass over held-out samples: each of them once, for any batch size and number of ranks."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gpdit_lightning.data.plan import MicroBatch, Plan, PlannedSource


@dataclass(frozen=True)
class HeldOutPass:
    """All held-out samples in batches of the sizes of training, each sample once, at its full length.

    The last batch of each bucket is smaller if its samples do not divide into batches. The batches of all buckets are
    spread evenly over the pass, so that its beginning is a sample of all of them.

    Example:
        >>> bucket = PlannedBucket((3, 4), (1,), height=4, width=4)
        >>> source = PlannedSource("images", (bucket,), SourceConfig(batch_size=4))
        >>> whole = HeldOutPass(Plan((source,), context_dropout=0, max_ranks=4))
        >>> [whole.micro_batch(number).samples.tolist() for number in range(len(whole))]
        [[0, 5, 1, 6], [2, 4, 3]]
        >>> [whole.micro_batch(1).share(rank, 4).samples.tolist() for rank in range(4)]
        [[2], [2], [4], [3]]
        >>> [whole.micro_batch(1).share(rank, 4).counts for rank in range(4)]
        [False, True, True, True]

    Attributes:
        plan: plan of the held-out samples, without context dropout.
    """

    plan: Plan

    def __len__(self) -> int:
        """Return the number of micro-batches."""
        return len(self._batches)

    @property
    def sources(self) -> tuple[PlannedSource, ...]:
        """The sources."""
        return self.plan.sources

    @property
    def seed(self) -> int:
        """The seed of the order."""
        return self.plan.seed

    @property
    def max_ranks(self) -> int:
        """The number of ranks that every number of ranks divides."""
        return self.plan.max_ranks

    @property
    def micro_batches_per_step(self) -> int:
        """One, since there are no optimizer steps."""
        return 1

    def shards_ahead(self, number: int) -> list[tuple[int, int, int]]:
        """Return no shards: those of held-out samples are read where they are."""
        return []

    @cached_property
    def _batches(self) -> list[tuple[float, int, int, int, int]]:
        """For each micro-batch its place in [0, 1), source, bucket, first position in the bucket's order, and size."""
        batches = []
        for index, source in enumerate(self.sources):
            for number, bucket in enumerate(source.buckets):
                samples = sum(bucket.counts)
                size = source.micro_batch_size(max(bucket.lengths), bucket.height, bucket.width, self.max_ranks)
                for start in range(0, samples, size):
                    batches.append((start / samples, index, number, start, min(size, samples - start)))
        return sorted(batches)

    def micro_batch(self, number: int) -> MicroBatch:
        """Return a micro-batch; its weight is the share of its source's batches in the mean over sources."""
        _, index, bucket, start, size = self._batches[number]
        batches = sum(source == index for _, source, *_ in self._batches)
        return MicroBatch(
            source=index,
            bucket=bucket,
            samples=self.plan.samples(index, bucket, start, size),
            positions=np.arange(size),
            context=np.ones(size, dtype=bool),
            weight=self.plan.weight_in_step(self.sources[index]) / batches,
            frames=max(self.sources[index].buckets[bucket].lengths),
        )
