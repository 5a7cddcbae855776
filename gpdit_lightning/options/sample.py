"""Options of `sample`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpdit_lightning.errors import InputError
from gpdit_lightning.options.shared import (
    MAX_COUNT,
    BatchedSamplerOptions,
    ContextNoiseOptions,
    LabelGuidanceOptions,
    ModelOptions,
    OptionRecord,
    check_at_least,
    check_at_most,
    check_has_effect,
)

VideoFormat = Literal["mp4", "gif", "png", "safetensors"]
ALL_CLASSES = "all"  # the value of --label for all classes of a model; a class of this name is given by its number


@dataclass(frozen=True, kw_only=True)
class ContextOptions(OptionRecord):
    """Context."""

    context: Sequence[str] = ()
    """Videos, GIFs, images, folders of frames or of videos, and shards of latents (SHARD.tar, or one sample of it:
    SHARD.tar#NUMBER or SHARD.tar#KEY); without a context, a video is generated from noise alone."""


@dataclass(frozen=True, kw_only=True)
class ContextReadingOptions(OptionRecord):
    """Context."""

    context_frames: int | None = None
    """Pixel frames of a context, 1 + k times the temporal factor of the codec; by default those of the training clips
    less one latent frame, or as many as a shorter video has."""
    start: float | None = None
    """Time in seconds, by the video's time stamps, at which a context begins; by default it ends at the last frame."""
    fps: float | None = None
    """Frames per second of images and folders of frames; by default 24, or less at a smaller --stride."""
    stride: int | None = None
    """Distance between the frames of a video that are used; by default that of the training clips. 1 continues
    generated frames, which are at that stride already."""
    size: str | None = None
    """HEIGHTxWIDTH in pixels, one of the sizes of training; by default the closest in aspect."""
    label: Sequence[str] | str | None = None
    """Class to generate, by name or number; by default the label that a shard records for its sample, or none. Several
    classes, or `all`, are generated from noise alone."""


@dataclass(frozen=True, kw_only=True)
class RolloutOptions(LabelGuidanceOptions, ContextNoiseOptions, BatchedSamplerOptions):
    """Generation."""

    frames: int | None = None
    """Pixel frames to generate; by default 16, or those of a training clip for samples of classes and for a model of
    images."""
    samples: int = 1
    """Videos per context, with consecutive seeds."""
    count: int | None = None
    """Images or videos of each --label, from noise alone; the noise of each is a function of the seed, the label and
    its number. The files are named by class and number, and sheets show them by class."""
    window: int | None = None
    """Number of preceding latent frames that a new frame attends to; by default as many as in training. In an of2 model
    a clean frame of the context attends to this many too, itself included."""
    sinks: int = 0
    """Number of latent frames from the beginning of the video that stay visible besides the window."""
    cache: bool = True
    """Cache keys and values; --no_cache takes less memory and more time (for models with attention `of`)."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(ContextReadingOptions, RolloutOptions):
    """Context."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, frames=1, samples=1, count=1, stride=1)
        check_at_most(self, frames=MAX_COUNT, samples=MAX_COUNT, count=MAX_COUNT)
        if self.by_class and self.samples != 1:
            raise InputError(
                f"--samples is {self.samples}, but samples of classes are counted by --count: give --count instead."
            )

    @property
    def by_class(self) -> bool:
        """Whether samples of classes are generated from noise alone, instead of videos after contexts."""
        labels = self.label or ()
        return self.count is not None or len(labels) > 1 or ALL_CLASSES in labels


@dataclass(frozen=True, kw_only=True)
class CompileOptions(OptionRecord):
    """Generation."""

    compile: bool = False
    """Fuse blocks with torch.compile, for long videos on GPUs."""


@dataclass(frozen=True, kw_only=True)
class VideoOutputOptions(OptionRecord):
    """Output."""

    out: Path = Path("sample.mp4")
    """A file for one video, a folder for several."""
    formats: Sequence[VideoFormat] | None = None
    """mp4, gif, png (a strip of frames) and safetensors (raw latents); by default that of --out, else mp4 and png."""
    mark: bool = False
    """Draw a border in the mp4, gray around context frames and orange around generated ones."""
    side_by_side: bool = False
    """Show the ground truth, as far as it is known, to the right of the video."""


@dataclass(frozen=True, kw_only=True)
class SampleOptions(ModelOptions, GenerationOptions, ContextOptions, CompileOptions, VideoOutputOptions):
    """Sample."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.context:
            check_has_effect(self, "without --context", "context_frames", "start", "side_by_side")
