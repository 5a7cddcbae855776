"""Options of `recipes`."""

from dataclasses import dataclass
from pathlib import Path

from gpdit_lightning.options.shared import OptionRecord


@dataclass(frozen=True, kw_only=True)
class RecipesOptions(OptionRecord):
    """Recipes."""

    out: Path | None = None
    """Folder to which all shipped recipes are copied, for editing; without it they are listed."""
