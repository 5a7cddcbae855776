"""Generation: rollout of latent frames, videos in pixels, and in-context image tasks."""

from gpdit_lightning.generation.rollout import ClipInputs, GenerationConfig, cast_linear_weights, rollout
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
