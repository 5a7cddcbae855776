"""Previews: the same clips continued from the same noise again and again, beside the truth, to watch a model learn."""

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor

from gpdit_lightning.codecs import Codec, load_codec_from_spec
from gpdit_lightning.data.datamodule import LatentDataModule
from gpdit_lightning.data.manifest import Split
from gpdit_lightning.diffusion import NoiseSchedule, RotationSampler
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation import ClipInputs, GenerationConfig, rollout
from gpdit_lightning.media.images import write_animation, write_strip
from gpdit_lightning.model import GPDiT
from gpdit_lightning.specs import CodecSpec
from gpdit_lightning.training.callbacks.ema import EMA
from gpdit_lightning.training.strategies.sharding import sharding_of

log = logging.getLogger(__name__)

STRIP_COLUMNS = 9  # every second frame of the paper's 17
USUAL_RATE = 8.0  # frames a second, about the paper's: every third of 24
NO_PREVIEWS = "--preview.every_steps 0 for no previews"


class Preview(Callback):
    """Continues a few held-out clips with the averaged weights, every so many steps, always from the same noise.

    Writes `previews/step-N.png` (a strip) and `.gif` (generated beside true) in the run folder, and the same pictures
    to TensorBoard as `sample/strip` and `sample/video`, with `sample/rollout_error`, the mean squared error of the
    generated pixels in 8-bit levels, and `sample/rollout_error_ratio`, that divided by the error of repeating the last
    context frame: below 1 the model has learnt motion. Without videos, the last frame of sequences is generated from
    the others; without these, images from nothing. Training goes on as if there were no previews.

    Args:
        every_steps: optimizer steps between previews; there is one of trainer.max_steps too; 0 makes none.
        clips: how many clips, spread evenly over the held-out ones that have the most frames: some of each data set.
        context_frames: latent frames that are given; 2 of a video are 5 pixel frames.
        sampler_steps: network calls for each generated latent frame.
        codec_source: folder, file or hub name of the codec's weights; empty: where they were when the data were made.
    """

    def __init__(
        self,
        every_steps: int = 0,
        clips: int = 4,
        context_frames: int = 2,
        sampler_steps: int = 25,
        codec_source: str = "",
    ) -> None:
        if every_steps < 0:
            raise InputError(f"preview.every_steps is {every_steps}: take 0 for no previews, or more.")
        for name, value in (("clips", clips), ("context_frames", context_frames), ("sampler_steps", sampler_steps)):
            if value < 1:
                raise InputError(f"preview.{name} is {value}: take at least 1, or {NO_PREVIEWS}.")
        self.every_steps, self.clips, self.context_frames = every_steps, clips, context_frames
        self.sampler_steps, self.codec_source = sampler_steps, codec_source
        self._fixed: FixedClips
        self._codec: Codec
        self._last_step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the clips and open the codec; on every rank, so that all of them stop where one must.

        Raises:
            InputError: the clips are too short for the context, or the codec's weights are not to be had.
        """
        if self.every_steps == 0:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, LatentDataModule)
        self._fixed = fixed_clips(data, self.clips, self.context_frames)
        self._codec = self._opened(data.codec)
        if self._fixed.split == "train" and trainer.is_global_zero:
            log.warning("no samples of data.%s are held out: the previews show training samples.", self._fixed.source)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the step a resumed run stands at: its preview is made already."""
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Make a preview when an optimizer step completes an interval, on one rank while the others wait."""
        step = trainer.global_step
        if self.every_steps == 0 or step == self._last_step:
            return
        self._last_step = step
        if step % self.every_steps == 0 or step == trainer.max_steps:
            if trainer.is_global_zero or sharding_of(pl_module) is not None:  # whose ranks have weights together only
                latents = self._generated(trainer, pl_module)
                if trainer.is_global_zero:
                    self._make(trainer, pl_module, latents)
            trainer.strategy.barrier()

    def _opened(self, spec: CodecSpec) -> Codec:
        """The codec of the data, on the CPU."""
        source = self.codec_source or spec.source
        try:
            with torch.random.fork_rng(devices=[]):  # a network draws weights before it reads its own
                return load_codec_from_spec(spec, source=source, owner="The training data")
        except InputError as error:
            raise InputError(
                f"the previews need the codec {spec.name!r}, which cannot be had from {source or 'the package'} "
                f"({str(error).rstrip('.')}): give --preview.codec_source PATH, or {NO_PREVIEWS}."
            ) from None

    def _make(self, trainer: Trainer, module: LightningModule, latents: Tensor) -> None:
        """Decode generated latents (B, F, C, H, W), measure, write the files and log."""
        fixed = self._fixed
        # Between previews the codec lies in main memory: that of the accelerator is the training's.
        codec = self._codec.to(module.device)
        prediction = decode(codec, latents, fixed.frames_alone)
        truth = decode(codec, fixed.latents, fixed.frames_alone)
        codec.to("cpu")
        context = fixed.context if fixed.frames_alone else codec.pixel_frames(fixed.context)

        path = Path(trainer.default_root_dir) / "previews" / f"step-{trainer.global_step:06d}"
        strip, animation = path.with_suffix(".png"), path.with_suffix(".gif")
        pictures, scalars = {"sample/strip": strip}, {}
        if context == 0:
            write_strip(strip, {"generated": prediction[:, 0]}, columns=len(prediction))
        else:
            rows = {}
            for clip in range(len(truth)):
                rows[f"{clip + 1} prediction"], rows[f"{clip + 1} truth"] = prediction[clip], truth[clip]
            columns = truth.shape[1] if fixed.frames_alone else STRIP_COLUMNS  # a picture left out may be an example
            write_strip(strip, rows, columns=columns, context=context)
            scalars = rollout_error(prediction, truth, context)
        if not fixed.frames_alone:
            write_animation(animation, {"prediction": prediction, "truth": truth}, fixed.fps, context=context)
            pictures["sample/video"] = animation
        log_preview(trainer, scalars, pictures)

    def _generated(self, trainer: Trainer, module: LightningModule) -> Tensor:
        """The fixed clips' raw latents, all after the context generated by the averaged weights: (B, F, C, H, W)."""
        backbone, schedule = module.backbone, module.schedule
        assert isinstance(backbone, GPDiT)
        assert isinstance(schedule, NoiseSchedule)
        fixed = self._fixed
        known = self._codec.whitened(fixed.latents[:, : fixed.context].to(module.device))
        config = GenerationConfig(RotationSampler(self.sampler_steps, schedule=schedule))
        ema = next((callback for callback in trainer.callbacks if isinstance(callback, EMA)), None)  # type: ignore[attr-defined]
        was_training = backbone.training
        backbone.eval()
        with ema.averaged(module) if ema else nullcontext(), trainer.precision_plugin.forward_context():
            wanted = fixed.latents.shape[1] - fixed.context
            frames = list(rollout(backbone, known, wanted, config, ClipInputs(fixed.seed)))
        backbone.train(was_training)
        return self._codec.unwhitened(torch.cat([known, torch.stack(frames, dim=1)], dim=1))


@dataclass(frozen=True)
class FixedClips:
    """What all previews of a run continue.

    Attributes:
        source, split: where in the data they are.
        latents: (B, F, C, H, W) float32, raw.
        context: latent frames given; 0 generates from nothing.
        frames_alone: each latent frame is one picture by itself (sequences and images), not four of a video.
        fps: pixel frames a second.
        seed: of the noise.
    """

    source: str
    split: Split
    latents: Tensor
    context: int
    frames_alone: bool
    fps: float
    seed: int


def fixed_clips(data: LatentDataModule, clips: int, context_frames: int) -> FixedClips:
    """Held-out clips of the longest kind; of sequences where there are no videos, else of images.

    They are spread evenly, so that each of several data sets, which lie one after the other, is among them.

    Raises:
        InputError: videos that have no frames after the context.
    """
    source = next(name for name in ("videos", "sequences", "images") if name in data.buckets["train"])
    split: Split = "validation" if source in data.buckets["validation"] else "train"
    bucket = max(data.buckets[split][source], key=lambda bucket: bucket.frames)
    if source == "videos" and context_frames >= bucket.frames:
        raise InputError(
            f"preview.context_frames is {context_frames}, but the clips of data.videos have {bucket.frames} latent "
            f"frames: leave at least one to be generated, or give {NO_PREVIEWS}."
        )
    count = min(clips, len(bucket))
    reads = [bucket.read(place * len(bucket) // count) for place in range(count)]
    return FixedClips(
        source=source,
        split=split,
        latents=torch.from_numpy(np.stack([read.latents for read in reads])).float(),
        context=context_frames if source == "videos" else bucket.frames - 1,
        frames_alone=source != "videos",
        fps=frame_rate(reads[0].metadata),
        seed=data.seed,
    )


def frame_rate(metadata: dict[str, Any]) -> float:
    """Frames a second of a clip, at the stride it was taken with; a usual rate where nobody noted it."""
    return metadata["fps"] / metadata["stride"] if {"fps", "stride"} <= metadata.keys() else USUAL_RATE


def decode(codec: Codec, latents: Tensor, frames_alone: bool) -> Tensor:
    """Raw latents (B, F, C, H, W) to uint8 pixels (B, T, 3, height, width) on the CPU, a clip at a time for memory.

    Where each frame was encoded alone it is decoded alone, and T = F.
    """
    if frames_alone:
        return torch.stack([codec.decode(clip[:, None])[:, 0].cpu() for clip in latents])
    return torch.cat([codec.decode(clip[None]).cpu() for clip in latents])


def rollout_error(prediction: Tensor, truth: Tensor, context: int) -> dict[str, float]:
    """Mean squared error of the generated frames in 8-bit levels, and its ratio to that of repeating the last frame.

    Args:
        prediction, truth: (B, T, 3, H, W) uint8.
        context: pixel frames that were given, at least 1.

    Returns:
        `sample/rollout_error`, and `sample/rollout_error_ratio` unless nothing moves.
    """
    future, last = truth[:, context:].float(), truth[:, context - 1 : context].float()
    error = (prediction[:, context:].float() - future).square().mean().item()
    repeated = (last - future).square().mean().item()
    ratio = {"sample/rollout_error_ratio": error / repeated} if repeated > 0 else {}
    return {"sample/rollout_error": error} | ratio


def log_preview(trainer: Trainer, scalars: dict[str, float], pictures: dict[str, Path]) -> None:
    """Log against the optimizer step; the pictures, tag -> file, go to TensorBoard byte for byte."""
    for logger in trainer.loggers:
        if scalars:
            logger.log_metrics(scalars, step=trainer.global_step)
        if isinstance(logger, TensorBoardLogger):
            for tag, path in pictures.items():
                with Image.open(path) as picture:
                    width, height = picture.size
                # SummaryWriter has no method for a GIF: its add_video wants moviepy, and silently does without.
                image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
                summary = Summary(value=[Summary.Value(tag=tag, image=image)])
                logger.experiment.file_writer.add_summary(summary, trainer.global_step)
            logger.experiment.flush()
