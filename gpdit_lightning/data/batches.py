"""Batches of tensors: whitens a rank's share of a planned micro-batch and draws its noise."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from gpdit_lightning.data.buckets import Bucket, LoadedSample
from gpdit_lightning.data.cache import ShardCache
from gpdit_lightning.data.held_out import HeldOutPass
from gpdit_lightning.data.plan import Plan
from gpdit_lightning.data.shard_entry import PREPARE_AGAIN
from gpdit_lightning.data.shards import ShardReader
from gpdit_lightning.errors import InputError
from gpdit_lightning.randomness import FLIP, LABEL_DROPOUT, POSTERIOR_SAMPLE, TRAIN_CONTEXT_NOISE, generator
from gpdit_lightning.whitening import whitened
from gpdit_lightning.workers import WorkerLoader

NoiseLevels = Literal["frame", "clip"]
CountBlocks = Callable[[Sequence[int], int, int], int]
"""(positions of frames, height, width in latent pixels) -> the number of blocks, each with a noise level. The backbone
determines the blocks, so a stage sets this function (`LatentDataModule.count_blocks`)."""


def count_frames(frames: Sequence[int], height: int, width: int) -> int:
    """Return the number of blocks that are frames: a :data:`CountBlocks`."""
    return len(frames)


@dataclass
class LatentBatch:
    """One rank's share of a micro-batch.

    It has K noisy rows for every clip: K copies of all clips with context, one copy after another, then K copies of all
    clips without.

    Attributes:
        latents: (B, F, C, H, W) whitened, float32; clips with context come first.
        noise: (K * B, F', C, H, W) standard Gaussian, for the F' frames of each noisy row that have noise and loss.
        t: (K * B, S) noise levels in [0, 1) of the S blocks of these frames; S = F' if blocks are frames.
        context: B', the number of clips with context.
        weight: weight of the mean loss of this micro-batch; the weights of an optimizer step sum to 1.
        source: name of the source.
        keys: keys of the samples, for messages.
        damaged: names of damaged samples that were replaced.
        labels: (K * B,) class of each noisy row, int64; -1 if the clip has none or it was dropped. None if training
            does not use labels.
        frames: positions of the F' frames in the clips; None for all, F' = F.
        clean_noise: (B', F, C, H, W) standard Gaussian, the context noise; None without it.
        clean_theta: (B', S') radians, the angle of the context noise of each of the S' blocks of a clip; None without
            it.
        sources: names of the input files of the clips.
        counts: whether the clips count in the results of a pass over held-out samples; see `MicroBatch.counts`.
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
    clean_noise: Tensor | None = None
    clean_theta: Tensor | None = None
    sources: list[str] = field(default_factory=list)
    counts: bool = True

    @property
    def draws(self) -> int:
        """K, the number of noisy copies of every clip."""
        return len(self.noise) // len(self.latents)

    @property
    def clip_of_row(self) -> Tensor:
        """(K * B,) The index of the clip of each noisy row; 0 to B - 1 if K is 1."""
        clips = torch.arange(len(self.latents), device=self.latents.device)
        return torch.cat((clips[: self.context].repeat(self.draws), clips[self.context :].repeat(self.draws)))

    def pin_memory(self) -> "LatentBatch":
        """Return the batch in pinned memory; called by the loader if batches are moved to a GPU."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        pinned: dict[str, Any] = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return dataclasses.replace(self, **pinned)


def check_ranks(ranks: int, max_ranks: int) -> None:
    """Raise `InputError` if the number of ranks does not divide `data.max_ranks`."""
    if max_ranks % ranks:
        raise InputError(
            f"{ranks} ranks do not divide data.max_ranks = {max_ranks}: set it to a multiple of the "
            "number of ranks (it is part of the order: choose it once per run)."
        )


class LatentDataset(Dataset[LatentBatch]):
    """Map-style dataset from the number of a micro-batch to this rank's :class:`LatentBatch`, the same in every worker.

    Args:
        plan: the batch plan, or a pass over held-out samples.
        buckets: the buckets of each source of the plan.
        mean: (C,) whitening constants of the codec.
        std: (C,) whitening constants of the codec.
        noise_levels: one level per block, or one per clip.
        purpose: the random stream of the noise, a constant of `randomness.py`.
        rank: rank of this process.
        world_size: number of ranks.
        noise_draws: K, noisy copies of every clip; the first has the same noise and levels as with K = 1. A clip of one
            block, such as an image, always has one, since it has no clean stream that copies could share.
        cache: cache for copies of remote shards, which are prefetched.
        classes: names of the labels, in the order of the classes; if empty, batches have no labels.
        label_dropout: fraction of noisy rows whose label is dropped, for guidance.
        count_blocks: gives the number of blocks of some frames; see :data:`CountBlocks`.
        posterior_samples: whether latents are samples of the codec's posterior where its standard deviations are
            stored, instead of its means. All copies of a clip, clean and noisy, are of one sample.
        flips: whether half of the clips, chosen at random, are flipped left to right where both are stored.
        context_noise: largest angle, in radians, by which clean blocks are rotated towards noise; 0 for none.

    Raises:
        InputError: `noise_draws` is below 1, or the number of ranks does not divide `plan.max_ranks`.
    """

    def __init__(
        self,
        plan: Plan | HeldOutPass,
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
        count_blocks: CountBlocks = count_frames,
        posterior_samples: bool = False,
        flips: bool = False,
        context_noise: float = 0.0,
    ) -> None:
        if noise_draws < 1:
            raise InputError(f"data.noise_draws is {noise_draws}; it must be at least 1.")
        check_ranks(world_size, plan.max_ranks)
        self.plan, self.buckets = plan, buckets
        self.mean = torch.tensor(mean, dtype=torch.float32)
        self.std = torch.tensor(std, dtype=torch.float32)
        self.noise_levels, self.purpose = noise_levels, purpose
        self.rank, self.world_size, self.noise_draws = rank, world_size, noise_draws
        self.cache = cache
        self.class_indices = {name: index for index, name in enumerate(classes)}
        self.label_dropout = label_dropout
        self.count_blocks = count_blocks
        self.posterior_samples, self.flips, self.context_noise = posterior_samples, flips, context_noise
        self._prefetched: list[tuple[int, int, int]] = []

    def __getitem__(self, number: int) -> LatentBatch:
        self._prefetch(number)
        micro_batch = self.plan.micro_batch(number).share(self.rank, self.world_size)
        step = number // self.plan.micro_batches_per_step
        source = self.plan.sources[micro_batch.source]
        bucket = self.buckets[micro_batch.source][micro_batch.bucket]
        samples = [
            bucket.read(int(sample), micro_batch.frames, self._is_flipped(step, int(position)))
            for sample, position in zip(micro_batch.samples, micro_batch.positions, strict=True)
        ]
        raw = [self._raw(sample, step, int(p)) for sample, p in zip(samples, micro_batch.positions, strict=True)]
        latents = whitened(torch.from_numpy(np.stack(raw)), self.mean, self.std)
        context = int(micro_batch.context.sum())
        frames = source.config.noisy_frames(micro_batch.frames)
        height, width = latents.shape[-2:]
        all_blocks = self.count_blocks(range(micro_batch.frames), height, width)
        draws = self.noise_draws if all_blocks > 1 else 1
        blocks = self.count_blocks(frames or range(micro_batch.frames), height, width)
        noisy_shape = (len(frames) if frames else micro_batch.frames, *latents.shape[2:])
        noise, levels = self._noise_and_levels(step, micro_batch.positions, context, draws, noisy_shape, blocks)
        clean_noise = clean_theta = None
        if self.context_noise and context and all_blocks > 1:  # a clip of one block has no clean stream
            with_context = micro_batch.positions[:context]
            clean_noise, clean_theta = self._context_noise(step, with_context, latents.shape[1:], all_blocks)
        return LatentBatch(
            latents=latents,
            noise=noise,
            t=levels,
            context=context,
            weight=micro_batch.weight,
            source=source.name,
            keys=[str(sample.metadata["key"]) for sample in samples],
            damaged=list(dict.fromkeys(name for sample in samples for name in sample.damaged)),
            labels=self._labels(samples, step, micro_batch.positions, context, draws) if self.class_indices else None,
            frames=frames,
            clean_noise=clean_noise,
            clean_theta=clean_theta,
            sources=[str(sample.metadata.get("source", "")) for sample in samples],
            counts=micro_batch.counts,
        )

    def _is_flipped(self, step: int, position: int) -> bool:
        """Return whether the clip at a position in the global batch of a step is flipped."""
        return self.flips and bool(generator(self.plan.seed, FLIP, step, position).random() < 0.5)

    def _raw(self, sample: LoadedSample, step: int, position: int) -> np.ndarray:
        """Return the raw latents of a clip in float32: the means, or a sample of the posterior."""
        latents = sample.latents.astype(np.float32)
        if self.posterior_samples and sample.std is not None:
            draw = generator(self.plan.seed, POSTERIOR_SAMPLE, step, position)
            latents += sample.std * draw.standard_normal(latents.shape, dtype=np.float32)
        return latents

    def _noise_and_levels(
        self, step: int, positions: np.ndarray, context: int, draws: int, shape: tuple[int, ...], blocks: int
    ) -> tuple[Tensor, Tensor]:
        """Draw the noise (K * B, F, C, H, W) and the noise levels (K * B, S) of the noisy rows.

        Args:
            step: optimizer step.
            positions: (B,) positions of the clips in the global batch.
            context: B', the number of clips with context, which come first.
            draws: K, noisy copies of every clip.
            shape: (F, C, H, W) of each row.
            blocks: S, the number of blocks of each row.
        """
        generators = [generator(self.plan.seed, self.purpose, step, int(position)) for position in positions]
        noise, levels = [], []
        for group in (generators[:context], generators[context:]):
            for clip_generator in group * draws:
                noise.append(clip_generator.standard_normal(shape, dtype=np.float32))
                level = clip_generator.random(blocks if self.noise_levels == "frame" else 1, dtype=np.float32)
                levels.append(np.broadcast_to(level, blocks))
        return torch.from_numpy(np.stack(noise)), torch.from_numpy(np.stack(levels))

    def _context_noise(
        self, step: int, positions: np.ndarray, shape: tuple[int, ...], blocks: int
    ) -> tuple[Tensor, Tensor]:
        """Draw the noise (B', F, C, H, W) and the angles (B', S') of the clean blocks of some clips."""
        generators = [generator(self.plan.seed, TRAIN_CONTEXT_NOISE, step, int(position)) for position in positions]
        noise = np.stack([of_clip.standard_normal(shape, dtype=np.float32) for of_clip in generators])
        levels = np.stack([of_clip.random(blocks, dtype=np.float32) for of_clip in generators])
        return torch.from_numpy(noise), torch.from_numpy(levels * np.float32(self.context_noise))

    def _labels(
        self, samples: Sequence[LoadedSample], step: int, positions: np.ndarray, context: int, draws: int
    ) -> Tensor:
        """Return the classes (K * B,) of the noisy rows; labels are dropped independently for every copy of a clip."""
        classes = [self._class_index(sample.metadata) for sample in samples]
        drawn = [generator(self.plan.seed, LABEL_DROPOUT, step, int(position)).random(draws) for position in positions]
        labels = np.where(np.transpose(drawn) < self.label_dropout, -1, classes)  # (K, B)
        return torch.from_numpy(np.concatenate((labels[:, :context].ravel(), labels[:, context:].ravel())))

    def _class_index(self, metadata: dict[str, Any]) -> int:
        label = metadata.get("label")
        if label is None:
            return -1
        if label not in self.class_indices:
            raise InputError(
                f"the sample {metadata['key']} has the label {label!r}, which no manifest of the data lists: "
                f"{PREPARE_AGAIN}."
            )
        return self.class_indices[label]

    def _prefetch(self, number: int) -> None:
        """Prefetch the remote shards of this and the next windows; only in the first worker of each rank."""
        worker = get_worker_info()
        if self.cache is None or (worker is not None and worker.id > 0):
            return
        ahead = self.plan.shards_ahead(number)
        if ahead != self._prefetched:  # a bucket has reached its next window
            self._prefetched = ahead
            shards = (self.buckets[source][bucket].shards[shard] for source, bucket, shard in ahead)
            self.cache.prefetch([file for shard in shards for file in ShardReader(*shard, self.cache).files])


class RangeSampler(Sampler[int]):
    """Yields `start` to `stop - 1`; its length is `stop`, since a resumed run continues inside one long epoch."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __len__(self) -> int:
        return self.stop


class TimedLoader(WorkerLoader[LatentBatch]):
    """A loader that measures how long training waits for each batch.

    Attributes:
        request_time: `time.perf_counter()` when the latest batch was requested.
        request_cpu_time: `time.process_time()` then.
        wait_seconds: seconds until that batch was available.
        waiting: whether a batch is requested and not available yet.
    """

    request_time = request_cpu_time = wait_seconds = 0.0
    waiting = False

    def __iter__(self) -> Any:
        return self._timed(super().__iter__())

    def _timed(self, batches: Iterator[LatentBatch]) -> Iterator[LatentBatch]:
        self._request()
        for batch in batches:
            self.wait_seconds, self.waiting = time.perf_counter() - self.request_time, False
            yield batch
            self._request()
        self.waiting = False

    def _request(self) -> None:
        """Store the time of a request."""
        self.request_time, self.request_cpu_time, self.waiting = time.perf_counter(), time.process_time(), True
