"""One LightningModule per training stage: GPDiT (sections 5.1 and 5.4), and classification (ACDiT, section 5.2)."""

from gpdit_lightning.stages.base import GPDiTStage
from gpdit_lightning.stages.classification import ClassificationStage
from gpdit_lightning.stages.few_shot import FewShotStage
from gpdit_lightning.stages.image_warmup import ImageWarmupStage
from gpdit_lightning.stages.long_video import LongVideoStage
from gpdit_lightning.stages.mixed import MixedStage

__all__ = ["ClassificationStage", "FewShotStage", "GPDiTStage", "ImageWarmupStage", "LongVideoStage", "MixedStage"]
