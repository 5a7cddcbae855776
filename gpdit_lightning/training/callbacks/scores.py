"""Scores while the model trains: FVD, FID, PSNR and SSIM of continuations of held-out clips, at intervals.

Shapes: N clips in all, B clips of a chunk, F latent frames, T pixel frames, T' generated pixel frames, n features.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from gpdit_lightning.codecs import Codec
from gpdit_lightning.data.datamodule import LatentDataModule
from gpdit_lightning.diffusion import NoiseSchedule, Sampler, make_sampler
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.chunks import MetricNetworks
from gpdit_lightning.evaluation.clip_scores import (
    Quantities,
    Reference,
    compute_clip_scores,
    concatenate,
    measure_continuations,
    measure_reference,
)
from gpdit_lightning.evaluation.metrics import bias_warning
from gpdit_lightning.evaluation.network_files import REMEDIES
from gpdit_lightning.evaluation.networks import load_image_network, load_video_network
from gpdit_lightning.generation import ClipInputs
from gpdit_lightning.generation.rollout import check_sampler
from gpdit_lightning.model import NO_LABEL
from gpdit_lightning.options.evaluate import NetworkOptions
from gpdit_lightning.progress import progress_bar
from gpdit_lightning.training.callbacks.held_out import (
    HeldOutClips,
    StepInterval,
    averaged_backbone,
    continue_clips,
    decode,
    open_codec,
    select_clips,
)
from gpdit_lightning.training.callbacks.metrics import log_scalars
from gpdit_lightning.training.callbacks.run_checkpoint import RunCheckpoint
from gpdit_lightning.training.loggers import SCORES
from gpdit_lightning.training.reduction import reduce_over_ranks

log = logging.getLogger(__name__)

NO_NETWORK = NetworkOptions()
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


class Scores(Callback):
    """Scores continuations of held-out clips by the averaged weights, at intervals, always from the same noise.

    The clips are continued as for previews. Real frames are decoded from latents by the codec, as are generated ones,
    so the error of the codec is excluded; `evaluate` compares with the frames of the files instead. FVD is computed
    from whole clips with their context, and FID for each position of a generated frame and averaged, as by `evaluate`.

    Tags, all in the group `scores_vs_decoded`; `_repeated` is the same score of the last context frame, repeated:

    - videos: `fvd`, `fid`, `psnr`, `ssim`, each also with `_repeated`, and `rollout_error_ratio`;
    - sequences, without videos: the same for their last frame, except `fvd`;
    - only images: `fid`, of images generated from noise alone.

    FVD and FID need files of networks, as for `evaluate`; without them only the other scores are computed. The ranks
    share the clips, in chunks that do not depend on the number of ranks. Scores do not change the training. After a
    signal, scoring is given up; if the last checkpoint is of a step that was not scored, the resumed run scores it.

    Args:
        every_steps: optimizer steps between scores, which are also computed at the last step; 0 for none.
        clips: maximum number of clips, evenly spaced among the longest held-out clips. FVD and FID of different
            numbers of clips are not comparable.
        chunk: clips that are continued as one batch. The last digits of the scores depend on this number.
        context_frames: latent frames of context, fewer in shorter videos; 2 are 5 pixel frames of a video.
        sampler: rotation, tangent, adams, dpm2m, stochastic, a registered name, or the import path of a class.
        sampler_steps: sampler steps per latent frame.
        video_network: network for FVD; its `path` is a file on this machine.
        image_network: network for FID; its `path` is a file on this machine.
        codec_source: folder, file or hub name of the codec's weights; recipes set it to that of previews.
        codec: import path of the codec's class, if it is a custom one; recipes set it to that of previews.
    """

    def __init__(
        self,
        every_steps: int = 0,
        clips: int = 256,
        chunk: int = 8,
        context_frames: int = 2,
        sampler: str = "rotation",
        sampler_steps: int = 25,
        video_network: NetworkOptions = NO_NETWORK,
        image_network: NetworkOptions = NO_NETWORK,
        codec_source: str | None = None,
        codec: str | None = None,
    ) -> None:
        if every_steps < 0:
            raise InputError(f"scores.every_steps is {every_steps}; it must be 0 (no scores) or more.")
        for name, value, least in (
            ("clips", clips, 2),
            ("chunk", chunk, 1),
            ("context_frames", context_frames, 1),
            ("sampler_steps", sampler_steps, 1),
        ):
            if value < least:
                raise InputError(f"scores.{name} is {value}; it must be at least {least}.")
        self.every_steps, self.clips, self.chunk, self.context_frames = every_steps, clips, chunk, context_frames
        self.sampler, self.sampler_steps, self.codec_source, self.codec = sampler, sampler_steps, codec_source, codec
        self.video_network, self.image_network = video_network, image_network
        self._interval = StepInterval(0)
        self._scored_step = -1
        self._selected: HeldOutClips
        self._sampler: Sampler
        self._codec: Codec
        self._networks: MetricNetworks
        self._chunks: dict[int, Chunk]  # those of this rank by number
        self._reference: Reference | None = (
            None  # None before the first scores; without content except on the first rank
        )

    # --- start of the run

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the clips, load codec and networks, and try them on one clip, on every rank.

        Raises:
            InputError: the clips are too short for the video network, the codec or a network cannot be
                loaded or used, or the sampler fails.
        """
        if self.every_steps == 0:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, LatentDataModule)
        schedule = pl_module.schedule
        assert isinstance(schedule, NoiseSchedule)
        self._selected = select_clips(data, self.clips, self.context_frames)
        obstacle = self._obstacle()
        if obstacle:
            if trainer.is_global_zero:
                log.warning("no scores are computed: %s", obstacle)
            return
        with isolate_rng():  # networks may be initialized at random before their weights are loaded
            self._codec = open_codec(data.codec, self.codec_source, self.codec, "scores", "scores")
            self._networks = self._load_networks()
            self._sampler = make_sampler(self.sampler, self.sampler_steps, schedule)
            self._chunks = {number: self._read_chunk(number, data) for number in self._chunk_numbers(trainer)}
            check_sampler(self._sampler, *next(iter(self._chunks.values())).latents[:, 0].shape)
            self._try_networks(trainer)
        self._interval = StepInterval(self.every_steps)
        if trainer.is_global_zero:
            self._announce()

    def _obstacle(self) -> str:
        """Return why the selected clips cannot be scored; empty if they can."""
        source = f"data.{self._selected.source}"
        if self._selected.split == "train":
            return f"no samples of {source} are held out (see `prepare --help`)."
        if len(self._selected.numbers) < 2:
            return f"one sample of {source} is held out, but scores need 2."
        if self._selected.context == 0 and self.image_network == NO_NETWORK:
            return f"images have no score but FID, which needs scores.image_network.path: {REMEDIES['image']}."
        return ""

    def _load_networks(self) -> MetricNetworks:
        """Load the networks of the scores that the clips have, on the CPU."""
        video = image = None
        if self.video_network != NO_NETWORK and not self._selected.independent_frames:
            with _name_option("scores.video_network"):
                video = load_video_network(self.video_network)
                frames = self._codec.pixel_frames(self._selected.bucket.frames)
                if frames < video.min_frames:
                    raise InputError(
                        f"the clips of data.videos have {frames} pixel frames, but {video.record.name} takes at least "
                        f"{video.min_frames}: train on longer clips, or leave the network out."
                    )
        if self.image_network != NO_NETWORK:
            with _name_option("scores.image_network"):
                image = load_image_network(self.image_network)
        return MetricNetworks(video, image)

    def _read_chunk(self, number: int, data: LatentDataModule) -> Chunk:
        start = number * self.chunk
        samples = self._selected.read(start, start + self.chunk)
        condition = None
        if data.classes:
            numbers: dict[str | None, int] = {name: place for place, name in enumerate(data.classes)}
            condition = torch.tensor([numbers.get(clip.get("label"), NO_LABEL) for clip in samples.metadata])
        return Chunk(start, samples.latents, ClipInputs(data.seed + start, condition))

    def _try_networks(self, trainer: Trainer) -> None:
        """Decode one clip and score it, so that a codec or network that fails does so before the training."""
        chunk = next(iter(self._chunks.values()))
        with self._on_device(trainer), _name_option("scores"):
            truth = self._decode(chunk.latents[:1].float())
            measure_reference(truth, self._selected.context_pixel_frames(self._codec), self._networks)

    def _announce(self) -> None:
        """Log what is scored, which scores lack a network, and which have a bias."""
        clips, (video, image) = self._selected, self._networks
        names = ["FVD"] * (video is not None) + ["FID"] * (image is not None)
        names += ["PSNR", "SSIM", "the error ratio"] * (clips.context > 0)
        log.info(
            "scores: %s of %d held-out clips of data.%s, every %d steps",
            ", ".join(names),
            len(clips.numbers),
            clips.source,
            self.every_steps,
        )
        if video is None and not clips.independent_frames:
            log.info("no FVD without scores.video_network.path: %s", REMEDIES["video"])
        if image is None:
            log.info("no FID without scores.image_network.path: %s", REMEDIES["image"])
        for name, network in (("FVD", video), ("FID", image)):
            if network is not None:
                warning = bias_warning(name, len(clips.numbers), network.num_features)
                if warning:
                    log.info("%s", warning)

    # --- at intervals

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the scores of the step of a resumed run, if its checkpoint was saved before they were complete."""
        self._interval.start(trainer)
        if self._interval.is_end(trainer.global_step, trainer) and self._scored_step != trainer.global_step:
            self._score(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Compute scores at the end of an interval."""
        if self._interval.is_over(trainer):
            self._score(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]) -> None:
        """Record the last step with scores."""
        if self._scored_step >= 0:
            checkpoint["scored_step"] = self._scored_step

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, int]) -> None:
        """Restore the last step with scores."""
        self._scored_step = checkpoint.get("scored_step", -1)

    def _score(self, trainer: Trainer, module: LightningModule) -> None:
        """Compute and log the scores of the current weights, unless a signal is received; all ranks call it."""
        with isolate_rng(), self._on_device(trainer):
            measured = self._measure_chunks(trainer, module)
        if measured is None:
            return
        gathered = {variant: self._gather(trainer, of_chunks) for variant, of_chunks in measured.items()}
        self._reference = self._reference or Reference(gathered["truth"], gathered["repeated"])
        self._scored_step = trainer.global_step
        if trainer.is_global_zero:
            try:
                scores = compute_clip_scores(gathered["generated"], self._reference)
            except InputError as error:
                log.warning("step %d has no scores: %s", trainer.global_step, error)
                return
            log_scalars(trainer, module, {f"{SCORES}/{name}": value for name, value in scores.items()})

    def _measure_chunks(self, trainer: Trainer, module: LightningModule) -> dict[str, dict[int, Quantities]] | None:
        """Continue and measure the chunks of this rank.

        Returns:
            quantities by variant (`generated`, and the first time also `truth` and `repeated`) and number of the chunk;
            None after a signal.
        """
        variants = ("generated",) if self._reference else ("generated", *Reference._fields)
        measured: dict[str, dict[int, Quantities]] = {variant: {} for variant in variants}
        total = len(self._selected.numbers)
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
                    raw[:, : self._selected.context],
                    self._selected.generated,
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
        context = self._selected.context_pixel_frames(self._codec)
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
        clips, device = len(self._selected.numbers), trainer.strategy.root_device
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

    # --- parts

    def _chunk_numbers(self, trainer: Trainer) -> list[int]:
        """Return the numbers of this rank's chunks.

        All ranks have equally many, since ranks with sharded weights compute every layer together: a rank without a
        further chunk repeats the last one, and `_gather` drops its results.
        """
        last = (len(self._selected.numbers) - 1) // self.chunk
        return [min(first + trainer.global_rank, last) for first in range(0, last + 1, trainer.world_size)]

    def _decode(self, latents: Tensor) -> Tensor:
        return decode(self._codec, latents, self._selected.independent_frames)

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


@contextmanager
def _name_option(option: str) -> Iterator[None]:
    """Put the name of an option before the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{option}: {error}") from None
