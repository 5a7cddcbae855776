"""Inspecting prepared data: what they hold, whether they are intact, how they look, what became of an input file."""

from gpdit_lightning.preparation.inspection.explain import explain
from gpdit_lightning.preparation.inspection.overview import overview
from gpdit_lightning.preparation.inspection.sheet import write_sheet
from gpdit_lightning.preparation.inspection.verification import unlisted_files, verify

__all__ = ["explain", "overview", "unlisted_files", "verify", "write_sheet"]
