"""From folders of videos and images to latent shards."""

from gpdit_lightning.options.prepare import PrepareOptions
from gpdit_lightning.options.prepare_pairs import PreparePairsOptions
from gpdit_lightning.preparation.few_shot import prepare_pairs
from gpdit_lightning.preparation.prepare import list_input_files, prepare
from gpdit_lightning.preparation.summary import summary

__all__ = [
    "PrepareOptions",
    "PreparePairsOptions",
    "list_input_files",
    "prepare",
    "prepare_pairs",
    "summary",
]
