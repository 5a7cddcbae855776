"""A look into prepared data: what they hold, whether they are whole, how they look, where a source went."""

from gpdit_lightning.preparation.inspection.overview import overview
from gpdit_lightning.preparation.inspection.sheet import write_sheet
from gpdit_lightning.preparation.inspection.verification import strays, verify
from gpdit_lightning.preparation.inspection.why import why

__all__ = ["overview", "strays", "verify", "why", "write_sheet"]
