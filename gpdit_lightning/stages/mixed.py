"""Stage 2: images and videos in every optimizer step (GPDiT, section 5.1)."""

from gpdit_lightning.stages.base import GPDiTStage


class MixedStage(GPDiTStage):
    """Mixed image-video training: the model learns motion and retains its quality on single images."""

    SOURCES = ("images", "videos")
