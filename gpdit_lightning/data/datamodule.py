"""The plan as a LightningDataModule: sources from the recipe, the position from the trainer's step."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from gpdit_lightning.data.batches import (
    Bucket,
    LatentBatch,
    LatentDataset,
    LossFrames,
    NoiseLevels,
    NumbersFrom,
    TimedLoader,
    noisy_frames,
)
from gpdit_lightning.data.cache import CacheConfig
from gpdit_lightning.data.manifest import Kind, Manifest, Split
from gpdit_lightning.data.plan import Plan, PlannedBucket, PlannedSource
from gpdit_lightning.data.workers import outlive_signals
from gpdit_lightning.errors import InputError
from gpdit_lightning.randomness import TRAIN_NOISE, VALIDATION_NOISE
from gpdit_lightning.specs import ClipGeometry, CodecSpec


@dataclass(frozen=True)
class SourceConfig:
    """One source of samples in the mixture."""

    manifests: list[str] = field(default_factory=list)
    """Folders made by `prepare`, for sequences by `prepare-pairs`; or their manifest.json."""
    batch_size: int = 0
    """Samples per optimizer step over all ranks; a source without batch_size and tokens or without manifests is left
    out."""
    micro_batches: int = 1
    """Equal parts into which that batch is cut, one forward and backward pass each: more parts, less memory."""
    frames: int = 0
    """Most latent frames taken from the start of each sample; 0 takes all."""
    least_frames: int = 0
    """Above 0, micro-batches vary in length: each number of latent frames from here to `frames` equally often."""
    weight: float = 1.0
    """Weight of this source's mean loss relative to the other source's."""
    tokens: int = 0
    """Above 0, instead of batch_size: tokens of one optimizer step's batch over all ranks, F x h x w / 4 for a clip of
    F latent frames of h x w (patches of 2x2, as all presets have); each shape, and each length of clips, then has the
    number of samples that comes closest from below."""
    shuffle_window: int = 65_536
    """Samples that are shuffled together: whole shards of about so many; what is read at a time stays within them."""
    loss_frames: LossFrames = "all"
    """The frames that are trained on: `all`, or of sequences (source, target, source, target, ...) the `targets` alone,
    given all frames before them."""


UNUSED = SourceConfig()
LOCAL_CACHE = CacheConfig()
KINDS: dict[str, Kind] = {"images": "image", "videos": "video", "sequences": "sequence"}


class LatentDataModule(LightningDataModule):
    """Batches of latents in the order of the plan, from the step the trainer stands at.

    Args:
        images: still images (latents of one frame).
        videos: clips.
        sequences: images that belong together, each encoded alone, as the frames of a clip (GPDiT, section 5.4).
        seed: of the order, the noise and the noise levels; a step's batch depends on it and on nothing before.
        context_dropout: fraction of clips that are trained without context, for guidance.
        noise_levels: `frame` draws a level t for each latent frame, `clip` one for the whole clip.
        noise_draws: noisy copies of every training clip that share its clean stream; images stay single.
        labels: whether batches carry the classes of their samples, by which a backbone with `classes` is conditioned.
        label_dropout: fraction of noisy rows that are trained without their label, for guidance.
        max_ranks: the most ranks this run may use; every divisor of it gives the same order.
        workers: loader processes per rank; 0 loads in the training process.
        cache: where copies of shards are kept that lie elsewhere, as at s3://bucket/latents.
        validation_batches: batches (of the training size) per validation, from the held-out sources.

    Attributes:
        classes: the names of the labels in the order of the manifests, by which batches number them; empty without
            `labels`.
    """

    def __init__(
        self,
        images: SourceConfig = UNUSED,
        videos: SourceConfig = UNUSED,
        sequences: SourceConfig = UNUSED,
        seed: int = 0,
        context_dropout: float = 0.1,
        noise_levels: NoiseLevels = "frame",
        noise_draws: int = 1,
        labels: bool = False,
        label_dropout: float = 0.1,
        max_ranks: int = 1,
        workers: int = 0,
        cache: CacheConfig = LOCAL_CACHE,
        validation_batches: int = 4,
    ) -> None:
        super().__init__()
        if seed < 0:
            raise InputError(f"data.seed is {seed}; it must not be negative.")
        for name, value, least in (
            ("noise_draws", noise_draws, 1),
            ("max_ranks", max_ranks, 1),
            ("workers", workers, 0),
            ("validation_batches", validation_batches, 0),
        ):
            if value < least:
                raise InputError(f"data.{name} is {value}; it must be at least {least}.")
        if not 0 <= label_dropout <= 1:
            raise InputError(f"data.label_dropout is {label_dropout}; it must lie between 0 and 1.")
        self.seed, self.noise_levels, self.noise_draws = seed, noise_levels, noise_draws
        self.labels, self.label_dropout = labels, label_dropout
        self.workers, self.validation_batches = workers, validation_batches
        given = {"images": images, "videos": videos, "sequences": sequences}
        for name, config in given.items():
            for setting in ("batch_size", "tokens", "frames", "least_frames"):
                if getattr(config, setting) < 0:
                    raise InputError(f"data.{name}.{setting} is {getattr(config, setting)}; it must not be negative.")
        self.configs = {name: c for name, c in given.items() if c.manifests and max(c.batch_size, c.tokens) > 0}
        self.manifests = {
            name: [Manifest.load(path) for path in config.manifests] for name, config in self.configs.items()
        }
        self._check_kinds()
        self.codec = self._common_codec()
        self.classes = self._classes()
        elsewhere = any(not isinstance(manifest.directory, Path) for manifest in self._all_manifests)
        self.cache = cache.open() if elsewhere else None
        self.buckets = {split: self._buckets_of(split) for split in ("train", "validation")}
        self.plan = Plan(self._planned("train"), seed, context_dropout, max_ranks)
        self._check_cache()
        held_out = self._planned("validation")
        self.validation_plan = Plan(held_out, seed, 0.0, max_ranks) if held_out else None

    @property
    def micro_batches_per_step(self) -> int:
        """Gradient accumulation that the trainer must use."""
        return self.plan.micro_batches_per_step

    @property
    def geometry(self) -> ClipGeometry:
        """The clips that are trained on."""
        name = next(name for name in ("videos", "sequences", "images") if name in self.manifests)
        preparation = self.manifests[name][0].preparation
        factor = self.codec.spatial_factor
        shapes = {(b.frames, b.height, b.width) for source in self.buckets["train"].values() for b in source}
        longest = max(frames for frames, *_ in shapes)
        sizes = sorted((height * factor, width * factor) for frames, height, width in shapes if frames == longest)
        return ClipGeometry(preparation.get("stride", 1), tuple(sizes), longest)

    def train_dataloader(self) -> DataLoader[LatentBatch]:
        """The rest of the run, from the step the trainer stands at, as one epoch."""
        assert self.trainer is not None
        per_step = self.micro_batches_per_step
        steps = self.trainer.max_steps if self.trainer.max_steps > 0 else 2**40
        return self._loader("train", self.plan, TRAIN_NOISE, self.trainer.global_step * per_step, steps * per_step)

    def val_dataloader(self) -> DataLoader[LatentBatch] | list[Any]:
        """The same batches with the same noise at every validation; nothing if no source was held out."""
        if self.validation_plan is None or self.validation_batches < 1:
            return []
        stop = self.validation_batches * self.validation_plan.micro_batches_per_step
        return self._loader("validation", self.validation_plan, VALIDATION_NOISE, 0, stop)

    def test_dataloader(self) -> DataLoader[LatentBatch] | list[Any]:
        """The validation batches."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """What the data order depends on, and what generation must know of the data."""
        known = {"order": self._order(), "codec": self.codec.to_dict(), "geometry": self.geometry.to_dict()}
        return known | ({"classes": list(self.classes)} if self.labels else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint was made with this data in this order; the position itself is the trainer's step.

        Raises:
            InputError: the data, the mixture or the batches changed.
        """
        # As they were before there was a choice, and still are without one.
        unsaid = {f"data.{name}.loss_frames": "all" for name in self.configs}
        order, saved = unsaid | self._order(), unsaid | state_dict["order"]
        changes = [
            f"{name} = {saved.get(name, 'unused')} and the recipe has {order.get(name, 'none')}"
            for name in sorted(order.keys() | saved.keys())
            if order.get(name) != saved.get(name)
        ]
        if changes:
            kept = "".join(f" (the data before they were extended are {path})" for path in self._kept_manifests(saved))
            raise InputError(
                f"the checkpoint was trained with {'; with '.join(changes)}; so its data order cannot go on: restore "
                f"the old values{kept}, or begin a new run folder from its weights (--run_dir NEW "
                "--model.init_args.initial_weights OLD_RUN_DIR)."
            )

    def _kept_manifests(self, saved: dict[str, Any]) -> Iterator[Path]:
        """The manifests of a checkpoint's data that preparation kept when it extended them."""
        for name, manifests in self.manifests.items():
            for manifest, fingerprint in zip(manifests, saved.get(f"data.{name}.manifests", ()), strict=False):
                path = manifest.directory / f"manifest-{fingerprint}.json"
                if isinstance(path, Path) and path.exists():
                    yield path

    def _order(self) -> dict[str, Any]:
        order: dict[str, Any] = {
            "data.seed": self.seed,
            "data.context_dropout": self.plan.context_dropout,
            "data.noise_levels": self.noise_levels,
            "data.noise_draws": self.noise_draws,
            "data.max_ranks": self.plan.max_ranks,
        }
        if self.labels:
            order |= {"data.labels": list(self.classes), "data.label_dropout": self.label_dropout}
        for name, config in self.configs.items():
            for setting, value in dataclasses.asdict(config).items():
                if (setting, value) != ("loss_frames", "all"):  # so that checkpoints from before it are as those of now
                    order[f"data.{name}.{setting}"] = value
            # Where shards lie may change; what they hold may not.
            order[f"data.{name}.manifests"] = [manifest.fingerprint()[:16] for manifest in self.manifests[name]]
        return order

    @property
    def _all_manifests(self) -> list[Manifest]:
        return [manifest for manifests in self.manifests.values() for manifest in manifests]

    def _check_cache(self) -> None:
        """Refuse a cache that would fetch again and again what it has no room to keep."""
        if self.cache is None:
            return
        sources = [self.buckets["train"][source.name] for source in self.plan.sources]
        coming = [sources[source][bucket].shards[shard] for source, bucket, shard in self.plan.shards_ahead(0)]
        needed = sum(entry.bytes for directory, entry in coming if not isinstance(directory, Path))
        if needed > self.cache.limit:
            raise InputError(
                f"data.cache.gib is {self.cache.limit / 2**30:.3g}, but the shards that are read at a time and the "
                f"next ones take {needed / 2**30:.3g}: raise it, or lower shuffle_window of the sources."
            )

    def _check_kinds(self) -> None:
        for name, manifests in self.manifests.items():
            for manifest in manifests:
                kinds = {entry.kind for entry in manifest.shards}
                if kinds and KINDS[name] not in kinds:
                    raise InputError(
                        f"data.{name}.manifests names {manifest.path}, which holds {' and '.join(sorted(kinds))} "
                        f"samples: name it under {' or '.join(key for key, kind in KINDS.items() if kind in kinds)}."
                    )

    def _common_codec(self) -> CodecSpec:
        loaded = self._all_manifests
        if not loaded:
            raise InputError(
                "no source of data is in use: give data.images, data.videos or data.sequences the manifests of "
                "prepared data and a batch_size (or tokens) above 0."
            )
        first = loaded[0]
        for other in loaded[1:]:
            first.codec.check_same(other.codec, str(first.path), str(other.path), "prepare both with the same codec")
        return first.codec

    def _classes(self) -> tuple[str, ...]:
        if not self.labels:
            return ()
        classes = tuple(dict.fromkeys(name for manifest in self._all_manifests for name in manifest.labels))
        if not classes:
            raise InputError(
                f"data.labels is true, but no manifest lists any ({self._all_manifests[0].path} for one): prepare the "
                "data with --labels or --annotations, or set data.labels to false."
            )
        return classes

    def _buckets_of(self, split: Split) -> dict[str, list[Bucket]]:
        """For each source, its buckets: one for the shards that have one height and width and give the same lengths."""
        found: dict[str, list[Bucket]] = {}
        for name in self.configs:
            alike = defaultdict(list)
            for manifest in self.manifests[name]:
                for entry in manifest.of_split(split):
                    if entry.kind == KINDS[name]:
                        frames, _, height, width = entry.shape
                        lengths = tuple(self._lengths(name, frames, manifest))
                        alike[lengths, height, width].append((manifest, entry))
            if alike:
                found[name] = [Bucket(shards, lengths, self.cache) for (lengths, _, _), shards in sorted(alike.items())]
        return found

    def _lengths(self, name: str, available: int, manifest: Manifest) -> range:
        """The numbers of latent frames that samples of a bucket are cut to.

        Fixed lengths must be there in full; where lengths vary, a short sample gives the short ones.
        """
        config = self.configs[name]
        most = config.frames or available
        least = config.least_frames or most
        if least > most:
            raise InputError(
                f"data.{name}.least_frames is {least}, more than the {most} latent frames that clips have at most: "
                "lower it."
            )
        if least > available:
            raise InputError(
                f"data.{name} asks for {least} latent frames, but {manifest.path} has samples of {available}: prepare "
                "longer clips or ask for fewer frames."
            )
        noisy_frames(name, config.loss_frames, least)  # complains if there are none
        return range(least, min(most, available) + 1)

    def _planned(self, split: Split) -> tuple[PlannedSource, ...]:
        planned = []
        for name, config in self.configs.items():
            buckets = self.buckets[split].get(name, [])
            if buckets or split == "train":
                planned.append(
                    PlannedSource(
                        name,
                        tuple(PlannedBucket(b.counts, b.lengths, b.height, b.width) for b in buckets),
                        config.batch_size,
                        config.tokens,
                        config.micro_batches,
                        config.weight,
                        config.shuffle_window,
                    )
                )
        return tuple(planned)

    def _loader(self, split: Split, plan: Plan, purpose: int, start: int, stop: int) -> DataLoader[LatentBatch]:
        assert self.trainer is not None
        dataset = LatentDataset(
            plan,
            [self.buckets[split][source.name] for source in plan.sources],
            self.codec.mean,
            self.codec.std,
            self.noise_levels,
            purpose,
            self.trainer.global_rank,
            self.trainer.world_size,
            noise_draws=self.noise_draws if split == "train" else 1,
            cache=self.cache if split == "train" else None,
            classes=self.classes,
            label_dropout=self.label_dropout if split == "train" else 0.0,
            loss_frames={name: config.loss_frames for name, config in self.configs.items()},
        )
        return TimedLoader(
            dataset,
            batch_size=None,
            sampler=NumbersFrom(start, stop),
            num_workers=self.workers,
            worker_init_fn=outlive_signals,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )
