"""Stage 3: videos of varying length (GPDiT, section 5.1)."""

from gpdit_lightning.errors import InputError
from gpdit_lightning.stages.base import GPDiTStage


class LongVideoStage(GPDiTStage):
    """Long-video training: clips of every length in the data between `least_frames` and `frames`."""

    SOURCES = ("videos",)

    def on_fit_start(self) -> None:
        """Also require clips of more than one length.

        Raises:
            InputError: as in the base class, or all clips have the same length.
        """
        super().on_fit_start()
        lengths = {length for bucket in self.data.buckets["train"]["videos"] for length in bucket.lengths}
        if len(lengths) == 1:
            raise InputError(
                f"the long-video stage trains on clips of varying length, but all have {lengths.pop()} latent frames: "
                "set data.videos.least_frames below that, or use GPDiTStage."
            )
