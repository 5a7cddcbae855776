"""Stage 4: few-shot fine-tuning on sequences of image pairs (GPDiT, sections 5.1 and 5.4)."""

from gpdit_lightning.stages.base import GPDiTStage


class FewShotStage(GPDiTStage):
    """Few-shot fine-tuning: (source, target) pairs as the frames of a clip, conditioned by concatenation alone."""

    SOURCES = ("sequences",)
