"""One LightningModule per training stage of GPDiT (sections 5.1 and 5.4), all subclasses of `GPDiTStage`."""

from gpdit_lightning.stages.base import GPDiTStage
from gpdit_lightning.stages.few_shot import FewShotStage
from gpdit_lightning.stages.image_warmup import ImageWarmupStage
from gpdit_lightning.stages.long_video import LongVideoStage
from gpdit_lightning.stages.mixed import MixedStage

__all__ = ["FewShotStage", "GPDiTStage", "ImageWarmupStage", "LongVideoStage", "MixedStage"]
