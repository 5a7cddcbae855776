"""Stage 4: few-shot fine-tuning on sequences of image pairs (GPDiT, sections 5.1 and 5.4)."""

from gpdit_lightning.stages.base import GPDiTStage


class FewShotStage(GPDiTStage):
    """Few-shot fine-tuning: (source, target) pairs as the frames of a clip, conditioned by concatenation alone.

    The model learns to generate a target given its source and the previous pairs. With `data.sequences.loss_frames =
    targets` only the targets have a loss, and no noisy source is computed; with `all` the sources have a loss too.
    """

    SOURCES = ("sequences",)
