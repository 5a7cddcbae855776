"""The report of an evaluation: scores with everything they depend on, as dataclasses and as JSON."""

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

from gpdit_lightning.diffusion import Guidance, NoiseSchedule
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.json_records import load_record, record_from_json, record_to_json
from gpdit_lightning.evaluation.metrics import mean_and_deviation
from gpdit_lightning.evaluation.network_files import NetworkRecord
from gpdit_lightning.evaluation.self_checks import SelfChecks
from gpdit_lightning.media.images import Size
from gpdit_lightning.path_kinds import Medium

REMEDY = "give the results.json of an evaluation by this version"


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that videos, networks and scores depend on."""
    libraries = ("gpdit_lightning", "torch", "torchmetrics", "numpy", "av", "diffusers")
    return {"python": platform.python_version()} | {name: version(name) for name in libraries}


@dataclass(frozen=True)
class Protocol:
    """Everything that scores depend on."""

    data: str
    """Name of the data set."""
    choice: str
    """How videos were selected from it, and clips from the videos."""
    split_sha256: str
    """sha256 of the names of the videos, in their order."""
    videos: int
    context_frames: int
    generated_frames: int
    fvd_frames: Literal["all", "generated"]
    """Input of the video network: all frames of a clip, or only the generated ones."""
    size: Size
    """(height, width) in pixels."""
    stride: int
    resize: str
    """How frames are brought to that size."""
    sampler: str
    steps: int
    """Sampler steps per latent frame."""
    guidance: Guidance
    schedule: NoiseSchedule
    seeds: tuple[int, ...]
    window: int | None
    """Number of latent frames before it that a frame attends to; None: all."""
    precision: str
    """Data type of matrix products in the model."""
    checkpoint: str
    """Checkpoint, as given in the command."""
    checkpoint_sha256: str
    step: int
    """Number of optimizer steps."""
    weights: Literal["ema", "raw"]
    codec: str
    codec_sha256: str
    networks: dict[str, NetworkRecord]
    """By role: video, image, classifier."""
    versions: dict[str, str]
    hardware: str
    labels: str | None = None
    """How the label of each video, on which its continuation is conditioned, was found; None without labels."""
    fps: float | None = None
    """Frames per second to which videos were resampled before the stride; None if they were not."""
    medium: Medium = "video"
    samples: int | None = None
    """Number of samples from noise alone, which were compared with the real images or videos; None if the videos were
    continued."""
    reference: str | None = None
    """File of the statistics of the real data with its sha256; None if this evaluation computed them."""
    context_noise: float = 0.0
    """Angle in radians by which generated frames are rotated towards noise before later frames attend to them."""
    manifold: int | None = None
    """Number of real samples for precision and recall of samples from noise alone."""

    def __post_init__(self) -> None:
        if (self.samples is None) != (self.manifold is None):
            raise InputError(f"samples is {self.samples} and manifold {self.manifold}; both are null, or neither is")


# What determines a field of a protocol, by its name or the beginning of a dotted one; other fields are options.
DETERMINED_BY = {
    "data": "name of the data (--data, or the folders of --videos or --images)",
    "choice": "choice of the real data (--count, --selection_seed)",
    "split_sha256": "choice of the real data (--videos or --images, --count, --selection_seed)",
    "videos": "number of real videos or images (--count)",
    "frames": "number of frames (--generated_frames)",  # of statistics of real data
    "resize": "scaling (--image_scaling)",
    "guidance.context": "--guidance",
    "guidance.label": "--label_guidance",
    "guidance.least_level": "--guidance_levels",
    "guidance.most_level": "--guidance_levels",
    "schedule": "noise schedule of --checkpoint",
    "checkpoint_sha256": "--checkpoint",
    "step": "step of --checkpoint",
    "architecture": "architecture of --checkpoint",
    "codec": "codec of --checkpoint",
    "codec_sha256": "codec of --checkpoint",
    "networks.video": "--video_network",
    "networks.image": "--image_network",
    "networks.classifier": "--classifier",
    "versions": "version of a library",
    "hardware": "--device",
    "labels": "use of labels (--labels, --annotations, --sample_labels)",
    "fps": "frame rate of the training of --checkpoint",
    "medium": "medium of the real data (--videos or --images)",
    "manifold": "number of real videos or images (--count, --reference)",
}
MAX_SHOWN = 40  # characters of a value in a message: no hash and no sentence


def other_setting(different: Iterable[tuple[str, Any, Any]]) -> str:
    """Return the first of different settings as messages name it, such as "--guidance (1.5, not 2.0)".

    One with short values is preferred to a hash or a description, whose values are left out.

    Args:
        different: from :func:`schema.differences`, at least one.
    """
    described = [(determined_by(name), f"({first}, not {second})", first, second) for name, first, second in different]
    for name, values, first, second in described:
        if max(len(str(first)), len(str(second))) <= MAX_SHOWN:
            return f"{name} {values}"
    return described[0][0]


def determined_by(name: str) -> str:
    """Return the option that determines a field of a protocol, or in words what does."""
    parts = name.split(".")
    keys = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((DETERMINED_BY[key] for key in keys if key in DETERMINED_BY), f"--{name}")


@dataclass(frozen=True)
class Score:
    """A score: mean and standard deviation over seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation; None for a single seed."""
    per_seed: tuple[float, ...]

    @classmethod
    def of(cls, per_seed: Sequence[float]) -> Self:
        """Return the score of values, one per seed."""
        return cls(*mean_and_deviation(per_seed), tuple(per_seed))

    def __str__(self) -> str:
        decimals = 1 if abs(self.mean) >= 100 else 2 if abs(self.mean) >= 10 else 3
        mean = f"{self.mean:.{decimals}f}"
        return mean if self.deviation is None else f"{mean} ± {self.deviation:.{decimals}f}"


@dataclass(frozen=True)
class Report:
    """Scores with their protocol."""

    protocol: Protocol
    scores: dict[str, Score]
    """Scores by their keys in `names.SCORE_NAMES`."""
    references: dict[str, dict[str, Score]] = field(default_factory=dict)
    """Scores of videos that are not generated by the model, such as the ground truth, by the name of the reference."""
    self_checks: dict[str, SelfChecks] = field(default_factory=dict)
    """Self-checks by the key of the distance in `names.SCORE_NAMES`."""
    warnings: tuple[str, ...] = ()
    date: str = field(default_factory=lambda: date.today().isoformat())

    def to_json(self) -> str:
        """Return the report as JSON; errors as of `record_to_json`."""
        return record_to_json(self)

    @classmethod
    def from_json(cls, text: str, name: str = "the report") -> Self:
        """Parse a report that :meth:`to_json` wrote.

        Args:
            text: JSON.
            name: of the file, for error messages.

        Raises:
            InputError: the text is not a report; the message names a missing or unknown field.
        """
        return record_from_json(cls, text, name, REMEDY)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a `results.json`; raises as :meth:`from_json`, and if the file is missing."""
        return load_record(cls, path, REMEDY)
