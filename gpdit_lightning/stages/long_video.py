"""Stage 3: videos of varying length (GPDiT, section 5.1)."""

import logging

from gpdit_lightning.stages.base import GPDiTStage

log = logging.getLogger(__name__)


class LongVideoStage(GPDiTStage):
    """Long-video training: clips of every length in the data between `least_frames` and `frames`."""

    SOURCES = ("videos",)

    def on_fit_start(self) -> None:
        """Also log if all clips have the same length, as in short videos."""
        super().on_fit_start()
        lengths = {length for bucket in self.data.buckets["train"]["videos"] for length in bucket.lengths}
        if len(lengths) == 1:
            log.warning(
                "all clips have %d latent frames, so their length does not vary: set data.videos.least_frames below "
                "that, or prepare longer clips",
                *lengths,
            )
