"""Folders of videos and pictures to latent shards."""

from gpdit_lightning.preparation.few_shot import FewShotOptions, prepare_sequences
from gpdit_lightning.preparation.options import PrepareOptions, argument_parser
from gpdit_lightning.preparation.prepare import prepare, prepared_sources, summary

__all__ = [
    "FewShotOptions",
    "PrepareOptions",
    "argument_parser",
    "prepare",
    "prepare_sequences",
    "prepared_sources",
    "summary",
]
