"""Stage 2: images and videos, jointly in every optimizer step or alternating between steps (GPDiT, section 5.1)."""

from gpdit_lightning.stages.base import GPDiTStage


class MixedStage(GPDiTStage):
    """Mixed image-video training: the model learns motion and retains its quality on single images."""

    SOURCES = ("images", "videos")
