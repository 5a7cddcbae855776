"""Options of `export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpdit_lightning.options.shared import CheckpointOptions


@dataclass(frozen=True, kw_only=True)
class ExportOptions(CheckpointOptions):
    """Output."""

    out: Path
    """Output folder; an earlier export of the same model is replaced, unless its model card was edited."""
    samples: bool = True
    """Add sample images to the card: the last preview of the run, or else continuations of held-out clips, if their
    shards are found and the model has at most 200M parameters."""
    evaluation: Path | None = None
    """Folder of an evaluation of this checkpoint, whose scores the card shows; by default one in the run folder."""
    codec_source: str | None = None
    """Folder, file or hub name of the codec's weights, if they are not the default: a checkpoint does not choose which
    files are read. A file is copied to the folder."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Data type of the weights; by default that of the checkpoint."""
