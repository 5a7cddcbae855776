"""Folders of videos and pictures to latent shards."""

from gpdit_lightning.preparation.options import PrepareOptions
from gpdit_lightning.preparation.prepare import prepare, summary

__all__ = ["PrepareOptions", "prepare", "summary"]
