"""Options of `evaluate`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gpdit_lightning.errors import InputError
from gpdit_lightning.options.shared import (
    LabelGuidanceOptions,
    ModelOptions,
    OptionRecord,
    SamplerOptions,
    VideoOptions,
    check_at_least,
)


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """A network whose features or class probabilities scores are computed from.

    Give the file of a published network, or a custom class (docs/extending.md):

        video_network: {path: weights/i3d_torchscript.pt}
        video_network: {kind: my_package.metrics.ClipFeatures, arguments: {layer: 8}}
    """

    path: str | None = None
    """File of the weights on this machine; a custom class receives it as the argument `path`."""
    sha256: str | None = None
    """Expected sha256 of the file; another file is rejected before it is loaded."""
    kind: str | None = None
    """Import path of a custom class; by default the published network of the score: I3D for FVD, Inception-v3 for FID
    and IS."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of the custom class."""


@dataclass(frozen=True, kw_only=True)
class DataSetOptions(VideoOptions):
    """Videos."""

    data: str | None = None
    """Name of the data set, for the report; by default the name of the folder in --videos."""
    count: int | None = None
    """Number of videos to continue (GPDiT: 10,000 of UCF-101, 7,000 of MSR-VTT); by default all that are long enough,
    at most 10,000."""
    selection_seed: int = 0
    """Seed of the random selection of videos, by a hash of their names."""
    labels: bool = True
    """Condition a model that was trained with labels on the label of each video: the one that --annotations gives, else
    the name of its folder. --no_labels scores such a model without labels."""
    annotations: Sequence[Path] = ()
    """Files with the labels of the videos, in the formats that `prepare` accepts."""
    context_frames: int | None = None
    """Pixel frames of context, 1 + k times the temporal factor of the codec, 4 for wan and pca, 1 for sd; 0 generates
    each video from noise alone. By default 5, as in GPDiT, or fewer for a model that was trained on clips of at most 5
    frames."""
    generated_frames: int | None = None
    """Pixel frames to generate. By default 12, as in GPDiT, or as many as follow the context in training clips that are
    shorter."""
    stride: int | None = None
    """Video frames from one frame of a clip to the next; by default the stride of training."""


@dataclass(frozen=True, kw_only=True)
class ContinuationOptions(LabelGuidanceOptions, SamplerOptions):
    """Generation."""

    seeds: Sequence[int] = (0,)
    """Seeds of the noise. All videos are continued once per seed; scores are reported as mean and standard deviation
    over seeds."""
    window: int | None = None
    """Number of latent frames before it that a frame attends to; by default as in training. In an of2 model a clean
    frame of the context attends to this many too, itself included."""


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(OptionRecord):
    """Scores."""

    video_network: NetworkOptions | None = None
    """Network for FVD, precision and recall; without it these scores are left out."""
    image_network: NetworkOptions | None = None
    """Network for FID and IS; without it these scores are left out."""
    classifier: NetworkOptions | None = None
    """Classifier for IS, if the image network returns no class probabilities."""
    fvd_frames: Literal["all", "generated"] = "all"
    """Input of the video network: all frames including the context (GPDiT), or only the generated ones."""
    self_check_videos: int = 512
    """Number of videos whose ground truth is also scored with noise and with blur, to verify that distances rise; 0
    disables the self-checks."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOutputOptions(OptionRecord):
    """Output."""

    out: Path
    """Folder for the report and the intermediate results. The same command resumes from them."""
    keep_videos: int = 0
    """Number of videos, from the first of the selection, whose continuations and ground truth are kept as mp4."""


@dataclass(frozen=True, kw_only=True)
class ChunkOptions(OptionRecord):
    """Computation."""

    chunk: int = 16
    """Videos per chunk. A chunk is generated as one batch; a stopped process repeats at most one chunk. The last digits
    of the scores depend on this number, but not on the number of processes."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(
    ModelOptions,
    DataSetOptions,
    ContinuationOptions,
    ScoreOptions,
    EvaluationOutputOptions,
    ChunkOptions,
):
    """Evaluate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, count=2, context_frames=0, generated_frames=1, stride=1, steps=1, window=1)
        check_at_least(self, self_check_videos=0, keep_videos=0, chunk=1)
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"--seeds are {list(self.seeds)}: give one or more different numbers, each at least 0.")
        if not self.labels and self.label_guidance != 1:
            raise InputError(
                f"--label_guidance is {self.label_guidance} without labels: leave --no_labels or --label_guidance out."
            )
        if self.classifier is not None and self.image_network is None:
            raise InputError("a classifier is given without an image_network: give both, since IS requires both.")
