"""Options of `evaluate`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gpdit_lightning.errors import InputError
from gpdit_lightning.options.prepare import ImageScaling
from gpdit_lightning.options.shared import (
    MAX_COUNT,
    ContextNoiseOptions,
    LabelGuidanceOptions,
    ModelOptions,
    OptionRecord,
    SamplerOptions,
    SizeOptions,
    check_at_least,
    check_at_most,
    check_has_effect,
)

LabelRule = Literal["balanced", "uniform", "data"]


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
class DataSetOptions(SizeOptions):
    """Videos."""

    videos: Sequence[str] = ()
    """Videos, folders that are searched for videos recursively, and .txt lists with one path per line."""
    images: Sequence[str] = ()
    """The same for images, with which the samples of a model of images are compared."""
    reference: Path | None = None
    """Statistics of real images or videos, instead of these: the reference.safetensors of an earlier evaluation, or an
    .npz of ADM (arr_0: images, mu and sigma: mean and covariance of Inception features, or both)."""
    image_scaling: ImageScaling = "bicubic"
    """How images are scaled before the centre crop: bicubic with antialiasing, or as ADM scales them."""
    data: str | None = None
    """Name of the data set, for the report; by default the name of the folder in --videos."""
    count: int | None = None
    """Number of real videos or images (GPDiT: 10,000 of UCF-101, 7,000 of MSR-VTT); by default all images, and all
    videos that are long enough, at most 10,000."""
    selection_seed: int = 0
    """Seed of the random selection of videos or images, by a hash of their names."""
    labels: bool = True
    """Condition a model that was trained with labels on the label of each video: the one that --annotations gives, else
    the name of its folder. --no_labels scores such a model without labels."""
    annotations: Sequence[Path] = ()
    """Files with the labels of the videos or images, in the formats that `prepare` accepts."""
    context_frames: int | None = None
    """Pixel frames of context, 1 + k times the temporal factor of the codec, 4 for wan and pca, 1 for sd; 0 scores
    samples from noise alone. By default 5, as in GPDiT, or fewer for a model that was trained on clips of at most 5
    frames; 0 for a model of images or of whole clips."""
    generated_frames: int | None = None
    """Pixel frames to generate. By default 12, as in GPDiT, or as many as follow the context in training clips that are
    shorter; samples from noise alone have the frames of training clips."""
    stride: int | None = None
    """Video frames from one frame of a clip to the next; by default the stride of training."""


@dataclass(frozen=True, kw_only=True)
class SampleSetOptions(OptionRecord):
    """Samples from noise alone."""

    samples: int | None = None
    """Number of images or videos to generate from noise alone; by default 50,000 images (FID-50K), or as many videos as
    there are real ones."""
    sample_labels: LabelRule = "balanced"
    """Label of a sample, a function of its number: balanced gives number modulo classes; uniform draws it uniformly, as
    ADM and DiT do; data draws it by the class frequencies of the real images or videos."""


@dataclass(frozen=True, kw_only=True)
class ContinuationOptions(LabelGuidanceOptions, ContextNoiseOptions, SamplerOptions):
    """Generation."""

    seeds: Sequence[int] = (0,)
    """Seeds of the noise. All videos or samples are generated once per seed; scores are reported as mean and standard
    deviation over seeds."""
    window: int | None = None
    """Number of latent frames before it that a frame attends to; by default as in training. In an of2 model a clean
    frame of the context attends to this many too, itself included."""


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(OptionRecord):
    """Scores."""

    video_network: NetworkOptions | None = None
    """Network for FVD, and for precision and recall of videos; without it these scores are left out."""
    image_network: NetworkOptions | None = None
    """Network for FID and IS, and for precision and recall of images; without it these scores are left out."""
    classifier: NetworkOptions | None = None
    """Classifier for IS, if the image network returns no class probabilities."""
    fvd_frames: Literal["all", "generated"] = "all"
    """Input of the video network: all frames including the context (GPDiT), or only the generated ones."""
    self_check_videos: int = 512
    """Number of real videos or images that are also scored with noise and with blur, to verify that distances rise; 0
    disables the self-checks."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOutputOptions(OptionRecord):
    """Output."""

    out: Path
    """Folder for the report and the intermediate results. The same command resumes from them."""
    keep_videos: int = 0
    """Number of videos, from the first of the selection, whose continuations and ground truth are kept as mp4; and of
    samples from noise alone, images as PNG."""


@dataclass(frozen=True, kw_only=True)
class ChunkOptions(OptionRecord):
    """Computation."""

    chunk: int = 16
    """Videos or images per chunk. A chunk is generated as one batch; a stopped process repeats at most one chunk. The
    last digits of the scores depend on this number, but not on the number of processes."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(
    ModelOptions,
    DataSetOptions,
    SampleSetOptions,
    ContinuationOptions,
    ScoreOptions,
    EvaluationOutputOptions,
    ChunkOptions,
):
    """Evaluate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, count=2, context_frames=0, generated_frames=1, stride=1, steps=1, window=1)
        check_at_least(self, self_check_videos=0, keep_videos=0, chunk=1, samples=2)
        check_at_most(self, generated_frames=MAX_COUNT, samples=MAX_COUNT)
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"--seeds are {list(self.seeds)}: give one or more different numbers, each at least 0.")
        if not self.labels:
            check_has_effect(self, "with --no_labels", "label_guidance", "sample_labels")
        if self.reference is not None:
            check_has_effect(self, "with --reference", "count", "selection_seed", "annotations")
        if self.video_network is None:
            check_has_effect(self, "without --video_network", "fvd_frames")
        if self.classifier is not None and self.image_network is None:
            raise InputError("a classifier is given without an image_network: give both, since IS requires both.")
