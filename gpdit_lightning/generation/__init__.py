"""Continuing a video: rollout in latent space, and from pixels to pixels."""

from gpdit_lightning.generation.continuation import Continuation, continue_video
from gpdit_lightning.generation.rollout import rollout

__all__ = ["Continuation", "continue_video", "rollout"]
