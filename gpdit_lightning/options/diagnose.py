"""Options of `diagnose`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from gpdit_lightning.options.shared import OptionRecord


@dataclass(frozen=True, kw_only=True)
class DiagnoseOptions(OptionRecord):
    """Diagnose."""

    POSITIONAL: ClassVar[str] = "run"

    run: Path
    """Run folder, of a run that has ended or is still training; may also be the first argument, without --run."""
    reference: Sequence[str] = ()
    """Healthy runs: the name of a reference that ships, a file of `python -m benchmarks.healthy_runs`, or run folders
    of one recipe with several seeds; by default the shipped reference whose settings are closest."""
    out: Path = Path("diagnosis.png")
    """PNG file to write or replace."""
