"""Options of `features`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpdit_lightning.errors import InputError
from gpdit_lightning.options.shared import (
    CheckpointOptions,
    LoadingOptions,
    PrecisionOptions,
    VideoOptions,
    check_at_least,
)

FeatureFormat = Literal["npy", "pickle"]


@dataclass(frozen=True, kw_only=True)
class LayerOptions(CheckpointOptions):
    """Model."""

    layer: int
    """Number of blocks that are run; the features are the residual stream after the last of them (GPDiT: 18 of H's
    24)."""


@dataclass(frozen=True, kw_only=True)
class ClipOptions(VideoOptions):
    """Videos."""

    frames: int | None = None
    """Pixel frames of the clip of a video, 1 + 4k; by default those of the longest training clips."""
    stride: int | None = None
    """Video frames from one frame of the clip to the next. The clip is the middle of its video, and sampled more
    densely if the video is too short; 0 spreads it evenly over the whole video, as Video-ChatGPT does. By default the
    stride of training."""


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Computation."""

    batch_size: int = 4
    """Videos per batch."""
    workers: int = 4
    """Processes that read videos; 0 reads in the main process."""


@dataclass(frozen=True, kw_only=True)
class FeatureFileOptions:
    """Output."""

    out: Path
    """Folder for the features; a file has the name of its video, relative to the folder in --videos."""
    format: FeatureFormat = "npy"
    """npy for this library's VideoFeatures, pickle for Video-ChatGPT's loader."""
    temporal_tokens: int = 0
    """Pad the temporal tokens with zeros to this number, at least the number of latent frames; 0 pads nothing."""


@dataclass(frozen=True, kw_only=True)
class FeaturesOptions(LayerOptions, ClipOptions, FeatureFileOptions, BatchOptions, PrecisionOptions, LoadingOptions):
    """Features."""

    def __post_init__(self) -> None:
        check_at_least(self, layer=1, frames=1, batch_size=1, workers=0, temporal_tokens=0)
        if self.stride is not None and self.stride < 0:
            raise InputError(
                f"--stride is {self.stride}: give at least 1, or 0 for a clip that is spread over the whole video."
            )
