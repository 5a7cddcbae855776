"""Held-out clips, and their continuations by the averaged weights, for previews and scores.

Shapes: B clips, F latent frames, C channels, H x W latent pixels, T pixel frames.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from gpdit_lightning.codecs import Codec, CodecNotAllowedError, load_codec_from_spec
from gpdit_lightning.data.buckets import Bucket
from gpdit_lightning.data.datamodule import LatentDataModule
from gpdit_lightning.data.shard_entry import Split
from gpdit_lightning.diffusion import Sampler
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation import ClipInputs, GenerationConfig, rollout
from gpdit_lightning.model import GPDiT, GPDiTConfig
from gpdit_lightning.model.layout import BlockLayout
from gpdit_lightning.specs import CodecSpec
from gpdit_lightning.training.callbacks.ema import EMA


class StepInterval:
    """Decides after each micro-batch whether something that is due every n optimizer steps is due.

    Args:
        steps: n; 0 for never.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._last_step = 0

    def start(self, trainer: Trainer) -> None:
        """Store the step from which the run starts or resumes; call it when training starts."""
        self._last_step = trainer.global_step

    def is_over(self, trainer: Trainer) -> bool:
        """Return whether this micro-batch ended an optimizer step at the end of an interval or of the run."""
        step = trainer.global_step
        ends_step, self._last_step = step != self._last_step, step
        return ends_step and self.is_end(step, trainer)

    def is_end(self, step: int, trainer: Trainer) -> bool:
        """Return whether a step is the last of an interval or of the run."""
        return self.steps > 0 and step > 0 and (step % self.steps == 0 or step == trainer.max_steps)


@dataclass(frozen=True)
class ClipSamples:
    """Clips that were read.

    Attributes:
        latents: (B, F, C, H, W) float16, raw.
        metadata: metadata of each clip.
    """

    latents: Tensor
    metadata: Sequence[dict[str, Any]]


@dataclass(frozen=True)
class HeldOutClips:
    """Clips of one bucket, selected to be continued.

    Attributes:
        source, split: the source and the split of the data to which they belong.
        bucket: the bucket.
        numbers: their numbers in the bucket.
        context: number of latent frames of context.
    """

    source: str
    split: Split
    bucket: Bucket
    numbers: Sequence[int]
    context: int

    @property
    def independent_frames(self) -> bool:
        """Whether each latent frame is one image, encoded alone (sequences and images)."""
        return self.source != "videos" or self.bucket.frames == 1

    @property
    def generated(self) -> int:
        """Number of latent frames after the context."""
        return self.bucket.frames - self.context

    def context_pixel_frames(self, codec: Codec) -> int:
        """Return the number of pixel frames of context."""
        if self.context == 0:
            return 0
        return self.context if self.independent_frames else codec.pixel_frames(self.context)

    def read(self, start: int, stop: int) -> ClipSamples:
        """Read the clips from number `start` to `stop` (exclusive) of the selection."""
        samples = [self.bucket.read(number) for number in self.numbers[start:stop]]
        latents = torch.from_numpy(np.stack([sample.latents for sample in samples]))
        return ClipSamples(latents, [sample.metadata for sample in samples])


def select_clips(data: LatentDataModule, clips: int, context_frames: int, config: GPDiTConfig) -> HeldOutClips:
    """Select held-out videos with the most frames; sequences if there are no videos, else images.

    They are evenly spaced in the largest bucket with that length: a bucket may contain several data sets in succession.

    Args:
        data: the data of the run.
        clips: maximum number of clips.
        context_frames: latent frames of context of a video, of which whole blocks are used: at least so many frames if
            a block follows them, else as many as possible.
        config: the architecture, which determines the blocks.
    """
    source = next(name for name in ("videos", "sequences", "images") if name in data.buckets["train"])
    split: Split = "validation" if source in data.buckets["validation"] else "train"
    bucket = max(data.buckets[split][source], key=lambda bucket: (bucket.frames, len(bucket)))
    count = min(clips, len(bucket))
    layout = BlockLayout.of(config, bucket.height, bucket.width)
    return HeldOutClips(
        source=source,
        split=split,
        bucket=bucket,
        numbers=[number * len(bucket) // count for number in range(count)],
        context=layout.context_within(bucket.frames, context_frames if source == "videos" else bucket.frames),
    )


def open_codec(spec: CodecSpec, source: str | None, codec: str | None, option: str, purpose: str) -> Codec:
    """Load the codec of the data, on the CPU.

    Args:
        spec: the codec, as recorded in the prepared data.
        source: folder, file or hub name of its weights; None: the default.
        codec: import path of its class, if it is a custom one; else None.
        option: section of the recipe whose `every_steps` is set to 0 to do without the codec, for messages.
        purpose: what needs the codec, for messages.

    Raises:
        InputError: the codec cannot be loaded.
    """
    try:
        with torch.random.fork_rng(devices=[]):  # a network is initialized at random before its weights are loaded
            return load_codec_from_spec(spec, "cpu", source, "The training data", codec or None, "--preview.codec")
    except InputError as error:
        if codec or isinstance(error, CodecNotAllowedError):
            raise
        raise InputError(
            f"the {purpose} need the codec {spec.name!r}, which cannot be loaded from {source or 'the package'} "
            f"({str(error).rstrip('.')}): give --preview.codec_source PATH, or --{option}.every_steps 0 for no "
            f"{purpose}."
        ) from None


@contextmanager
def averaged_backbone(trainer: Trainer, module: LightningModule) -> Iterator[GPDiT]:
    """Return the backbone in evaluation mode, with the averaged weights if there are any, for a block.

    If the weights are sharded, all ranks must enter the block.
    """
    backbone = module.backbone
    assert isinstance(backbone, GPDiT)
    ema = next((callback for callback in trainer.callbacks if isinstance(callback, EMA)), None)  # type: ignore[attr-defined]
    was_training = backbone.training
    backbone.eval()
    try:
        with ema.averaged(module) if ema else nullcontext():
            yield backbone
    finally:
        backbone.train(was_training)


def continue_clips(
    trainer: Trainer,
    backbone: GPDiT,
    codec: Codec,
    context: Tensor,
    frames: int,
    sampler: Sampler,
    inputs: ClipInputs,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> Tensor | None:
    """Generate latent frames in the precision of training.

    Args:
        trainer: gives the precision.
        backbone: from :func:`averaged_backbone`.
        codec: gives the whitening.
        context: (B, k, C, H, W) raw, on the device of the backbone.
        frames: number of latent frames to generate.
        sampler: the sampler.
        inputs: seeds and conditions of the clips.
        is_interrupted: called after each latent frame; whether to give up.

    Returns:
        (B, k + frames, C, H, W) raw latents; None if interrupted.
    """
    clips = [codec.whitened(context)]
    with trainer.precision_plugin.forward_context():
        for latent in rollout(backbone, clips[0], frames, GenerationConfig(sampler), inputs):
            clips.append(latent[:, None])
            if is_interrupted():
                return None
    return codec.unwhitened(torch.cat(clips, dim=1))


def decode(codec: Codec, latents: Tensor, independent_frames: bool) -> Tensor:
    """Decode raw latents (B, F, C, H, W) to uint8 pixels (B, T, 3, height, width) on the codec's device, clip by clip.

    Independent frames are decoded one by one, and T = F.
    """
    if independent_frames:
        return torch.stack([codec.decode(clip[:, None])[:, 0] for clip in latents])
    return torch.cat([codec.decode(clip[None]) for clip in latents])
