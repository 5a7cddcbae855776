"""The base class of stages: noise a batch, predict the target, minimize the loss."""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning import Callback, LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from gpdit_lightning.checkpoints.content import check_shapes
from gpdit_lightning.checkpoints.facts import Origin
from gpdit_lightning.checkpoints.marks import checkpoint_sha256
from gpdit_lightning.checkpoints.weights import NOT_FINITE
from gpdit_lightning.data.batches import LatentBatch
from gpdit_lightning.data.datamodule import LatentDataModule
from gpdit_lightning.data.ranks import check_same_on_ranks
from gpdit_lightning.diffusion import (
    DenoisingLoss,
    NoiseSchedule,
    check_target,
    denoising_loss,
    rotate_to,
    training_target,
)
from gpdit_lightning.errors import InputError
from gpdit_lightning.imports import is_import_path
from gpdit_lightning.model import GPDiT, GPDiTConfig
from gpdit_lightning.model.attention import select_backend
from gpdit_lightning.model.attention.backends import find_backend
from gpdit_lightning.model.initial_weights import weights_of_new
from gpdit_lightning.model.layout import ClipBlocks, count_blocks
from gpdit_lightning.schema import OBJECT, check
from gpdit_lightning.stages.agreement import (
    check_algorithm,
    check_annotated,
    check_blocks,
    check_checkpoint,
    check_context_noise,
    check_latent_channels,
    check_loss,
    check_no_texts,
    check_number_of_classes,
    check_optimizer_state,
    check_patches,
    check_sources,
    check_stage,
)
from gpdit_lightning.stages.initial_weights import InitialWeights
from gpdit_lightning.training.attention_choice import choose_backend
from gpdit_lightning.training.float8 import check_float8, convert_to_float8
from gpdit_lightning.training.internals import end_validation_loader
from gpdit_lightning.training.optimizer import (
    OptimizerConfig,
    apply_config,
    build_optimizer,
    check_state,
    reduce_ddp_gradients_in_bf16,
    reduction_dtype,
)
from gpdit_lightning.training.strategies import ZeRO
from gpdit_lightning.training.strategies.sharding import (
    LaterWeights,
    product_dtype_of,
    sharded_strategy_of,
    strategy_of_later_weights,
)

log = logging.getLogger(__name__)

DEFAULT_SCHEDULE = NoiseSchedule()
DEFAULT_OPTIMIZER = OptimizerConfig()


class GPDiTStage(LightningModule):
    """Trains a GPDiT on any sources: images, videos, sequences, or several of them.

    By default, every optimizer step takes a batch of each source, and their mean losses are weighted by the sources'
    `weight`. With `data.sampling: alternate`, a step takes a batch of one source, and each source has a fraction of the
    steps that is proportional to its `weight`. A subclass may restrict the sources (`SOURCES`) or replace the
    `objective`.

    Attributes:
        SOURCES: the sources on which the stage trains, as far as there are data, and no others; empty: any.
        CLEAN_STREAM_ONLY: whether the clips pass through the clean stream alone.

    Args:
        backbone: the architecture.
        schedule: from noise levels to angles.
        optimizer: the optimizer and its schedule.
        initial_weights: checkpoint, run folder or exported folder with the (averaged) weights from which training
            starts; None: random weights. A run that resumes uses its last checkpoint instead.

    Raises:
        InputError: the attention backend is unknown, or `initial_weights` is empty, as from an unset variable.
    """

    SOURCES: ClassVar[tuple[str, ...]] = ()
    CLEAN_STREAM_ONLY: ClassVar[bool] = False

    def __init__(
        self,
        backbone: GPDiTConfig,
        schedule: NoiseSchedule = DEFAULT_SCHEDULE,
        optimizer: OptimizerConfig = DEFAULT_OPTIMIZER,
        initial_weights: str | None = None,
    ) -> None:
        super().__init__()
        check_annotated(type(self).__name__, backbone=backbone, schedule=schedule, optimizer=optimizer)
        if initial_weights is not None and not initial_weights.strip():
            raise InputError(
                "model.init_args.initial_weights is empty: give a run folder, a checkpoint or an exported folder, or "
                "null for random weights."
            )
        if not is_import_path(backbone.attention_backend):  # an import path is imported when the operator is used
            find_backend(backbone.attention_backend)
        self.config, self.schedule, self.optimizer_config = backbone, schedule, optimizer
        self.initial_weights = initial_weights
        self.loaded_weights: InitialWeights | None = None
        self.origin: Origin | None = None
        self.backbone: GPDiT

    def configure_model(self) -> None:
        """Build the backbone. Lightning calls this in the context of the strategy."""
        if "backbone" in self._modules:
            return
        sharding = strategy_of_later_weights(self)
        if type(self).configure_model is not GPDiTStage.configure_model:  # which may change the weights
            sharding = None
        with torch.device("meta") if sharding is not None else nullcontext():
            self.backbone = GPDiT(self.config)
        if self.initial_weights:
            self.loaded_weights = InitialWeights.load(self.initial_weights, self.backbone)
            self.origin = self.loaded_weights.origin
        convert_to_float8(self.backbone)
        if sharding is not None:
            sharding.later_weights = self._later_weights()

    def _later_weights(self) -> LaterWeights:
        """Return the weights of the backbone on the meta device."""
        device = torch.get_default_device()
        if self.loaded_weights is None:
            with torch.device("meta"):
                unsharded = GPDiT(self.config)
            values = ((f"backbone.{name}", value) for name, value in weights_of_new(unsharded, self.config.layers))
            return LaterWeights(values, device)
        tensors = self.loaded_weights.tensors.items()
        named = ((f"backbone.{name}", value) for name, value in tensors)
        return LaterWeights(named, device, self.loaded_weights.origin.path, NOT_FINITE)

    # --- the objective

    def objective(self, batch: LatentBatch) -> DenoisingLoss:
        """Compute the loss of a batch, the mean over its noisy blocks.

        It is equation 3 of GPDiT with the target of section 4.2, the companion of the noisy frame, in place of epsilon;
        with `backbone.target` epsilon it is that of DDPM and ACDiT.
        """
        prediction, target = self.predict(batch)
        blocks = self.noisy_blocks(batch)
        return denoising_loss(prediction, target, batch.t, blocks.mean)

    def noisy_blocks(self, batch: LatentBatch) -> ClipBlocks:
        """Return the blocks of the noisy frames of a batch."""
        frames = range(batch.latents.shape[1]) if batch.frames is None else batch.frames
        return ClipBlocks.of(self.config, frames, *batch.latents.shape[-2:])

    def predict(self, batch: LatentBatch) -> tuple[Tensor, Tensor]:
        """Return the prediction and the target of the noisy frames of a batch, both (K * B, F, C, H, W)."""
        latents, frames = batch.latents, batch.frames
        if frames is not None:
            # Stacked views: indexing with a list would copy the list to the GPU and synchronize.
            latents = torch.stack([latents[:, frame] for frame in frames], dim=1)
        theta = self.schedule.theta(batch.t)
        sample = rotate_to(latents[batch.clip_of_row], batch.noise, self.noisy_blocks(batch).spread(theta))
        prediction = self.backbone(
            sample.noisy, theta, self.context(batch), batch.labels, batch.draws, frames, batch.clean_theta
        )
        return prediction, training_target(sample, batch.noise, self.config.target)

    def context(self, batch: LatentBatch) -> Tensor | None:
        """Return the clean frames (B', F, C, H, W) of the clips with context, with the context noise of the batch."""
        if not batch.context:
            return None
        clean = batch.latents[: batch.context]
        if batch.clean_theta is None or batch.clean_noise is None:
            return clean
        blocks = ClipBlocks.of(self.config, range(clean.shape[1]), *clean.shape[-2:])
        return rotate_to(clean, batch.clean_noise, blocks.spread(batch.clean_theta)).noisy

    def training_step(self, batch: LatentBatch, batch_idx: int) -> dict[str, Any]:
        """Compute the loss of a micro-batch, weighted by its share of the step, so Lightning's division is undone."""
        loss = check_loss(self.objective(batch), type(self).__name__, batch)
        share = batch.weight * self.trainer.accumulate_grad_batches
        return {"loss": loss.mean * share, "quartiles": loss.quartiles, "per_clip": loss.per_clip}

    def validation_step(self, batch: LatentBatch, batch_idx: int) -> dict[str, Any]:
        """Compute the same objective on held-out clips with fixed noise."""
        with torch.no_grad():
            loss = check_loss(self.objective(batch), type(self).__name__, batch)
        return {"loss": loss.mean, "quartiles": loss.quartiles, "per_clip": loss.per_clip}

    def test_step(self, batch: LatentBatch, batch_idx: int) -> dict[str, Any]:
        """As in validation."""
        return self.validation_step(batch, batch_idx)

    def on_validation_end(self) -> None:
        """End the loader processes of a validation within the training, with their memory."""
        end_validation_loader(self.trainer)

    # --- the optimizer

    def configure_optimizers(self) -> Any:
        """Return the optimizer of the trainable parameters, and its schedule, which advances per optimizer step."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        of_blocks = self.backbone.blocks.parameters()
        matrices = [parameter for parameter in of_blocks if parameter.requires_grad and parameter.ndim == 2]
        config, max_steps = self.optimizer_config, self.trainer.max_steps
        scales_gradients = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        optimizer, scheduler = build_optimizer(
            trainable, config, max_steps, matrices, self._layers_above(), scales_gradients
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _layers_above(self) -> dict[nn.Parameter, int]:
        """Return the number of layers above that of each parameter of the backbone, for `optimizer.layer_decay`."""
        blocks, above = len(self.backbone.blocks), {}
        for name, parameter in self.backbone.named_parameters():
            part, *rest = name.split(".")
            first = blocks - int(rest[0]) if part == "blocks" else blocks + 1
            above[parameter] = 0 if part.startswith("output") else first
        return above

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients, unless `Health` has removed them: torch cannot clip an empty list by value."""
        if any(parameter.grad is not None for parameter in self.parameters()):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # --- checks and checkpoints

    @property
    def data(self) -> LatentDataModule:
        """Return the data of the trainer."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, LatentDataModule)
        return data

    def setup(self, stage: str) -> None:
        """Raise `InputError` if data or device do not fit the stage or its backbone, which is not built yet."""
        check_sources(type(self).__name__, self.SOURCES, [source.name for source in self.data.plan.sources])
        check_no_texts(self.config.text_width)
        check_latent_channels(self.config.latent_channels, self.data.codec.latent_channels)
        check_patches(self.config.patch_size, self.data)
        self.check_labels()
        check_blocks(self.config, self.data)
        check_target(self.config.target, self.schedule)
        check_context_noise(self.data.context_noise, self.config)
        self.data.count_blocks = partial(count_blocks, self.config)
        check_algorithm(self.optimizer_config, sharded_strategy_of(self) is not None)
        device, dtype = self.trainer.strategy.root_device, product_dtype_of(self.trainer)
        if stage == "fit":
            check_float8(self.config, device, with_deepspeed=isinstance(self.trainer.strategy, ZeRO))
            chosen = choose_backend(self.trainer, self.data, self.config, dtype, self.CLEAN_STREAM_ONLY)
            self.config = self.config.replaced(attention_backend=chosen)
        else:
            self.config = self.config.replaced(float8=False)
        with torch.set_grad_enabled(stage == "fit"):
            select_backend(self.config.attention_backend, device.type, dtype, self.config.head_width)

    def check_labels(self) -> None:
        """Raise `InputError` if the labels of the data do not fit the stage."""
        check_number_of_classes(self.config.classes, len(self.data.classes))

    def on_fit_start(self) -> None:
        """Raise `InputError` if the data do not fit the initial weights."""
        if self.loaded_weights is not None:
            self.loaded_weights.check_data(self.data)

    def on_train_start(self) -> None:
        """Check that all ranks start from the same state, and apply the recipe's optimizer settings to a resumed run.

        Raises:
            InputError: the ranks have different checkpoints or initial weights, or the restored state of the optimizer
                is not one of these parameters.
        """
        resumed = self.trainer.ckpt_path
        last = checkpoint_sha256(Path(resumed)) if resumed else None
        facts = {
            "last checkpoint": (self.trainer.global_step, last),
            "initial weights": self.origin and self.origin.sha256,
        }
        check_same_on_ranks(self.trainer, facts)
        if reduction_dtype(self) == torch.bfloat16:
            reduce_ddp_gradients_in_bf16(self.trainer.strategy.model)
        if self.origin is None and self.trainer.global_step == 0:
            log.info("training begins from random weights (from others: --model.init_args.initial_weights RUN_DIR)")
        optimizer: Any = self.trainer.optimizers[0]  # under ZeRO DeepSpeed's, which `self.optimizers()` does not return
        scheduler: Any = self.lr_schedulers()
        if sharded_strategy_of(self) is None:
            check_state(optimizer)
        apply_config(self.optimizer_config, optimizer, scheduler)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record the stage, the architecture, the noise schedule and the origin of the weights."""
        checkpoint["gpdit"] = {
            "stage": type(self).__name__,
            "backbone": self.config.to_dict(),
            "schedule": asdict(self.schedule),
            "origin": asdict(self.origin) if self.origin else None,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise `InputError` if the checkpoint has another architecture, noise schedule or, in training, stage."""
        saved, where = checkpoint["gpdit"], "the run's last checkpoint"
        check(saved, {"backbone": OBJECT, "schedule": OBJECT}, "gpdit", where, "use another one of the run")
        check_checkpoint(saved, self.config, self.schedule)
        if self.trainer.state.fn == TrainerFn.FITTING:
            check_stage(saved["stage"], type(self).__name__, self.trainer.default_root_dir)
            check_optimizer_state(checkpoint.get("optimizer_states"), self.optimizer_config)
            self._report_missing_states(checkpoint["callbacks"])
        elif saved["stage"] != type(self).__name__ and self.trainer.is_global_zero:
            log.warning("the run was trained with %s; this loss is that of %s", saved["stage"], type(self).__name__)
        origin = saved.get("origin")
        self.origin = Origin.from_dict(origin, where, "use another one of the run") if origin else None

    def _report_missing_states(self, saved: Mapping[str, Any]) -> None:
        """Log which callbacks have a state, but none in the checkpoint, such as those that are new in the recipe."""
        missing = [
            type(callback).__name__
            for callback in self.trainer.callbacks  # type: ignore[attr-defined]
            if type(callback).state_dict is not Callback.state_dict and callback.state_key not in saved
        ]
        if missing and self.trainer.is_global_zero:
            log.warning("the checkpoint has no state of %s, which therefore begins anew", " and ".join(missing))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights as torch does; raise `InputError` if names or shapes differ."""
        if strict:
            check_shapes(state_dict, self.state_dict())
        return super().load_state_dict(state_dict, strict, assign)
