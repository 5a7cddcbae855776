"""Previews: a few clips, continued from fixed noise at intervals during training, next to the ground truth."""

import logging
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from gpdit_lightning.codecs import Codec
from gpdit_lightning.data.datamodule import LatentDataModule
from gpdit_lightning.diffusion import NoiseSchedule, Sampler, make_sampler
from gpdit_lightning.diffusion.samplers import check_sampler_name
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation import ClipInputs
from gpdit_lightning.generation.rollout import check_sampler
from gpdit_lightning.media.images import write_animation, write_strip
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.training.callbacks.held_out import (
    HeldOutClips,
    StepInterval,
    averaged_backbone,
    continue_clips,
    decode,
    open_codec,
    select_clips,
)
from gpdit_lightning.training.loggers import check_image_methods, log_images, without_images
from gpdit_lightning.training.strategies.sharding import sharded_strategy_of

log = logging.getLogger(__name__)

STRIP_COLUMNS = 9  # every second of 17 frames, as in the paper's figures
DEFAULT_FRAME_RATE = 8.0  # frames per second: every third frame, as in the paper, of 24
NO_PREVIEWS = "--preview.every_steps 0 for no previews"


class Preview(Callback):
    """Continues a few held-out clips with the averaged weights at intervals, always from the same noise.

    Writes `previews/step-N.png` (a strip of frames) and `.gif` (generated frames and ground truth) to the run folder,
    and logs them as `sample/strip` and `sample/video` to every logger that accepts images. Also logs
    `sample/rollout_error`, the mean squared error of the generated pixels in 8-bit levels, and
    `sample/rollout_error_ratio`, its ratio to the error of repeating the last context frame: below 1 the model has
    learned motion. If the data have no videos, the last frame of sequences is generated from the others; if they have
    no sequences either, images are generated without context, as are videos that are one block of the model. Previews
    do not change the training.

    Args:
        every_steps: optimizer steps between previews, which are also made at the last step; 0 for none.
        clips: number of clips, evenly spaced among the longest held-out clips, from every data set.
        context_frames: latent frames of context, rounded up to whole blocks of the model, fewer in shorter videos; 2
            are 5 pixel frames of a video.
        sampler: rotation, tangent, adams, dpm2m, stochastic, a registered name, or the import path of a class.
        sampler_steps: sampler steps per latent frame.
        codec_source: folder, file or hub name of the codec's weights, also for scores; None: as recorded in the
            prepared data.
        codec: import path of the codec's class, also for scores, if the data were prepared with a custom one.
    """

    def __init__(
        self,
        every_steps: int = 0,
        clips: int = 4,
        context_frames: int = 2,
        sampler: str = "rotation",
        sampler_steps: int = 25,
        codec_source: str | None = None,
        codec: str | None = None,
    ) -> None:
        if every_steps < 0:
            raise InputError(f"preview.every_steps is {every_steps}; it must be 0 (no previews) or more.")
        for name, value in (("clips", clips), ("context_frames", context_frames), ("sampler_steps", sampler_steps)):
            if value < 1:
                raise InputError(f"preview.{name} is {value}; it must be at least 1, or give {NO_PREVIEWS}.")
        check_sampler_name(sampler, "preview.sampler")
        self.every_steps, self.clips, self.context_frames = every_steps, clips, context_frames
        self.sampler, self.sampler_steps, self.codec_source, self.codec = sampler, sampler_steps, codec_source, codec
        self._interval = StepInterval(every_steps)
        self._selected: HeldOutClips
        self._latents: Tensor  # (B, F, C, H, W) float32, raw
        self._fps: float  # pixel frames per second
        self._seed: int
        self._sampler: Sampler
        self._codec: Codec

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the clips, load the codec and test the sampler, on every rank: if one rank cannot, all ranks stop.

        Raises:
            InputError: the codec cannot be loaded, or the sampler fails.
        """
        if self.every_steps == 0:
            return
        check_image_methods(trainer.loggers)
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, LatentDataModule)
        config, schedule = pl_module.config, pl_module.schedule
        assert isinstance(config, GPDiTConfig)
        assert isinstance(schedule, NoiseSchedule)
        self._selected = select_clips(data, self.clips, self.context_frames, config)
        samples = self._selected.read(0, self.clips)
        self._latents, self._fps, self._seed = samples.latents.float(), frame_rate(samples.metadata[0]), data.seed
        self._codec = open_codec(data.codec, self.codec_source, self.codec, "preview", "previews")
        self._sampler = make_sampler(self.sampler, self.sampler_steps, schedule)
        check_sampler(self._sampler, *self._latents[:, 0].shape)
        for logger in without_images(trainer.loggers) if trainer.is_global_zero else ():
            log.info("%s accepts no images: previews are files in %s", type(logger).__name__, self._folder(trainer))
        if self._selected.split == "train" and trainer.is_global_zero:
            log.warning(
                "no samples of data.%s are held out: the previews are of training samples.", self._selected.source
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the step of a resumed run: its preview has been written."""
        self._interval.start(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Make a preview at the end of an interval, on the first rank while the others wait."""
        if self._interval.is_over(trainer):
            # If the weights are sharded, all ranks compute: each holds a part of every layer.
            if trainer.is_global_zero or sharded_strategy_of(pl_module) is not None:
                latents = self._generate(trainer, pl_module)
                if trainer.is_global_zero:
                    self._write(trainer, pl_module, latents)
            trainer.strategy.barrier()

    @staticmethod
    def _folder(trainer: Trainer) -> Path:
        """Return the folder of the files."""
        return Path(trainer.default_root_dir) / "previews"

    def _generate(self, trainer: Trainer, module: LightningModule) -> Tensor:
        """Generate the frames after the context with the averaged weights; return raw latents (B, F, C, H, W)."""
        clips = self._selected
        context = self._latents[:, : clips.context].to(module.device)
        with averaged_backbone(trainer, module) as backbone:
            latents = continue_clips(
                trainer, backbone, self._codec, context, clips.generated, self._sampler, ClipInputs(self._seed)
            )
        assert latents is not None
        return latents

    def _write(self, trainer: Trainer, module: LightningModule, latents: Tensor) -> None:
        """Decode generated latents (B, F, C, H, W), measure the error, write the files and log."""
        clips = self._selected
        # Between previews the codec is in host memory, to leave the accelerator's memory to the training.
        codec = self._codec.to(module.device)
        generated, truth = (decode(codec, raw, clips.independent_frames).cpu() for raw in (latents, self._latents))
        codec.to("cpu")
        if not latents.isfinite().all():  # the decoded frames are on the CPU, so that the host does not wait again
            log.warning(
                "the preview of step %d is not finite, because of sampler '%s' or the weights",
                trainer.global_step,
                self.sampler,
            )
        context = clips.context_pixel_frames(codec)

        path = self._folder(trainer) / f"step-{trainer.global_step:06d}"
        images, scalars = {"sample/strip": path.with_suffix(".png")}, {}
        # Without a context, the generated clips do not correspond to the true ones.
        shown = {"generated": generated} | ({"ground truth": truth} if context else {})
        if clips.bucket.frames == 1:
            write_strip(images["sample/strip"], {"generated": generated[:, 0]}, columns=len(generated))
        else:
            rows = {f"{clip + 1} {name}": shown[name][clip] for clip in range(len(truth)) for name in shown}
            # Every image of a sequence is shown: one that is left out may be an example.
            columns = truth.shape[1] if clips.independent_frames else STRIP_COLUMNS
            write_strip(images["sample/strip"], rows, columns=columns, context=context)
        if context:
            scalars = rollout_error(generated, truth, context)
        if not clips.independent_frames:
            images["sample/video"] = path.with_suffix(".gif")
            write_animation(images["sample/video"], shown, self._fps, context=context)
        for logger in trainer.loggers:
            if scalars:
                logger.log_metrics(scalars, step=trainer.global_step)
        log_images(trainer.loggers, images, trainer.global_step)


def frame_rate(metadata: dict[str, Any]) -> float:
    """Return the frames per second of a clip, given its stride; a default if they were not recorded."""
    return metadata["fps"] / metadata["stride"] if {"fps", "stride"} <= metadata.keys() else DEFAULT_FRAME_RATE


def rollout_error(generated: Tensor, truth: Tensor, context: int) -> dict[str, float]:
    """Compute the mean squared error of the generated frames, and its ratio to that of repeating the last frame.

    Args:
        generated, truth: (B, T, 3, H, W) uint8.
        context: number of pixel frames of context, at least 1.

    Returns:
        `sample/rollout_error` in 8-bit levels, and `sample/rollout_error_ratio` unless the true frames are all equal.
    """
    future, last = truth[:, context:].float(), truth[:, context - 1 : context].float()
    error = (generated[:, context:].float() - future).square().mean().item()
    repeated = (last - future).square().mean().item()
    ratio = {"sample/rollout_error_ratio": error / repeated} if repeated > 0 else {}
    return {"sample/rollout_error": error} | ratio
