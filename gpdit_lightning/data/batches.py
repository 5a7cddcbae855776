"""From the plan to tensors: a rank's share of a micro-batch, read, whitened and paired with its noise."""

import dataclasses
import logging
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from gpdit_lightning.data.cache import ShardCache
from gpdit_lightning.data.manifest import PREPARE_AGAIN, Folder, Manifest, ShardEntry
from gpdit_lightning.data.plan import Plan, PlannedBucket
from gpdit_lightning.data.shards import DamagedSampleError, ShardReader
from gpdit_lightning.data.workers import signals_delayed
from gpdit_lightning.errors import InputError
from gpdit_lightning.randomness import LABEL_DROPOUT, generator

log = logging.getLogger(__name__)

NoiseLevels = Literal["frame", "clip"]


@dataclass
class LatentBatch:
    """One rank's share of a micro-batch.

    Its noisy rows are K copies of every clip: the copies of the clips with context, copy after copy, then those of the
    clips without.

    Attributes:
        latents: (B, F, C, H, W) whitened, float32; the clips with context come first.
        noise: (K * B, S, C, H, W) standard Gaussian, for the S frames of each noisy row that have noise and loss.
        t: (K * B, S) their noise levels in [0, 1).
        context: B', how many clips keep their context.
        weight: of this micro-batch's mean loss; the weights of an optimizer step sum to 1.
        source: which source it came from.
        keys: the samples' keys, for messages.
        damaged: names of the samples that could not be read and were replaced.
        labels: (K * B,) the class of each noisy row, int64; -1 where there is none or it was dropped. None where
            training takes no labels.
        frames: the positions of the S frames in the clips; None: all, S = F.
    """

    latents: Tensor
    noise: Tensor
    t: Tensor
    context: int
    weight: float
    source: str
    keys: list[str]
    damaged: list[str] = field(default_factory=list)
    labels: Tensor | None = None
    frames: tuple[int, ...] | None = None

    @property
    def draws(self) -> int:
        """K, the noisy copies of every clip."""
        return len(self.noise) // len(self.latents)

    @property
    def clip_of_row(self) -> Tensor:
        """(K * B,) the clip that each noisy row is a copy of; with one copy each, 0 to B - 1."""
        clips = torch.arange(len(self.latents), device=self.latents.device)
        return torch.cat((clips[: self.context].repeat(self.draws), clips[self.context :].repeat(self.draws)))

    def pin_memory(self) -> "LatentBatch":
        """The loader calls this where batches go to a GPU."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        pinned: dict[str, Any] = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return dataclasses.replace(self, **pinned)


class Read(NamedTuple):
    """A sample as it was read.

    Attributes:
        latents: (F, C, H, W) raw, in float16.
        metadata: what was written with it.
        damaged: names of the samples whose place it takes; mostly empty.
    """

    latents: np.ndarray
    metadata: dict[str, Any]
    damaged: tuple[str, ...]


class Bucket:
    """All samples of a source that have one height and width and are read at the same lengths, over shards.

    It holds no more than the shards' entries: a bucket may have tens of thousands.

    Args:
        shards: each with the manifest that lists it.
        lengths: the numbers of latent frames that samples are cut to.
        cache: where copies of shards that lie elsewhere are kept.
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
        """Samples of each shard."""
        return tuple(entry.count for _, entry in self.shards)

    @property
    def planned(self) -> PlannedBucket:
        """The bucket as the batch plan takes it."""
        return PlannedBucket(self.counts, self.lengths, self.height, self.width)

    @property
    def frames(self) -> int:
        """Latent frames of its longest samples."""
        return max(self.lengths)

    def read(self, sample: int, frames: int | None = None) -> Read:
        """The first latent frames of a sample; a damaged sample is replaced by the next healthy one of its shard.

        Args:
            sample: its number in the bucket.
            frames: how many to keep; the longest when not given.

        Raises:
            InputError: no sample of the shard is healthy.
        """
        shard = bisect_right(self.starts, sample) - 1
        reader, first = _reader(*self.shards[shard], self.cache), sample - self.starts[shard]
        damaged: list[str] = []
        for offset in range(len(reader)):
            number = (first + offset) % len(reader)
            try:
                latents, metadata = reader.read(number, frames or self.frames)
            except DamagedSampleError as error:
                damaged.append(f"sample {number} of {reader.path}")
                _warn_once(f"{error} The next healthy sample of the shard takes its place.")
                continue
            return Read(latents, metadata, tuple(damaged))
        raise InputError(f"{reader.path} has no healthy sample left: copy it again or prepare it again.")


@lru_cache(maxsize=128)
def _reader(directory: Folder, entry: ShardEntry, cache: ShardCache | None) -> ShardReader:
    """A shard's reader; each keeps two files open, so a process has a limited number of them."""
    return ShardReader(directory, entry, cache)


@cache
def _warn_once(message: str) -> None:
    """A sample that stays damaged comes again in every epoch; a process tells of it once."""
    log.warning("%s", message)


class LatentDataset(Dataset[LatentBatch]):
    """Micro-batch number -> :class:`LatentBatch` of this rank; the same for every worker and at every call.

    Args:
        plan: the order.
        buckets: for each source of the plan, its buckets.
        mean, std: (C,) the codec's whitening constants.
        noise_levels: one level per frame, or one per clip.
        purpose: which of the plan's random streams gives the noise.
        rank, world_size: the slice to take.
        noise_draws: K, noisy copies of every clip, the first with the noise and the levels that it has alone; an image
            stays single, since it has no clean stream that copies could share.
        cache: where copies of shards that lie elsewhere are brought before they are needed.
        classes: the names of labels, a class for each; without any, batches have no labels.
        label_dropout: fraction of noisy rows whose label is dropped, for guidance.

    Raises:
        InputError: a number of ranks that does not divide the plan, or no noisy copies.
    """

    def __init__(
        self,
        plan: Plan,
        buckets: Sequence[Sequence[Bucket]],
        mean: Sequence[float],
        std: Sequence[float],
        noise_levels: NoiseLevels,
        purpose: int,
        rank: int = 0,
        world_size: int = 1,
        noise_draws: int = 1,
        cache: ShardCache | None = None,
        classes: Sequence[str] = (),
        label_dropout: float = 0.0,
    ) -> None:
        if noise_draws < 1:
            raise InputError(f"data.noise_draws is {noise_draws}; it must be at least 1.")
        if plan.max_ranks % world_size:
            raise InputError(
                f"{world_size} ranks do not divide data.max_ranks = {plan.max_ranks}: set it to a multiple of the "
                "number of ranks (it is part of the order: choose it once per run)."
            )
        self.plan, self.buckets = plan, buckets
        self.mean = torch.tensor(mean, dtype=torch.float32)[:, None, None]
        self.std = torch.tensor(std, dtype=torch.float32)[:, None, None]
        self.noise_levels, self.purpose = noise_levels, purpose
        self.rank, self.world_size, self.noise_draws = rank, world_size, noise_draws
        self.cache = cache
        self.class_of, self.label_dropout = {name: place for place, name in enumerate(classes)}, label_dropout
        self._coming: list[tuple[int, int, int]] = []

    def __getitem__(self, number: int) -> LatentBatch:
        self._fetch_ahead(number)
        micro_batch = self.plan.micro_batch(number).share(self.rank, self.world_size)
        source = self.plan.sources[micro_batch.source]
        bucket = self.buckets[micro_batch.source][micro_batch.bucket]
        reads = [bucket.read(int(sample), micro_batch.frames) for sample in micro_batch.samples]
        latents = (torch.from_numpy(np.stack([read.latents for read in reads])).float() - self.mean) / self.std
        step = number // self.plan.micro_batches_per_step
        context = int(micro_batch.context.sum())
        draws = self.noise_draws if latents.shape[1] > 1 else 1
        frames = source.noisy_frames(micro_batch.frames)
        noisy = len(frames) if frames else micro_batch.frames
        generators = [generator(self.plan.seed, self.purpose, step, int(place)) for place in micro_batch.places]
        noise, levels = [], []
        for group in (generators[:context], generators[context:]):
            for numbers in group * draws:
                noise.append(numbers.standard_normal((noisy, *latents.shape[2:]), dtype=np.float32))
                level = numbers.random(noisy if self.noise_levels == "frame" else 1, dtype=np.float32)
                levels.append(np.broadcast_to(level, noisy))
        return LatentBatch(
            latents=latents,
            noise=torch.from_numpy(np.stack(noise)),
            t=torch.from_numpy(np.stack(levels)),
            context=context,
            weight=micro_batch.weight,
            source=source.name,
            keys=[str(read.metadata["key"]) for read in reads],
            damaged=list(dict.fromkeys(name for read in reads for name in read.damaged)),
            labels=self._labels(reads, step, micro_batch.places, context, draws) if self.class_of else None,
            frames=frames,
        )

    def _labels(self, reads: Sequence[Read], step: int, places: np.ndarray, context: int, draws: int) -> Tensor:
        """(K * B,) the classes of the noisy rows; every copy of a clip keeps or loses its label by itself."""
        classes = [self._class_of(read.metadata) for read in reads]
        drawn = [generator(self.plan.seed, LABEL_DROPOUT, step, int(place)).random(draws) for place in places]
        kept = np.where(np.transpose(drawn) < self.label_dropout, -1, classes)  # (K, B)
        return torch.from_numpy(np.concatenate((kept[:, :context].ravel(), kept[:, context:].ravel())))

    def _class_of(self, metadata: dict[str, Any]) -> int:
        label = metadata.get("label")
        if label is None:
            return -1
        if label not in self.class_of:
            raise InputError(
                f"the sample {metadata['key']} has the label {label!r}, which no manifest of the data lists: "
                f"{PREPARE_AGAIN}."
            )
        return self.class_of[label]

    def _fetch_ahead(self, number: int) -> None:
        """Let the shards come that the next micro-batches need; one process of each rank does for all."""
        worker = get_worker_info()
        if self.cache is None or (worker is not None and worker.id > 0):
            return
        coming = self.plan.shards_ahead(number)
        if coming != self._coming:  # a bucket came to another window
            self._coming = coming
            shards = (self.buckets[source][bucket].shards[shard] for source, bucket, shard in coming)
            self.cache.prefetch([file for shard in shards for file in ShardReader(*shard, self.cache).files])


class NumbersFrom(Sampler[int]):
    """The numbers `start` to `stop - 1`, with the length counted from 0: a run resumes inside one long epoch."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __len__(self) -> int:
        return self.stop


class TimedLoader(DataLoader[LatentBatch]):
    """A loader that measures how long its user waits.

    Attributes:
        asked: `time.perf_counter()` when the latest batch was asked for.
        waited: seconds from then until it was there.
    """

    asked = waited = 0.0

    def __iter__(self) -> Any:
        with signals_delayed():
            batches = super().__iter__()  # starts the workers
        return self._timed(batches)

    def _timed(self, batches: Iterator[LatentBatch]) -> Iterator[LatentBatch]:
        self.asked = time.perf_counter()
        for batch in batches:
            self.waited = time.perf_counter() - self.asked
            yield batch
            self.asked = time.perf_counter()
