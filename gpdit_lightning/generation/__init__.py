"""Continuing a video: rollout in latent space, and from pixels to pixels."""

from gpdit_lightning.generation.continuation import Continuation, Piece, continue_video, stream_video
from gpdit_lightning.generation.rollout import GenerationConfig, products_in, rollout
from gpdit_lightning.generation.transform import transform

__all__ = [
    "Continuation",
    "GenerationConfig",
    "Piece",
    "continue_video",
    "products_in",
    "rollout",
    "stream_video",
    "transform",
]
