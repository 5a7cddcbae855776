"""Options of `attention`."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from gpdit_lightning.options.shared import OptionRecord, RecipeOptions, check_at_least


@dataclass(frozen=True, kw_only=True)
class FigureOptions(OptionRecord):
    """Figure."""

    out: Path = Path("attention.png")
    """PNG file to write or replace."""
    frames: int | None = None
    """Latent frames of the clip, cut to whole blocks; by default those of the recipe, or, if it uses all of a sample,
    four blocks."""
    frame_tokens: str = "2x2"
    """ROWSxCOLUMNS, the tokens that are drawn for each frame, or for each block if blocks are parts of frames. The
    pattern is the same for any number."""


@dataclass(frozen=True, kw_only=True)
class AttentionOptions(RecipeOptions, FigureOptions):
    """Attention."""

    EXAMPLE: ClassVar[str] = "gpdit:systems/acdit_video"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, frames=1)
