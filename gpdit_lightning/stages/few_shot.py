"""Stage 4: few-shot fine-tuning on sequences of image pairs (GPDiT, sections 5.1 and 5.4)."""

from gpdit_lightning.stages.base import GPDiTStage


class FewShotStage(GPDiTStage):
    """Few-shot fine-tuning: (source, target) pairs as the frames of a clip, conditioned by concatenation alone.

    What is wanted is a target, given its source and the pairs before it, so that with `data.sequences.loss_frames` at
    `targets` the loss is theirs alone, and no noisy source is computed. With `all`, sources are learned as well.
    """

    SOURCES = ("sequences",)
