"""The measurements of the check, as cases of its parts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpdit_lightning.model.attention.trial import first_line

Row = dict[str, Any]
"""The labels and figures of a case; with `failure` and `skipped`, the reasons why it failed or was not run, or ''."""


@dataclass(frozen=True)
class Setup:
    """What all parts share.

    Attributes:
        latents: folder of prepared random videos.
        clips: clips of a training step; None for those of the recipes.
        smoke_test: whether to run all parts at a tiny size on the CPU.
    """

    latents: Path
    clips: int | None = None
    smoke_test: bool = False

    @property
    def device(self) -> torch.device:
        """The device to measure."""
        return torch.device("cpu" if self.smoke_test else "cuda")


class NotRunError(Exception):
    """A case cannot be run on this machine; the message is the reason."""


class Case(NamedTuple):
    """A measurement.

    Attributes:
        labels: what is measured.
        measure: returns the figures, and under `failure` what is wrong about them; raises `NotRunError`.
    """

    labels: Row
    measure: Callable[[], Row]


class Part(NamedTuple):
    """A part of the check.

    Attributes:
        name: its name.
        title: what its table shows.
        share: seconds that it has of a check of nine minutes.
        columns: heading and format of each label and figure of the table.
        cases: returns the measurements in the order of their importance; it does not use the GPU.
        note: a sentence below the table.
    """

    name: str
    title: str
    share: float
    columns: Mapping[str, tuple[str, str]]
    cases: Callable[[Setup], Sequence[Case]]
    note: str = ""


def completed(case: Case, figures: Mapping[str, Any]) -> Row:
    """Return a case with its figures as a row."""
    return {**case.labels, "failure": "", "skipped": "", **figures}


def measured(case: Case) -> tuple[Row, Exception | None]:
    """Measure a case; return its row, and the error if it raised one."""
    try:
        return completed(case, case.measure()), None
    except NotRunError as reason:
        return completed(case, {"skipped": str(reason)}), None
    except Exception as error:
        return completed(case, {"failure": first_line(error)}), error
