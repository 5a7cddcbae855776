"""Options of `chain`."""

from dataclasses import dataclass
from typing import ClassVar

from gpdit_lightning.options.shared import RecipeOptions


@dataclass(frozen=True, kw_only=True)
class ChainOptions(RecipeOptions):
    """Chain.

    The first file of `config` lists the recipes of the stages, as `stages`. Overlays and overrides apply to each stage.
    """

    EXAMPLE: ClassVar[str] = "gpdit:chain_gpdit_h"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.config:
            raise self.no_recipe()
