"""Options of `recipes`."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RecipesOptions:
    """Recipes."""

    out: Path | None = None
    """Folder to which all shipped recipes are copied, for editing; without it they are listed."""
