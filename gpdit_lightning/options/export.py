"""Options of `export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpdit_lightning.options.shared import CheckpointOptions


@dataclass(frozen=True, kw_only=True)
class ExportOptions(CheckpointOptions):
    """Output."""

    out: Path
    """Output folder; an earlier export of the same model is replaced, except for its model card."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Data type of the weights; by default that of the checkpoint."""
