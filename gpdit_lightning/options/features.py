"""Options of `features`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpdit_lightning.errors import InputError
from gpdit_lightning.options.shared import (
    MAX_WORKERS,
    CheckpointOptions,
    LoadingOptions,
    OptionRecord,
    PrecisionOptions,
    VideoOptions,
    check_at_least,
    check_at_most,
)

MAX_TEMPORAL_TOKENS = 2**16  # far above any clip
FeatureFormat = Literal["npy", "pickle"]


@dataclass(frozen=True, kw_only=True)
class LayerOptions(CheckpointOptions):
    """Model."""

    layer: int | None = None
    """Number of blocks to run. The features are the residual stream after the last of them. By default three quarters
    of the blocks of the model, as in GPDiT (18 of the 24 of H)."""


@dataclass(frozen=True, kw_only=True)
class ClipOptions(VideoOptions):
    """Videos."""

    frames: int | None = None
    """Pixel frames of the clip of each video, 1 + k times the temporal factor of the codec; by default those of the
    longest training clips."""
    stride: int | None = None
    """Video frames from one frame of the clip to the next. The clip is the middle of its video; short videos are
    sampled more densely. 0 spaces the frames evenly over the whole video, as in Video-ChatGPT. By default the stride of
    training."""


@dataclass(frozen=True, kw_only=True)
class FeatureBatchOptions(OptionRecord):
    """Computation."""

    batch_size: int = 4
    """Videos per batch."""
    workers: int = 4
    """Processes that read videos; 0: the main process reads them."""


@dataclass(frozen=True, kw_only=True)
class FeatureFileOptions(OptionRecord):
    """Output."""

    out: Path
    """Folder for the features. A file has the name of its video, relative to the folder in --videos."""
    format: FeatureFormat = "npy"
    """npy for VideoFeatures of this library, pickle for the loader of Video-ChatGPT."""
    temporal_tokens: int = 0
    """Number of temporal tokens after padding with zeros, at least the number of latent frames; 0: no padding."""


@dataclass(frozen=True, kw_only=True)
class FeaturesOptions(
    LayerOptions, ClipOptions, FeatureFileOptions, FeatureBatchOptions, PrecisionOptions, LoadingOptions
):
    """Features."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, layer=1, frames=1, batch_size=1, workers=0, temporal_tokens=0)
        check_at_most(self, workers=MAX_WORKERS, temporal_tokens=MAX_TEMPORAL_TOKENS)
        if self.stride is not None and self.stride < 0:
            raise InputError(
                f"--stride is {self.stride}: give at least 1, or 0 for frames spaced evenly over the whole video."
            )
