"""LightningDataModule of the batch plan; its position in the data is the trainer's step."""

import dataclasses
import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from gpdit_lightning.data.batches import (
    CountBlocks,
    LatentBatch,
    LatentDataset,
    NoiseLevels,
    RangeSampler,
    TimedLoader,
    count_frames,
)
from gpdit_lightning.data.buckets import Bucket
from gpdit_lightning.data.cache import CacheConfig
from gpdit_lightning.data.held_out import HeldOutPass
from gpdit_lightning.data.order_record import UNRECORDED_DEFAULTS, check_order
from gpdit_lightning.data.plan import Plan, PlannedSource, Sampling
from gpdit_lightning.data.ranks import check_same_on_ranks
from gpdit_lightning.data.selection import (
    and_list,
    log_repeated,
    no_source_error,
    select_sources,
    sources_of_run,
)
from gpdit_lightning.data.shard_entry import Split
from gpdit_lightning.data.source import KINDS, SourceConfig, SourceName
from gpdit_lightning.data.source_manifests import (
    all_manifests,
    any_has,
    any_remote,
    check_kinds,
    class_names,
    common_codec,
    load_manifests,
)
from gpdit_lightning.errors import InputError
from gpdit_lightning.randomness import TRAIN_NOISE, VALIDATION_NOISE
from gpdit_lightning.schema import CONTENT_HASH
from gpdit_lightning.specs import ClipGeometry

log = logging.getLogger(__name__)

UNUSED = SourceConfig()
DEFAULT_VALIDATION_BATCHES = 4
LOCAL_CACHE = CacheConfig()


class LatentDataModule(LightningDataModule):
    """Batches of latents in the order of the plan, starting at the trainer's current step.

    Args:
        images: still images (latents of one frame).
        videos: video clips.
        sequences: related images, each encoded alone, as the frames of a clip (GPDiT, section 5.4).
        sources: names of the sources that are used; by default those of the stage, or all if it trains on any.
        data_dir: folders of prepared data for every source without `manifests`; recipes give it as `data_dir`.
        stage_sources: names of the sources on which the stage trains; empty: any. Recipes link it to the stage.
        sampling: how several sources share the optimizer steps. `joint` takes a batch of each in every step and weights
            their mean losses by the sources' `weight`; `alternate` takes a step's batch from one source, which has a
            fraction of the steps that is proportional to its `weight`. Validation is joint.
        seed: seed of the order, the noise and the noise levels; the batch of a step is a function of seed and step.
        context_dropout: fraction of clips that are trained without context, for guidance.
        noise_levels: `frame` draws a level t for each block of the backbone, by default a latent frame; `clip` one for
            the whole clip.
        noise_draws: noisy copies of every training clip that share its clean stream; clips of one block, such as
            images, have one.
        context_noise: largest angle theta_c of the context noise, in radians from 0 to pi/2. Every clean block of a
            training clip is rotated towards noise by its own angle, uniform in [0, context_noise], which its tokens
            receive too; a rollout may then add as much to the frames that it has generated, against drift. 0, as in
            the papers, for none; so is validation.
        labels: whether batches contain the classes of their samples, on which a backbone with `classes` is conditioned.
        label_dropout: fraction of noisy rows that are trained without their label, for guidance.
        posterior: `sample` draws the latents of each training clip from the codec's posterior, for data prepared with
            --posterior; `mean` uses its means; by default samples are drawn where the data allow it. Validation uses
            the means.
        flips: whether half of the training clips are flipped left to right, for data prepared with --flips; by default
            where the data allow it. Validation flips none.
        patch_size: side of the square patch of latent pixels that is one token of the backbone; recipes link it to the
            backbone. It is used for sources with `tokens`.
        block_frames: latent frames of the first block of the backbone, 0: all of a clip, and of a later block, 0: all
            others; recipes link it to the backbone. Clips are cut to whole blocks.
        max_ranks: maximum number of ranks of this run; the order is the same for every divisor of it.
        workers: loader processes per rank; 0 loads in the training process.
        cache: cache for copies of remote shards, such as those of s3://bucket/latents.
        validation_batches: number of validation steps of the training batch size, from the held-out sources; by default
            4. In classification, where no sample is used twice, at most as many as the samples fill; by default all.

    Attributes:
        classes: names of the labels in the order of the manifests, which is the order of the classes in batches; empty
            without `labels`.
        count_blocks: gives the number of blocks of some frames of a clip; the stage sets that of its backbone.
        validates_each_once: whether validation uses each held-out sample once, instead of batches that are all of the
            training size; set by the stage.

    Raises:
        InputError: an option, a manifest, or a combination of them is invalid.
    """

    def __init__(
        self,
        images: SourceConfig = UNUSED,
        videos: SourceConfig = UNUSED,
        sequences: SourceConfig = UNUSED,
        sources: Sequence[SourceName] = (),
        data_dir: Sequence[str] = (),
        stage_sources: Sequence[SourceName] = (),
        sampling: Sampling = "joint",
        seed: int = 0,
        context_dropout: float = 0.1,
        noise_levels: NoiseLevels = "frame",
        noise_draws: int = 1,
        context_noise: float = 0.0,
        labels: bool = False,
        label_dropout: float = 0.1,
        posterior: Literal["sample", "mean"] | None = None,
        flips: bool | None = None,
        patch_size: int = 2,
        block_frames: tuple[int, int] = (1, 1),
        max_ranks: int = 1,
        workers: int = 0,
        cache: CacheConfig = LOCAL_CACHE,
        validation_batches: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("seed", seed, 0),
            ("noise_draws", noise_draws, 1),
            ("patch_size", patch_size, 1),
            ("max_ranks", max_ranks, 1),
            ("workers", workers, 0),
            ("validation_batches", validation_batches or 0, 0),
        ):
            if value < least:
                raise InputError(f"data.{name} is {value}; it must be at least {least}.")
        cache.check()
        if not 0 <= label_dropout <= 1:
            raise InputError(f"data.label_dropout is {label_dropout}; it must lie between 0 and 1.")
        if not 0 <= context_noise <= math.pi / 2:
            raise InputError(f"data.context_noise is {context_noise}; it must be an angle from 0 to pi/2 = 1.57.")
        self.seed, self.noise_levels, self.noise_draws = seed, noise_levels, noise_draws
        self.context_noise = context_noise
        self.labels, self.label_dropout = labels, label_dropout
        self.patch_size, self.block_frames = patch_size, block_frames
        self.workers, self.validation_batches = workers, validation_batches
        self.count_blocks: CountBlocks = count_frames
        self.validates_each_once = False
        configs = {"images": images, "videos": videos, "sequences": sequences}
        allowed = sources_of_run(sources, stage_sources)
        selection = select_sources(configs, data_dir, allowed)
        if not selection.configs:
            raise no_source_error(selection)
        self.configs = selection.configs
        self.manifests = load_manifests(self.configs)
        self._log_selection(configs, allowed, selection.left_out)
        check_kinds(self.manifests)
        self.codec = common_codec(all_manifests(self.manifests))
        self.classes = class_names(self.manifests) if labels else ()
        self.cache = cache.open() if any_remote(self.manifests) else None
        self._has_posterior = any_has("posterior", self.manifests, required=posterior == "sample")
        self._has_flips = any_has("flips", self.manifests, required=flips is True)
        self.posterior_samples = self._has_posterior and posterior != "mean"
        self.flips = self._has_flips and flips is not False
        self.buckets = {split: self._buckets_of(split) for split in ("train", "validation")}
        self.plan = self._make_plan("train", context_dropout, max_ranks, sampling)
        self._check_cache_size()
        has_validation = bool(self.buckets["validation"])
        self.validation_plan = self._make_plan("validation", 0.0, max_ranks, "joint") if has_validation else None

    def setup(self, stage: str) -> None:
        """Raise `InputError` on all ranks unless each of them has read the same manifests and settings of the order."""
        assert self.trainer is not None
        if self.trainer.world_size == 1:
            return
        facts, texts = self._order_settings(), dict[str, str]()
        for name, manifests in self.manifests.items():
            for number, manifest in enumerate(manifests):
                # The whole content: the fingerprints in the order are of the latents alone.
                facts[f"data.{name}.manifests[{number}]"] = manifest.content()[CONTENT_HASH]
                texts[f"data.{name}.manifests[{number}]"] = str(manifest.path)
            del facts[f"data.{name}.manifests"]
        check_same_on_ranks(self.trainer, facts, texts)

    @property
    def micro_batches_per_step(self) -> int:
        """The gradient accumulation that the trainer must use."""
        return self.plan.micro_batches_per_step

    @property
    def geometry(self) -> ClipGeometry:
        """The stride, frame sizes, length and rate of the training clips."""
        name = next(name for name in ("videos", "sequences", "images") if name in self.manifests)
        preparation = self.manifests[name][0].preparation
        factor = self.codec.spatial_factor
        shapes = {(b.frames, b.height, b.width) for source in self.buckets["train"].values() for b in source}
        longest = max(frames for frames, *_ in shapes)
        sizes = sorted((height * factor, width * factor) for frames, height, width in shapes if frames == longest)
        return ClipGeometry(preparation.get("stride", 1), tuple(sizes), longest, preparation.get("fps"))

    def train_dataloader(self) -> DataLoader[LatentBatch]:
        """Return a loader of the rest of the run, from the trainer's current step, as one epoch."""
        assert self.trainer is not None
        per_step = self.micro_batches_per_step
        steps = self.trainer.max_steps if self.trainer.max_steps > 0 else 2**40
        return self._loader("train", self.plan, TRAIN_NOISE, self.trainer.global_step * per_step, steps * per_step)

    def val_dataloader(self) -> DataLoader[LatentBatch] | list[Any]:
        """Return a loader of the same batches with the same noise at every call; empty if nothing was held out."""
        if self.validation_plan is None or self.validation_batches == 0:
            return []
        if self.validates_each_once:
            whole = HeldOutPass(self.validation_plan)
            stop = min(len(whole), self.validation_batches or len(whole))
            return self._loader("validation", whole, VALIDATION_NOISE, 0, stop)
        stop = (self.validation_batches or DEFAULT_VALIDATION_BATCHES) * self.validation_plan.micro_batches_per_step
        return self._loader("validation", self.validation_plan, VALIDATION_NOISE, 0, stop)

    def test_dataloader(self) -> DataLoader[LatentBatch] | list[Any]:
        """Return a loader of the validation batches."""
        return self.val_dataloader()

    def number_of_samples(self) -> dict[str, dict[str, int]]:
        """Return the number of samples of each source, for training and held out: {source: {split: count}}."""
        return {
            source: {split: sum(map(len, buckets.get(source, []))) for split, buckets in self.buckets.items()}
            for source in self.buckets["train"]
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the settings that determine the order, the folders, and what generation needs of the data."""
        state = {
            "order": self._order_settings(),
            "folders": self._folders(),
            "codec": self.codec.to_dict(),
            "geometry": self.geometry.to_dict(),
        }
        return state | ({"classes": list(self.classes)} if self.labels else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint was trained on this data in this order; the position is the trainer's step.

        Raises:
            InputError: the data, the mixture or the batches changed.
        """
        check_order(state_dict, self._order_settings(), self._folders(), self.manifests)

    def _order_settings(self) -> dict[str, Any]:
        """Return all settings that the order of the data and the noise depend on, by their names in a recipe."""
        order: dict[str, Any] = {
            "data.sampling": self.plan.sampling,
            "data.seed": self.seed,
            "data.context_dropout": self.plan.context_dropout,
            "data.noise_levels": self.noise_levels,
            "data.noise_draws": self.noise_draws,
            "data.max_ranks": self.plan.max_ranks,
        }
        if self.context_noise:
            order["data.context_noise"] = self.context_noise
        if self.labels:
            order |= {"data.labels": list(self.classes), "data.label_dropout": self.label_dropout}
        if self._has_posterior:
            order["data.posterior"] = "sample" if self.posterior_samples else "mean"
        if self._has_flips:
            order["data.flips"] = self.flips
        for name, config in self.configs.items():
            for setting, value in dataclasses.asdict(config).items():
                if (setting, value) not in UNRECORDED_DEFAULTS:
                    order[f"data.{name}.{setting}"] = value
            # The content of the shards, not their location.
            order[f"data.{name}.manifests"] = [manifest.fingerprint()[:16] for manifest in self.manifests[name]]
        return order

    def _folders(self) -> dict[str, list[str]]:
        """Return the folders of the manifests of each source, by the option in a recipe."""
        return {f"data.{name}.manifests": [str(m.directory) for m in found] for name, found in self.manifests.items()}

    def _check_cache_size(self) -> None:
        """Raise InputError if the shards of the current and next windows do not fit into the cache."""
        if self.cache is None:
            return
        sources = [self.buckets["train"][source.name] for source in self.plan.sources]
        shards = [sources[source][bucket].shards[shard] for source, bucket, shard in self.plan.shards_ahead(0)]
        needed = sum(entry.bytes for directory, entry in shards if not isinstance(directory, Path))
        if needed > self.cache.limit:
            raise InputError(
                f"data.cache.gib is {self.cache.limit / 2**30:.3g}, but the shards of the current and the next "
                f"shuffle windows take {needed / 2**30:.3g}: raise it, or lower shuffle_window of the sources."
            )

    def _log_selection(
        self, configs: Mapping[str, SourceConfig], allowed: Sequence[str], left_out: Mapping[str, str]
    ) -> None:
        """Log lines for sources on which the stage trains but this run does not, and for repeated or unused data."""
        used = and_list([f"data.{name}" for name in self.configs])
        for name, reason in left_out.items():
            if allowed or reason.startswith("data."):
                log.info("training uses %s without data.%s, since %s", used, name, reason)
        for name, manifests in self.manifests.items():
            log_repeated(f"data.{name}.manifests", manifests)
        for name, config in configs.items():
            if config.manifests and allowed and name not in allowed:
                log.info("data.%s.manifests is not used, since this stage trains on %s", name, used)

    def _buckets_of(self, split: Split) -> dict[str, list[Bucket]]:
        """Return the buckets of each source: shards with the same height, width and clip lengths form one bucket."""
        buckets: dict[str, list[Bucket]] = {}
        for name in self.configs:
            shards, shorter, cut = defaultdict(list), 0, 0
            most = max(self.configs[name].frames, self.configs[name].least_frames)
            for manifest in self.manifests[name]:
                for entry in manifest.of_split(split):
                    if entry.kind == KINDS[name]:
                        frames, _, height, width = entry.shape
                        lengths = self.configs[name].clip_lengths(name, frames, self.block_frames)
                        shards[lengths, height, width].append((manifest, entry))
                        shorter += entry.count if frames < most else 0
                        cut += entry.count if lengths[-1] < min(frames, self.configs[name].frames or frames) else 0
            if shorter and split == "train":
                log.info("%d samples of data.%s have fewer than %d latent frames: all are used", shorter, name, most)
            if cut and split == "train":
                log.info("%d samples of data.%s are cut to whole blocks of the backbone", cut, name)
            if shards:
                buckets[name] = [
                    Bucket(group, lengths, self.cache) for (lengths, _, _), group in sorted(shards.items())
                ]
        return buckets

    def _make_plan(self, split: Split, context_dropout: float, max_ranks: int, sampling: Sampling) -> Plan:
        """Return the plan of a split; the validation plan leaves out sources without held-out samples."""
        sources = []
        for name, config in self.configs.items():
            buckets = self.buckets[split].get(name, [])
            if buckets or split == "train":
                planned = tuple(bucket.planned for bucket in buckets)
                sources.append(PlannedSource(name, planned, config, self.patch_size))
        return Plan(tuple(sources), self.seed, context_dropout, max_ranks, sampling)

    def _loader(
        self, split: Split, plan: Plan | HeldOutPass, purpose: int, start: int, stop: int
    ) -> DataLoader[LatentBatch]:
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
            count_blocks=self.count_blocks,
            posterior_samples=self.posterior_samples and split == "train",
            flips=self.flips and split == "train",
            context_noise=self.context_noise if split == "train" else 0.0,
        )
        return TimedLoader(
            dataset,
            self.workers,
            sampler=RangeSampler(start, stop),
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )
