"""Options of `demo`."""

from dataclasses import dataclass
from pathlib import Path

from gpdit_lightning.options.shared import OptionRecord, check_at_least


@dataclass(frozen=True, kw_only=True)
class DemoOptions(OptionRecord):
    """Demo."""

    videos: Path | None = None
    """A folder of videos, some of which are held out; by default synthetic videos."""
    run_dir: Path = Path("runs/demo")
    """Output folder; the same command resumes in it."""
    max_steps: int | None = None
    """Optimizer steps of each stage; by default those of the recipes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, max_steps=1)
