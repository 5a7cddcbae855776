"""Inspection of prepared data: overview, verification, contact sheets, and explanations of single input files."""

from gpdit_lightning.preparation.inspection.explain import explain
from gpdit_lightning.preparation.inspection.overview import overview
from gpdit_lightning.preparation.inspection.sheet import write_sheet
from gpdit_lightning.preparation.inspection.verification import unlisted_files, verify

__all__ = ["explain", "overview", "unlisted_files", "verify", "write_sheet"]
