"""One LightningModule per training stage of GPDiT (section 5.1), on one base."""

from gpdit_lightning.stages.base import GPDiTStage
from gpdit_lightning.stages.mixed import MixedStage

__all__ = ["GPDiTStage", "MixedStage"]
