"""Options of `recipes`."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RecipesOptions:
    """Recipes."""

    out: Path | None = None
    """Copy all shipped recipes to this folder, to be edited; without it they are listed."""
