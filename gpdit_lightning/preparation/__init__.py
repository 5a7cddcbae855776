"""Folders of videos and pictures to latent shards."""

from gpdit_lightning.preparation.few_shot import PreparePairsOptions, prepare_pairs
from gpdit_lightning.preparation.options import PrepareOptions, argument_parser
from gpdit_lightning.preparation.prepare import list_input_files, prepare, summary

__all__ = [
    "PrepareOptions",
    "PreparePairsOptions",
    "argument_parser",
    "list_input_files",
    "prepare",
    "prepare_pairs",
    "summary",
]
