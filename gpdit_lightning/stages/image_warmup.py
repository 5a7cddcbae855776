"""Stage 1: unconditioned images (GPDiT, section 5.1)."""

from gpdit_lightning.stages.base import GPDiTStage


class ImageWarmupStage(GPDiTStage):
    """Image warm-up: clips of one frame, so that there is no context and no clean stream."""

    SOURCES = ("images",)
