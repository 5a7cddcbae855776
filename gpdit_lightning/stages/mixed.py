"""Stage 2: images and videos in every optimizer step (GPDiT, section 5.1)."""

from gpdit_lightning.errors import InputError
from gpdit_lightning.stages.base import GPDiTStage


class MixedStage(GPDiTStage):
    """Mixed image-video training.

    Every optimizer step sees the image batch and the video batch of the plan; their mean losses weigh as
    `data.images.weight` to `data.videos.weight`, 1:1 by default.
    """

    def on_fit_start(self) -> None:
        """Both sources must be there.

        Raises:
            InputError: one is not in use.
        """
        super().on_fit_start()
        sources = {source.name for source in self.data.plan.sources}
        for name in ("images", "videos"):
            if name not in sources:
                raise InputError(
                    f"the mixed stage trains on images and videos, but data.{name}.batch_size is 0: set it, or use "
                    "GPDiTStage for one source."
                )
