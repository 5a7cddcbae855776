"""Options of `probe`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpdit_lightning.errors import InputError
from gpdit_lightning.options.shared import (
    MAX_WORKERS,
    LoadingOptions,
    OptionRecord,
    VideoOptions,
    check_at_least,
    check_at_most,
)


@dataclass(frozen=True, kw_only=True)
class ModelsOptions(OptionRecord):
    """Model."""

    checkpoint: Sequence[str]
    """Checkpoints, run folders or exported folders; with several the figure also shows accuracy against training
    steps."""
    evaluations: Sequence[Path] = ()
    """Files results.json that `evaluate` wrote for these checkpoints; with them the figure also shows accuracy against
    FVD."""


@dataclass(frozen=True, kw_only=True)
class LabelledVideoOptions(VideoOptions):
    """Videos."""

    split: Literal[1, 2, 3, "folders", "classes"] | None = None
    """Published split of UCF-101 (1, 2 or 3), by the groups in file names; `folders` for videos in train/CLASS and
    test/CLASS; `classes` for videos in folders of their classes, a quarter of which are test videos, by a hash of their
    names. By default the first of these that the names of all videos fit, unless lists are given."""
    train_list: Path | None = None
    """File with a line CLASS/FILE for each training video, like UCF-101's trainlist01.txt."""
    test_list: Path | None = None
    """File with a line CLASS/FILE for each test video."""
    group_pattern: str | None = None
    """Regular expression for the group of a video, with lists and folders: the part of the file name in parentheses.
    Videos of the same group (one recording, one person) are dependent, so no group is in both splits. By default the
    groups of UCF-101 for videos with such names; every other video is a group."""
    frames: int | None = None
    """Pixel frames of the clip in the middle of each video, 1 + k times the temporal factor of the codec; by default
    13, or those of training clips if these are shorter."""
    stride: int | None = None
    """Video frames from one frame of the clip to the next, by default the stride of training; shorter videos are
    sampled more densely."""


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions(OptionRecord):
    """Classifier."""

    regularisation: Literal["auto"] | float = "auto"
    """Inverse strength C of the L2 penalty of the logistic regression; auto selects it for each layer by
    cross-validation over groups of the training videos."""


@dataclass(frozen=True, kw_only=True)
class ProbeBatchOptions(OptionRecord):
    """Computation."""

    batch_size: int = 8
    """Clips per batch; does not affect the result."""
    workers: int = 2
    """Threads that read videos."""


@dataclass(frozen=True, kw_only=True)
class ProbeOutputOptions(OptionRecord):
    """Output."""

    out: Path
    """Folder for probe.json, probe.md, probe.png and the features of the videos, which are reused."""


@dataclass(frozen=True, kw_only=True)
class ProbeOptions(
    ModelsOptions, LabelledVideoOptions, ClassifierOptions, ProbeOutputOptions, ProbeBatchOptions, LoadingOptions
):
    """Probe."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, frames=1, stride=1, batch_size=1, workers=1)
        check_at_most(self, workers=MAX_WORKERS)
        if (self.train_list is None) != (self.test_list is None):
            raise InputError("only one list of videos is given: give both --train_list and --test_list.")
        if self.train_list and self.split:
            raise InputError(f"both --split {self.split} and lists of videos are given: leave one out.")
        if self.regularisation != "auto" and not 0 < self.regularisation < math.inf:
            raise InputError(f"--regularisation is {self.regularisation}: give auto or a number above 0.")
