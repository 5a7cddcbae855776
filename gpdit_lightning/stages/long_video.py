"""Stage 3: videos of varying length (GPDiT, section 5.1)."""

from gpdit_lightning.errors import InputError
from gpdit_lightning.stages.base import GPDiTStage


class LongVideoStage(GPDiTStage):
    """Long-video training: clips of every length that the data offers between `least_frames` and `frames`."""

    SOURCES = ("videos",)

    def on_fit_start(self) -> None:
        """Also refuse clips that all have one length, for then nothing long is learned beside the short.

        Raises:
            InputError: as the base, or all clips are alike.
        """
        super().on_fit_start()
        lengths = {length for bucket in self.data.buckets["train"]["videos"] for length in bucket.lengths}
        if len(lengths) == 1:
            raise InputError(
                f"the long-video stage trains on clips of varying length, but all have {lengths.pop()} latent frames: "
                "set data.videos.least_frames below that, or use GPDiTStage."
            )
