"""Measurement of held-out clips for scores during training, in chunks that the ranks share.

Shapes: N clips in all, B clips of a chunk, F latent frames, T pixel frames, T' generated pixel frames, n features.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from gpdit_lightning.checkpoints.facts import TrainingScores
from gpdit_lightning.codecs import Codec
from gpdit_lightning.data.datamodule import LatentDataModule
from gpdit_lightning.diffusion import Sampler
from gpdit_lightning.evaluation.chunks import MetricNetworks
from gpdit_lightning.evaluation.clip_scores import (
    ClipReference,
    Quantities,
    concatenate,
    measure_continuations,
    measure_reference,
)
from gpdit_lightning.generation import ClipInputs
from gpdit_lightning.generation.rollout import check_sampler
from gpdit_lightning.model import NO_LABEL
from gpdit_lightning.progress import progress_bar
from gpdit_lightning.training.callbacks.held_out import HeldOutClips, averaged_backbone, continue_clips, decode
from gpdit_lightning.training.callbacks.run_checkpoint import RunCheckpoint
from gpdit_lightning.training.reduction import reduce_over_ranks

COLUMNS = 4096  # values of each clip that are reduced over the ranks at a time
BAR_DELAY = 5.0  # seconds of scoring before a progress bar is shown


class Chunk(NamedTuple):
    """Clips that are continued as one batch.

    Attributes:
        start: number of the first clip in the selection.
        latents: (B, F, C, H, W) float16, raw, on the CPU.
        inputs: seeds of the noise, and labels if training uses them.
    """

    start: int
    latents: Tensor
    inputs: ClipInputs


class ScoreChunks:
    """Continues and measures selected clips in chunks, which the ranks share; the first rank gathers the results.

    Args:
        trainer: gives the data and the ranks.
        clips: the selected clips.
        chunk: clips that are continued as one batch.
        codec: the codec.
        networks: of the scores.
        sampler: the sampler.

    Raises:
        InputError: the sampler fails.
    """

    def __init__(
        self,
        trainer: Trainer,
        clips: HeldOutClips,
        chunk: int,
        codec: Codec,
        networks: MetricNetworks,
        sampler: Sampler,
    ) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, LatentDataModule)
        self._clips, self._chunk_size = clips, chunk
        self._codec, self._networks, self._sampler = codec, networks, sampler
        self._reference: ClipReference | None = None  # before the first call of `measure`
        self._chunks = {number: self._read_chunk(number, data) for number in self._chunk_numbers(trainer)}
        check_sampler(sampler, *next(iter(self._chunks.values())).latents[:, 0].shape)

    def try_networks(self, trainer: Trainer) -> None:
        """Decode one clip and measure it, so that a codec or network that fails does so before the training.

        Raises:
            InputError: the codec or a network fails.
        """
        chunk = next(iter(self._chunks.values()))
        with self._on_device(trainer):
            truth = self._decode(chunk.latents[:1].float())
            measure_reference(truth, self._clips.context_pixel_frames(self._codec), self._networks)

    def measure(self, trainer: Trainer, module: LightningModule) -> Quantities | None:
        """Measure continuations by the current weights and, the first time, the reference; all ranks call it.

        Returns:
            quantities of all N continuations on the first rank, on other ranks empty; None after a signal.
        """
        with isolate_rng(), self._on_device(trainer):
            measured = self._measure_chunks(trainer, module)
        if measured is None:
            return None
        gathered = {variant: self._gather(trainer, of_chunks) for variant, of_chunks in measured.items()}
        if self._reference is None:
            self._reference = ClipReference(gathered["truth"], gathered["repeated"])
        return gathered["generated"]

    @property
    def reference(self) -> ClipReference:
        """Quantities of the ground truth and of the baseline, after `measure`; empty except on the first rank."""
        assert self._reference is not None
        return self._reference

    def record(self, step: int, sampler: str, values: Mapping[str, float]) -> TrainingScores:
        """Return the record of scores for a checkpoint.

        Args:
            step: optimizer steps trained.
            sampler: name of the sampler.
            values: the scores, as :func:`compute_clip_scores` returns them.
        """
        clips, networks = self._clips, self._networks
        context = clips.context_pixel_frames(self._codec)
        frames = clips.bucket.frames if clips.independent_frames else self._codec.pixel_frames(clips.bucket.frames)
        named = {"fvd": networks.video, "fid": networks.image}
        return TrainingScores(
            step=step,
            source=clips.source,
            clips=len(clips.numbers),
            context_frames=context,
            generated_frames=frames - context,
            sampler=sampler,
            sampler_steps=self._sampler.steps,
            networks={name: network.record.name for name, network in named.items() if network is not None},
            values={name: value for name, value in values.items() if math.isfinite(value)},
        )

    def _measure_chunks(self, trainer: Trainer, module: LightningModule) -> dict[str, dict[int, Quantities]] | None:
        """Continue and measure the chunks of this rank.

        Returns:
            quantities by variant (`generated`, and the first time also `truth` and `repeated`) and number of the chunk;
            None after a signal.
        """
        variants = ("generated",) if self._reference else ("generated", *ClipReference._fields)
        measured: dict[str, dict[int, Quantities]] = {variant: {} for variant in variants}
        total = len(self._clips.numbers)
        bar = progress_bar(
            total=total,
            desc="scoring",
            unit="clip",
            leave=False,
            delay=BAR_DELAY,
            disable=not trainer.is_global_zero or trainer.progress_bar_callback is None,
        )
        with bar, averaged_backbone(trainer, module) as backbone:
            for number, chunk in self._chunks.items():
                raw = chunk.latents.to(module.device).float()
                latents = continue_clips(
                    trainer,
                    backbone,
                    self._codec,
                    raw[:, : self._clips.context],
                    self._clips.generated,
                    self._sampler,
                    chunk.inputs,
                    lambda: any_rank_received_signal(trainer),
                )
                if latents is None:
                    return None
                clips = []
                for clip in zip(latents.split(1), raw.split(1), strict=True):
                    if received_signal(trainer):  # by this rank; the ranks agree below
                        break
                    clips.append(self._measure_clip(*clip))
                    bar.update(min(trainer.world_size, total - bar.n))
                if any_rank_received_signal(trainer):
                    return None
                for variant, of_chunks in measured.items():
                    of_chunks[number] = concatenate([clip[variant] for clip in clips])
        return measured

    def _measure_clip(self, latents: Tensor, raw: Tensor) -> dict[str, Quantities]:
        """Measure a continuation and, the first time, the reference; one clip at a time, which bounds the memory.

        Args:
            latents: (1, F, C, H, W) raw, generated.
            raw: the same of the ground truth.

        Returns:
            quantities by variant.
        """
        context = self._clips.context_pixel_frames(self._codec)
        generated, truth = self._decode(latents), self._decode(raw)
        measured = {"generated": measure_continuations(generated, truth, context, self._networks)}
        if self._reference is None:
            measured |= measure_reference(truth, context, self._networks)._asdict()
        return measured

    def _gather(self, trainer: Trainer, of_chunks: Mapping[int, Quantities]) -> Quantities:
        """Return quantities of all N clips on the first rank, in the order of the clips; on other ranks empty.

        Blocks of columns are reduced, which bounds the memory on the device.
        """
        gathered = {}
        clips, device = len(self._clips.numbers), trainer.strategy.root_device
        mine = [number for number in of_chunks if number % trainer.world_size == trainer.global_rank]
        for name, example in next(iter(of_chunks.values())).items():
            shape, blocks = example.shape[1:], []
            for first in range(0, shape.numel(), COLUMNS):
                block = torch.zeros(clips, min(COLUMNS, shape.numel() - first), device=device)
                for number in mine:
                    rows = of_chunks[number][name].reshape(-1, shape.numel())[:, first : first + COLUMNS]
                    start = self._chunks[number].start
                    block[start : start + len(rows)] = rows.to(device)
                reduce_over_ranks(block, "sum")  # each row is zero on all ranks but one
                blocks += [block.cpu()] if trainer.is_global_zero else []
            if trainer.is_global_zero:
                gathered[name] = torch.cat(blocks, dim=1).reshape(clips, *shape)
        return gathered

    def _chunk_numbers(self, trainer: Trainer) -> list[int]:
        """Return the numbers of this rank's chunks.

        All ranks have equally many, since ranks with sharded weights compute every layer together: a rank without a
        further chunk repeats the last one, and `_gather` drops its results.
        """
        last = (len(self._clips.numbers) - 1) // self._chunk_size
        return [min(first + trainer.global_rank, last) for first in range(0, last + 1, trainer.world_size)]

    def _read_chunk(self, number: int, data: LatentDataModule) -> Chunk:
        start = number * self._chunk_size
        samples = self._clips.read(start, start + self._chunk_size)
        condition = None
        if data.classes:
            numbers: dict[str | None, int] = {name: place for place, name in enumerate(data.classes)}
            condition = torch.tensor([numbers.get(clip.get("label"), NO_LABEL) for clip in samples.metadata])
        return Chunk(start, samples.latents, ClipInputs(data.seed + start, condition))

    def _decode(self, latents: Tensor) -> Tensor:
        return decode(self._codec, latents, self._clips.independent_frames)

    @contextmanager
    def _on_device(self, trainer: Trainer) -> Iterator[None]:
        """Move codec and networks to the device; between scores they are in host memory, as the codec of previews."""
        networks = [network for network in self._networks if network is not None]
        device = trainer.strategy.root_device
        try:
            self._codec.to(device)
            for network in networks:
                network.move_to(device)
            yield
        finally:
            self._codec.to("cpu")
            for network in networks:
                network.move_to("cpu")


def any_rank_received_signal(trainer: Trainer) -> bool:
    """Return whether a rank received a signal that ends the training; all ranks must call it."""
    received = torch.full((), received_signal(trainer), device=trainer.strategy.root_device)
    return bool(reduce_over_ranks(received, "max"))


def received_signal(trainer: Trainer) -> int:
    """Return the signal that this rank received, which ends the training; 0 if there is none."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return max((each.received_signal for each in callbacks if isinstance(each, RunCheckpoint)), default=0)
