"""Reads the content of checkpoints, for tests."""

from pathlib import Path
from typing import Any

from gpdit_lightning.checkpoints.content import read_content
from gpdit_lightning.checkpoints.files import find_checkpoint


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the content of the checkpoint that a path refers to."""
    return read_content(find_checkpoint(path))
