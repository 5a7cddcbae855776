"""Generation: rollout of latent frames, videos in pixels, and in-context image tasks."""

from gpdit_lightning.generation.config import ClipInputs, GenerationConfig
from gpdit_lightning.generation.precision import cast_linear_weights
from gpdit_lightning.generation.rollout import rollout
from gpdit_lightning.generation.transform import transform
from gpdit_lightning.generation.video import GeneratedFrames, GeneratedVideo, continue_video, stream_video

__all__ = [
    "ClipInputs",
    "GeneratedFrames",
    "GeneratedVideo",
    "GenerationConfig",
    "cast_linear_weights",
    "continue_video",
    "rollout",
    "stream_video",
    "transform",
]
