"""The report of an evaluation: its scores with everything they depend on, as records and as JSON."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Literal, Self

from gpdit_lightning.diffusion import Guidance, NoiseSchedule
from gpdit_lightning.evaluation.json_records import load_record, record_from_json
from gpdit_lightning.evaluation.metrics import mean_and_deviation
from gpdit_lightning.evaluation.network_files import NetworkRecord
from gpdit_lightning.evaluation.self_checks import SelfChecks
from gpdit_lightning.media.images import Size

REMEDY = "give the results.json of an evaluation by this version"
HEADINGS = {
    "fid": "FID ↓",
    "is": "IS ↑",
    "fvd": "FVD ↓",
    "precision": "Precision ↑",
    "recall": "Recall ↑",
    "psnr": "PSNR ↑",
    "ssim": "SSIM ↑",
}


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that videos, networks and scores depend on."""
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
    """Of the names of the videos in their order."""
    videos: int
    context_frames: int
    generated_frames: int
    fvd_frames: Literal["all", "generated"]
    """Input of the video network: all frames of a clip, or the generated ones."""
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
    """Number of latest latent frames that a frame attends to; None: all."""
    precision: str
    """Data type of matrix products in the model."""
    checkpoint: str
    """As named in the command."""
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


@dataclass(frozen=True)
class Score:
    """A score: mean and deviation over seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation; None for a single seed."""
    per_seed: tuple[float, ...]

    @classmethod
    def of(cls, per_seed: Sequence[float]) -> Self:
        """The score of values, one per seed."""
        return cls(*mean_and_deviation(per_seed), tuple(per_seed))

    def __str__(self) -> str:
        decimals = 1 if abs(self.mean) >= 100 else 2 if abs(self.mean) >= 10 else 3
        shown = f"{self.mean:.{decimals}f}"
        return shown if self.deviation is None else f"{shown} ± {self.deviation:.{decimals}f}"


@dataclass(frozen=True)
class Report:
    """Scores with their protocol."""

    protocol: Protocol
    scores: dict[str, Score]
    """By keys of `HEADINGS`."""
    references: dict[str, dict[str, Score]] = field(default_factory=dict)
    """Scores of videos that no model generated, such as the ground truth, by their name."""
    self_checks: dict[str, SelfChecks] = field(default_factory=dict)
    """By the distance's key in `HEADINGS`."""
    warnings: tuple[str, ...] = ()
    date: str = field(default_factory=lambda: date.today().isoformat())

    def to_json(self) -> str:
        """The report as JSON; raises `ValueError` for NaN or infinity, which JSON lacks."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str = "the report") -> Self:
        """The report that :meth:`to_json` wrote.

        Args:
            text: JSON.
            name: of its file, for messages.

        Raises:
            InputError: the text is anything else; a field that is missing or unknown is named.
        """
        return record_from_json(cls, text, name, REMEDY)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a `results.json`; raises as :meth:`from_json`, and when it is missing."""
        return load_record(cls, path, REMEDY)
