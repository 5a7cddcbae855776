"""What every stage does: noise a batch, predict its velocity, hand the loss on."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning import LightningModule
from torch.optim import Optimizer

from gpdit_lightning.checkpoints.reading import (
    check_architecture,
    check_classes,
    open_weights,
    sha256_of_weights,
)
from gpdit_lightning.data.batches import LatentBatch
from gpdit_lightning.data.datamodule import LatentDataModule
from gpdit_lightning.diffusion import NoiseSchedule, VelocityLoss, rotate_to, velocity_loss
from gpdit_lightning.errors import InputError
from gpdit_lightning.model import GPDiT, GPDiTConfig
from gpdit_lightning.specs import CodecSpec
from gpdit_lightning.training.optimizer import OptimizerConfig, build_optimizer, follow_recipe

log = logging.getLogger(__name__)

DEFAULT_SCHEDULE = NoiseSchedule()
DEFAULT_OPTIMIZER = OptimizerConfig()
SAME_CODEC = "prepare the data with the codec of the weights, or begin from other weights"


class GPDiTStage(LightningModule):
    """Trains a GPDiT on whatever sources the data has: images, videos, sequences, or several of them.

    Every optimizer step sees the batches of all sources; their mean losses weigh as the sources' `weight`, equally by
    default.

    Attributes:
        SOURCES: the sources that a stage trains on, all of them and no others; empty: any.

    Args:
        backbone: the architecture.
        schedule: from noise levels to angles.
        optimizer: AdamW and its schedule.
        initial_weights: checkpoint, run folder or exported folder whose (averaged) weights to begin with; empty begins
            at random. A run that resumes goes on from its own last checkpoint instead.
    """

    SOURCES: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        backbone: GPDiTConfig,
        schedule: NoiseSchedule = DEFAULT_SCHEDULE,
        optimizer: OptimizerConfig = DEFAULT_OPTIMIZER,
        initial_weights: str = "",
    ) -> None:
        super().__init__()
        self.config, self.schedule, self.optimizer_config = backbone, schedule, optimizer
        self.initial_weights = initial_weights
        # Where the weights came from, kept in every checkpoint: {"path", "step", "sha256"}.
        self.origin: dict[str, Any] | None = None
        self.initial_codec: CodecSpec | None = None
        self.initial_classes: tuple[str, ...] = ()
        self.backbone: GPDiT

    def configure_model(self) -> None:
        """Build the backbone where the strategy wants it (sharded, or on the meta device)."""
        if "backbone" in self._modules:
            return
        self.backbone = GPDiT(self.config)
        if self.initial_weights:
            if not Path(self.initial_weights).exists():
                raise InputError(
                    f"training is to begin with the weights of {self.initial_weights}, which is not there: train that "
                    "stage first (`chain` trains all), or begin at random with --model.init_args.initial_weights=''."
                )
            weights = open_weights(self.initial_weights, verify=True)
            assert weights.path is not None
            check_architecture(weights.config.to_dict(), self.config, self.initial_weights)
            weights.load_into(self.backbone)
            self.initial_codec, self.initial_classes = weights.facts.codec, weights.facts.classes
            self.origin = {
                "path": self.initial_weights,
                "step": weights.facts.step or 0,
                "sha256": sha256_of_weights(weights.path),
            }
            kind = "averaged" if weights.facts.weights == "ema" else "trained"
            log.info("begins with the %s weights of %s (step %d)", kind, self.origin["path"], self.origin["step"])

    def on_fit_start(self) -> None:
        """Refuse sources that are not the stage's, and what the backbone or its initial weights were not made for.

        Raises:
            InputError: naming what differs.
        """
        used = tuple(source.name for source in self.data.plan.sources)
        if self.SOURCES and set(used) != set(self.SOURCES):
            wanted, found = (" and ".join(f"data.{name}" for name in names) for names in (self.SOURCES, used))
            raise InputError(
                f"{type(self).__name__} trains on {wanted}, but the recipe uses {found}: give manifests and a "
                "batch_size to exactly those, or use GPDiTStage, which takes any."
            )
        if self.initial_codec is not None:
            self.initial_codec.check_same(self.data.codec, self.initial_weights, "the data", SAME_CODEC)
        self._check_number_of_classes()
        if self.initial_classes:
            check_classes(self.initial_classes, self.data.classes, self.initial_weights)

    def _check_number_of_classes(self) -> None:
        ours, found = self.config.classes, len(self.data.classes)
        if ours != found:
            cure = f"set model.init_args.backbone.classes to {found}"
            cure += ", or data.labels to false" if not ours else ", or data.labels to true" if not found else ""
            raise InputError(f"the backbone takes {ours} classes, but the data has {found}: {cure}.")

    def on_train_start(self) -> None:
        """A resumed run trains as its recipe says now; what changed is said.

        Raises:
            InputError: the ranks stand at different steps, or began with different weights.
        """
        self._check_ranks_agree()
        optimizer: Any = self.trainer.optimizers[0]  # under ZeRO DeepSpeed's, which `self.optimizers()` does not know
        scheduler: Any = self.lr_schedulers()
        for change in follow_recipe(optimizer, scheduler, self.optimizer_config):
            log.info("%s", change)

    def _check_ranks_agree(self) -> None:
        """Each rank found its checkpoint and its initial weights for itself, as its node saw the folders."""
        strategy = self.trainer.strategy
        ours = {"step": self.trainer.global_step, "weights": self.origin and self.origin["sha256"]}
        first = strategy.broadcast(ours)
        differing = strategy.reduce(torch.tensor(float(ours != first), device=self.device), reduce_op="sum")
        if differing > 0:
            raise InputError(
                f"{int(differing)} of {self.trainer.world_size} ranks found another checkpoint, or other initial "
                f"weights, than the first rank, which is at step {first['step']}: let all nodes see the same files, "
                "then start again."
            )

    @property
    def data(self) -> LatentDataModule:
        """The data that the trainer trains on."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, LatentDataModule)
        return data

    def configure_optimizers(self) -> Any:
        """AdamW over the trained parameters, its schedule stepped per optimizer step."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer, scheduler = build_optimizer(trained, self.optimizer_config, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says, if `Health` left gradients to clip: by value, torch refuses to clip none."""
        if any(parameter.grad is not None for parameter in self.parameters()):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def objective(self, batch: LatentBatch) -> VelocityLoss:
        """Velocity loss of a batch (GPDiT, equation 3), the mean over the frames that have noise."""
        latents, frames = batch.latents, batch.frames
        if frames is not None:
            # Of views, since a list as an index is copied to the GPU, for which the process waits.
            latents = torch.stack([latents[:, frame] for frame in frames], dim=1)
        sample = rotate_to(latents[batch.clip_of_row], batch.noise, self.schedule.theta(batch.t))
        clean = batch.latents[: batch.context] if batch.context else None
        prediction = self.backbone(sample.noisy, sample.theta, clean, batch.labels, batch.draws, frames)
        return velocity_loss(prediction, sample.velocity, batch.t)

    def training_step(self, batch: LatentBatch, batch_idx: int) -> dict[str, Any]:
        """One micro-batch; Lightning divides by the accumulation, the batch's weight already holds its share."""
        loss = self.objective(batch)
        share = batch.weight * self.trainer.accumulate_grad_batches
        return {"loss": loss.mean * share, "quartiles": loss.quartiles, "per_clip": loss.per_clip}

    def validation_step(self, batch: LatentBatch, batch_idx: int) -> dict[str, Any]:
        """The same objective on held-out clips with fixed noise."""
        with torch.no_grad():
            loss = self.objective(batch)
        return {"loss": loss.mean, "quartiles": loss.quartiles, "per_clip": loss.per_clip}

    def test_step(self, batch: LatentBatch, batch_idx: int) -> dict[str, Any]:
        """As in validation."""
        return self.validation_step(batch, batch_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what the weights are weights of."""
        checkpoint["gpdit"] = {
            "stage": type(self).__name__,
            "backbone": self.config.to_dict(),
            "schedule": asdict(self.schedule),
            "origin": self.origin,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture."""
        check_architecture(checkpoint["gpdit"]["backbone"], self.config, "the run's last checkpoint")
        saved, ours = checkpoint["gpdit"]["schedule"], asdict(self.schedule)
        if saved != ours:
            raise InputError(
                f"the checkpoint was trained with the noise schedule {saved} and the recipe has {ours}: restore the "
                "old one, or begin a new run folder from its weights (--run_dir NEW "
                "--model.init_args.initial_weights OLD)."
            )
        self.origin = checkpoint["gpdit"]["origin"]
