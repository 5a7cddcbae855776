"""ZeRO: weights, gradients and optimizer state sharded across ranks by DeepSpeed; ordinary checkpoints."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.types import LRSchedulerTypeUnion
from torch import Tensor, nn
from torch.optim import Optimizer

from gpdit_lightning.errors import InputError
from gpdit_lightning.model import GPDiT
from gpdit_lightning.training import internals
from gpdit_lightning.training.optimizer import reduction_dtype
from gpdit_lightning.training.strategies.sharding import ParameterShard, ShardedStrategy


class ZeROPrecision(DeepSpeedPrecision):
    """DeepSpeed's precision plugin without casts of inputs: latents, noise and noise levels stay in float32."""

    def convert_input(self, data: Any) -> Any:
        """Return a batch unchanged."""
        return data


class ZeRO(ShardedStrategy, DeepSpeedStrategy):
    """Trains with DeepSpeed's ZeRO: `zero2`, `zero3`, `zero2_offload` or `zero3_offload` as `trainer.strategy`.

    Differences from Lightning's DeepSpeedStrategy:

    - accumulated gradients are divided once, not twice, and callbacks are called as in any other run;
    - bf16-mixed means weights in bf16, and master weights, optimizer state and the reduction of gradients in float32,
      unless `optimizer.gradient_reduction` is bf16;
      the master weights are initialized with the given weights, not with those rounded to bf16;
    - a checkpoint is that of any other run, of which each rank writes its part;
    - it also runs on the CPU with gloo, for tests.

    Args:
        stage: 2 shards optimizer state, master weights and gradients; 3 also the weights.
        offload: keep the sharded tensors in host memory, and run the optimizer on the CPU.
        options: arguments of Lightning's DeepSpeedStrategy.
    """

    PRECISION = ZeROPrecision

    def __init__(self, stage: int = 2, offload: bool = False, **options: Any) -> None:
        settings = {"offload_optimizer": offload, "offload_parameters": offload and stage == 3} | options
        try:
            super().__init__(stage=stage, logging_batch_size_per_gpu=1, logging_level=logging.ERROR, **settings)
        except MisconfigurationException as error:
            if "installed" not in str(error):
                raise
            raise InputError("ZeRO needs DeepSpeed (Linux only): pip install deepspeed, or use strategy ddp.") from None
        assert isinstance(self.config, dict)
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)  # use torch's, which needs no compiler
        self.stage = stage
        self._restore_norm: Callable[[], None] | None = None

    # --- the environment

    @property
    def root_device(self) -> torch.device:
        """Return this rank's device; DeepSpeed needs an index for the CPU too."""
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device

    def setup_environment(self) -> None:
        """Connect to the other ranks, also on the CPU, which Lightning refuses.

        Raises:
            InputError: a stage other than 2 or 3, an accelerator other than CUDA or the CPU, or gradient clipping by
                value.
        """
        if self.stage not in (2, 3):
            raise InputError(f"ZeRO's stage is {self.stage}: use 2 or 3.")
        assert self.lightning_module is not None
        if self.lightning_module.trainer.gradient_clip_algorithm == "value":
            raise InputError("DeepSpeed clips gradients by their norm only: leave out trainer.gradient_clip_algorithm.")
        if self.root_device.type not in ("cuda", "cpu"):
            raise InputError(f"ZeRO runs on CUDA, and for tests on the CPU, but not on {self.root_device.type}.")
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """As in Lightning, but also on the CPU, and again after an earlier run in this process."""
        warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated")  # raised inside DeepSpeed
        internals.prepare_deepspeed(on_cpu=self.root_device.type == "cpu")
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Build the full model: it is initialized as in any other run, and sharded afterwards."""
        yield

    # --- training

    def setup(self, trainer: Trainer) -> None:
        """Shard the model across ranks for training; for evaluation each rank holds the full model.

        Raises:
            InputError: a parameter is frozen, or ZeRO-3 is to shard compiled blocks.
        """
        if self.setup_for_evaluation(trainer):
            return
        module = self.lightning_module
        assert module is not None
        self.require_all_trainable(module)
        if self.stage == 3 and any(part.config.compile for part in module.modules() if isinstance(part, GPDiT)):
            raise InputError(
                "backbone.compile is true, but ZeRO-3 gathers weights in hooks, which torch.compile would trace at "
                "every call: set it to false, or use zero2, fsdp2 or ddp."
            )
        if self.later_weights is not None:
            # In host memory under ZeRO-3: no element is touched before DeepSpeed frees all but this rank's.
            module.to(self.compute_dtype).to_empty(device="cpu" if self.stage == 3 else self.root_device)
        super().setup(trainer)
        self.fill_weights()

    def init_deepspeed(self) -> None:
        """Initialize DeepSpeed for training, without Lightning's warning about gradient clipping."""
        assert self.model is not None
        self._initialize_deepspeed_train(self.model)

    def _format_config(self) -> None:
        super()._format_config()
        assert isinstance(self.config, dict)
        assert self.lightning_module is not None
        in_bf16 = reduction_dtype(self.lightning_module) == torch.bfloat16
        if "bf16" in self.config or in_bf16:
            self.config.setdefault("communication_data_type", "bf16" if in_bf16 else "fp32")
        if "bf16" in self.config:
            self.config.setdefault("data_types", {"grad_accum_dtype": "fp32"})

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: LRSchedulerTypeUnion | None = None
    ) -> Any:
        assert optimizer is not None
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.parameter_groups = [
            [names[parameter] for parameter in group["params"]] for group in optimizer.param_groups
        ]
        # DeepSpeed rounds weights to bf16 before it copies them to float32 master weights.
        rounds = self.compute_dtype != torch.float32 and self.later_weights is None
        unrounded = {name: p.detach().to("cpu", copy=True) for p, name in names.items()} if rounds else {}
        wrapped = super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        zero_optimizer = wrapped[0].optimizer
        locations = (
            internals.zero3_locations(zero_optimizer, names, self.global_rank)
            if self.zero_stage_3
            else internals.zero2_locations(zero_optimizer)
        )
        self.shards = {names[parameter]: ParameterShard(*location) for parameter, location in locations}
        for name, weights in unrounded.items():
            shard = self.shards[name]
            shard.in_storage(shard.storage).copy_(shard.in_full(weights))
        return wrapped

    @property
    def zero_optimizer(self) -> Any:
        """Return DeepSpeed's optimizer, which wraps torch's."""
        return self.deepspeed_engine.optimizer

    @property
    def inner_optimizer(self) -> Optimizer:
        """Return torch's optimizer over flat tensors that contain shards of many parameters."""
        return self.zero_optimizer.optimizer

    @property
    def handles_gradient_accumulation(self) -> bool:
        """Return False: Lightning counts micro-batches, and `backward` marks the last one for DeepSpeed."""
        return False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Do nothing: gradients are reduced after each micro-batch, since each rank keeps only its shard of them."""
        yield

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Run a micro-batch's backward pass; Lightning has already divided its loss by the number of micro-batches."""
        assert self.lightning_module is not None
        is_last = internals.is_last_micro_batch(self.lightning_module.trainer)
        self.deepspeed_engine.set_gradient_accumulation_boundary(is_last)
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def gradient_norm(self) -> Tensor:
        """Return the norm of the gradient, as in the base class; infinite if the gradient is not finite."""
        norm = internals.zero3_gradient_norm if self.zero_stage_3 else internals.zero2_gradient_norm
        return norm(self.zero_optimizer)

    def skip_step(self) -> None:
        """Make the current optimizer step leave weights and optimizer state unchanged, on all ranks."""
        self._restore_norm = internals.skip_zero_step(self.zero_optimizer, self.root_device)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """Run the last micro-batch and, unless `skip_step` was called, the optimizer step."""
        result = super().optimizer_step(optimizer, closure, *args, **kwargs)
        if self._restore_norm is not None:
            self._restore_norm()
            self._restore_norm = None
        return result

    def teardown(self) -> None:
        """Release DeepSpeed's hooks and global references: another stage may follow in this process."""
        super().teardown()
        if self.shards:
            self.deepspeed_engine.destroy()
            self.shards = {}
            if self.zero_stage_3:
                internals.release_zero3_modules()

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Copy the master weights into the weights that the model computes with, on all ranks."""
        refresh = internals.refresh_zero3_weights if self.zero_stage_3 else internals.refresh_zero2_weights
        refresh(self.zero_optimizer)
