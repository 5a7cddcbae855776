"""ZeRO: weights, gradients and moments spread over the ranks by DeepSpeed; checkpoints like those of any other run."""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import LRSchedulerTypeUnion
from torch import Tensor, nn
from torch.optim import Optimizer

from gpdit_lightning.errors import InputError
from gpdit_lightning.model import GPDiT
from gpdit_lightning.training.strategies.sharding import Part, Sharded


class ZeROPrecision(DeepSpeedPrecision):
    """DeepSpeed's, but latents, noise and noise levels stay in float32: the backbone casts what it embeds."""

    def convert_input(self, data: Any) -> Any:
        """Leave a batch as it is."""
        return data


class ZeRO(Sharded, DeepSpeedStrategy):
    """Trains with DeepSpeed's ZeRO: `zero2`, `zero3`, `zero2_offload` or `zero3_offload` as `trainer.strategy`.

    Unlike Lightning's own strategy for DeepSpeed:

    - accumulated gradients are divided once, not twice, and optimizer steps are steps to callbacks too;
    - bf16-mixed means weights in bf16, and in float32 their masters, the moments and the reduction of gradients; the
      masters begin with the given weights, not with those rounded to bf16;
    - a checkpoint is the file that one process would write;
    - it also runs on the CPU, by gloo: for tests.

    Args:
        stage: 2 spreads moments, masters and gradients; 3 the weights too.
        offload: keep what is spread in main memory, and step the optimiser there.
        options: of Lightning's DeepSpeedStrategy.
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
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)  # torch's does, and compiles nothing
        self.stage = stage
        self.parts = {}
        self.groups = []

    # --- what it runs on

    @property
    def root_device(self) -> torch.device:
        """This rank's device; DeepSpeed wants an index of the CPU too."""
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device

    def setup_environment(self) -> None:
        """Join the other ranks; Lightning insists on CUDA here.

        Raises:
            InputError: another stage than 2 or 3, another accelerator than CUDA or the CPU, or gradients to be clipped
                by value.
        """
        if self.stage not in (2, 3):
            raise InputError(f"ZeRO's stage is {self.stage}: take 2 or 3.")
        assert self.lightning_module is not None
        if self.lightning_module.trainer.gradient_clip_algorithm == "value":
            raise InputError("DeepSpeed clips gradients by their norm only: leave out trainer.gradient_clip_algorithm.")
        if self.root_device.type not in ("cuda", "cpu"):
            raise InputError(f"ZeRO runs on CUDA, and for tests on the CPU, but not on {self.root_device.type}.")
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """As Lightning, but on the CPU too, and again in a process whose last run has left its ranks."""
        from deepspeed.utils import groups

        warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated")  # DeepSpeed's own business
        if not torch.distributed.is_initialized():
            groups._release_process_group_references(group=None)
        if self.root_device.type == "cpu":
            # An operator for shared memory, minutes to compile. (The attribute deepspeed.comm.torch is torch itself.)
            sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Build the model whole: it draws and loads its weights as in any other run, and is spread afterwards."""
        yield

    # --- training

    def setup(self, trainer: Trainer) -> None:
        """Spread the model over the ranks for training; to evaluate it, each rank holds all of it.

        Raises:
            InputError: some parameters are not trained, or compiled blocks are to be spread.
        """
        module, accelerator = self.lightning_module, self.accelerator
        assert module is not None
        assert accelerator is not None
        if trainer.state.fn == TrainerFn.FITTING:
            self.all_trained(module)
            if self.stage == 3 and any(part.config.compile for part in module.modules() if isinstance(part, GPDiT)):
                raise InputError(
                    "backbone.compile is true, but ZeRO-3 gathers weights in hooks, which torch.compile would trace "
                    "again and again: set it to false, or take zero2, fsdp2 or ddp."
                )
            super().setup(trainer)
            return
        accelerator.setup(trainer)
        self.keep_whole()

    def init_deepspeed(self) -> None:
        """For training only, and without Lightning's advice on clipping."""
        assert self.model is not None
        self._initialize_deepspeed_train(self.model)

    def _format_config(self) -> None:
        super()._format_config()
        assert isinstance(self.config, dict)
        if "bf16" in self.config:
            self.config.setdefault("communication_data_type", "fp32")
            self.config.setdefault("data_types", {"grad_accum_dtype": "fp32"})

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: LRSchedulerTypeUnion | None = None
    ) -> Any:
        assert optimizer is not None
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
        # DeepSpeed rounds weights to bf16 before it makes float32 masters of them.
        rounds = self.working_dtype != torch.float32
        whole = {name: p.detach().to("cpu", copy=True) for p, name in names.items()} if rounds else {}
        wrapped = super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        engine = wrapped[0]
        self.parts = dict(self._parts_of(engine.optimizer, names))
        for name, weights in whole.items():
            part = self.parts[name]
            part.of_owner(part.owner).copy_(part.of_whole(weights))
        return wrapped

    def _parts_of(self, optimizer: Any, names: Mapping[nn.Parameter, str]) -> Iterator[tuple[str, Part]]:
        """Find each parameter's part in DeepSpeed's optimiser."""
        if self.zero_stage_3:
            for parameter, name in names.items():
                group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = min(size * self.global_rank, parameter.ds_numel)  # type: ignore[attr-defined]
                size = min(size, parameter.ds_numel - start)  # type: ignore[attr-defined]  # the rest is padding
                flat = optimizer.fp32_partitioned_groups_flat[group]
                yield name, Part(parameter.ds_shape, start, size, flat, offset)  # type: ignore[attr-defined]
            return
        for parameters, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
            for parameter in parameters:
                found = parameter._hp_mapping
                if found is None:
                    yield names[parameter], Part(parameter.shape, 0, 0, flat, 0)
                else:
                    start, size = found.lp_fragment_address.start, found.lp_fragment_address.numel
                    yield names[parameter], Part(parameter.shape, start, size, flat, found.hp_fragment_address.start)

    @property
    def zero_optimizer(self) -> Any:
        """DeepSpeed's optimiser around torch's."""
        return self.deepspeed_engine.optimizer

    @property
    def inner_optimizer(self) -> Optimizer:
        """torch's optimiser over flat tensors with the parts of many parameters."""
        return self.zero_optimizer.optimizer

    @property
    def handles_gradient_accumulation(self) -> bool:
        """Lightning counts micro-batches and tells DeepSpeed of the last one, so that callbacks see whole steps."""
        return False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Gradients are reduced after each micro-batch: each rank keeps its part of them only."""
        yield

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """A micro-batch's backward pass; Lightning has divided its loss by the accumulation already."""
        assert self.lightning_module is not None
        is_last = not self.lightning_module.trainer.fit_loop._should_accumulate()
        self.deepspeed_engine.set_gradient_accumulation_boundary(is_last)
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def gradient_norm(self) -> Tensor:
        """Norm of the gradient over all ranks before clipping, once its last micro-batch is through: a scalar.

        Infinite where the gradient is not finite. All ranks must ask.
        """
        if not self.zero_stage_3:
            return self.zero_optimizer.scaled_global_norm()
        from deepspeed.runtime.utils import combine_grad_norm_groups

        return combine_grad_norm_groups(self.zero_optimizer._get_norm_groups())

    def leave_out_step(self) -> None:
        """Have the optimizer step under way leave weights and moments alone, on all ranks.

        DeepSpeed drops the gradients of a step whose norm is not finite, so it is given such a norm.
        """
        infinite = torch.tensor(float("inf"), device=self.root_device)
        self.zero_optimizer.scaled_global_norm = lambda: infinite  # stage 2
        self.zero_optimizer._get_norm_groups = lambda: [infinite]  # stage 3

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """The last micro-batch and the step, unless `leave_out_step` was called in between."""
        result = super().optimizer_step(optimizer, closure, *args, **kwargs)
        for name in ("scaled_global_norm", "_get_norm_groups"):
            vars(self.zero_optimizer).pop(name, None)
        return result

    def teardown(self) -> None:
        """Have DeepSpeed let go of what it holds in hooks and globals: another stage may follow in this process."""
        super().teardown()
        if self.parts:
            self.deepspeed_engine.destroy()
            self.parts = {}
            if self.zero_stage_3:
                _forget_modules()

    @torch.no_grad()
    def weights_changed(self) -> None:
        """Take the working copies, on all ranks, from what was written into `weights()`."""
        optimizer = self.zero_optimizer
        if not self.zero_stage_3:
            optimizer.update_lp_params()
            return
        optimizer._partition_all_parameters()  # also the small ones that stay whole: the next pass gathers them anew
        for place in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(place)


def _forget_modules() -> None:
    """Empty what DeepSpeed's ZeRO-3 remembers of modules beyond its engine: a global list, and a cache of a method."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    parameter_offload.FWD_MODULE_STACK.clear()
    for method in vars(PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():  # of the wrapper for profiling around the cached method
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()
