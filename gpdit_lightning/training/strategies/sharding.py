"""Common base of ZeRO and FSDP2: ranks keep shards of the parameters; a checkpoint is that of one process."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed
from lightning import LightningModule, Trainer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from gpdit_lightning.checkpoints.content import check_shapes, read_resumable
from gpdit_lightning.errors import InputError
from gpdit_lightning.model.precision import product_dtype
from gpdit_lightning.tensor_files import StoredTensor, check_finite
from gpdit_lightning.training.internals import attached_trainer


@dataclass(frozen=True)
class ParameterShard:
    """The elements of one parameter that this rank keeps in float32 and updates.

    Attributes:
        shape: shape of the full parameter.
        start: index of the shard's first element in the flattened parameter.
        size: number of its elements; 0 if other ranks keep all of them.
        storage: the tensor that the optimizer updates: with ZeRO a flat tensor that contains shards of many parameters,
            with FSDP2 the distributed parameter itself.
        offset: index of the shard's first element in this rank's data of `storage`.
    """

    shape: torch.Size
    start: int
    size: int
    storage: Tensor
    offset: int

    def in_storage(self, values: Tensor) -> Tensor:
        """Return the shard (size,) of `storage`, or of optimizer state with the same layout, as a view."""
        local = values.to_local() if isinstance(values, DTensor) else values
        return local.detach().view(-1).narrow(0, self.offset, self.size)

    def in_full(self, values: Tensor) -> Tensor:
        """Return the shard (size,) of the full parameter, or of its full optimizer state or average, as a view."""
        return values.detach().flatten().narrow(0, self.start, self.size)


class ShardedStrategy(ParallelStrategy):
    """Shards weights, gradients and optimizer state across ranks.

    A checkpoint is the one that a single process would write, in float32: any number of ranks with any strategy can
    resume from it, without unpickling. The first rank gathers it in host memory, tensor by tensor. Every rank builds
    the full model in host memory before it is sharded.

    Attributes:
        PRECISION: class of the precision plugin, constructed with the name of a precision.
        shards: this rank's shard of every parameter by name; empty before the setup of training.
        parameter_groups: names of the parameters in the optimizer's groups.
    """

    PRECISION: ClassVar[type[Any]]
    shards: dict[str, ParameterShard]
    parameter_groups: list[list[str]]

    @property
    @abstractmethod
    def inner_optimizer(self) -> Optimizer:
        """Return torch's optimizer over the shards' storage."""

    @abstractmethod
    def refresh_weights(self) -> None:
        """Copy the master weights, after they were changed, to the weights that the model computes with."""

    @abstractmethod
    def gradient_norm(self) -> Tensor:
        """Return the norm of the gradient over all ranks before clipping: a scalar.

        Call it after the last micro-batch of a step. A collective operation: all ranks must call it.
        """

    @abstractmethod
    def skip_step(self) -> None:
        """Make the current optimizer step leave weights and optimizer state unchanged; all ranks must call it."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the precision of the weights that the model computes with."""
        return torch.float32 if self.precision_plugin.precision == "32-true" else torch.bfloat16

    @property
    def precision_plugin(self) -> Precision:
        """Return the plugin, a `PRECISION`. Its setter raises `InputError` unless it is 32-true or bf16-mixed."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if plugin is not None and plugin.precision not in ("32-true", "bf16-mixed"):
            raise InputError(f"trainer.precision is {plugin.precision}: with ZeRO or FSDP2 use bf16-mixed or 32-true.")
        converted = None if plugin is None else self.PRECISION(plugin.precision)
        Strategy.precision_plugin.fset(self, converted)  # type: ignore[attr-defined]

    def require_all_trainable(self, module: LightningModule) -> None:
        """Raise `InputError` if a parameter is frozen."""
        frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
        if frozen:
            raise InputError(
                f"ZeRO and FSDP2 train all parameters, but {frozen[0]} is frozen: use trainer.strategy ddp."
            )

    def setup_for_evaluation(self, trainer: Trainer) -> bool:
        """Keep the full model on each rank, in the precision of training, if the trainer does not train.

        Returns:
            whether it does not train.
        """
        if trainer.state.fn == TrainerFn.FITTING:
            return False
        assert self.accelerator is not None
        assert self.lightning_module is not None
        self.accelerator.setup(trainer)
        for parameter in self.lightning_module.parameters():
            parameter.data = parameter.data.to(self.compute_dtype)
        self.model = self.lightning_module.to(self.root_device)
        self.barrier()
        return True

    # --- the float32 weights

    def master_weights(self) -> dict[str, Tensor]:
        """Return this rank's shard (size,) of every parameter in float32, as views of the optimizer's tensors."""
        return {name: shard.in_storage(shard.storage) for name, shard in self.shards.items()}

    def gather(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather the shards (size,) of all ranks as full tensors in host memory on the first rank; others get none."""
        gathered = {}
        for name, values in shards.items():
            shard = self.shards[name]
            full = torch.zeros(shard.shape.numel(), dtype=torch.float32, device=self.root_device)
            shard.in_full(full).copy_(values)
            torch.distributed.reduce(full, dst=0)
            if self.is_global_zero:
                gathered[name] = full.view(shard.shape).cpu()
        return gathered

    # --- checkpoints

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Return False: the model loads its weights before it is sharded."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Return True: the checkpoint contains the optimizer state, as in any other run."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """Return the model's state in float32, on the first rank."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict() | self.gather(self.master_weights())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state dict of torch's optimizer for full parameters, on the first rank."""
        inner = self.inner_optimizer
        state: dict[int, dict[str, Any]] = {}
        for number, name in self._numbered_parameters():
            shard = self.shards[name]
            for key, values in inner.state.get(shard.storage, {}).items():
                if torch.is_tensor(values) and values.shape == shard.storage.shape:
                    values = self.gather({name: shard.in_storage(values)}).get(name)
                else:
                    values = deepcopy(values)  # the step count: with ZeRO one tensor for many parameters
                state.setdefault(number, {})[key] = values
        groups, first = [], 0
        for settings, names in zip(inner.param_groups, self.parameter_groups, strict=True):
            groups.append(settings | {"params": list(range(first, first + len(names)))})
            first += len(names)
        return {"state": state, "param_groups": groups}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's shards of the optimizer state from a checkpoint of any strategy."""
        inner, saved = self.inner_optimizer, checkpoint["optimizer_states"][0]
        for number, name in self._numbered_parameters():
            shard = self.shards[name]
            for key, stored in saved["state"].get(number, {}).items():
                state = inner.state[shard.storage]
                values = stored.read() if isinstance(stored, StoredTensor) else stored
                if torch.is_tensor(values) and values.shape == shard.shape:
                    if key not in state:
                        state[key] = torch.zeros_like(shard.storage)
                    shard.in_storage(state[key]).copy_(shard.in_full(values))
                else:
                    state[key] = values.clone() if torch.is_tensor(values) else values
        for group, settings in zip(inner.param_groups, saved["param_groups"], strict=True):
            group.update({key: value for key, value in settings.items() if key != "params"})

    def _numbered_parameters(self) -> Iterator[tuple[int, str]]:
        """Yield the number of every parameter in an optimizer's state dict, and its name."""
        return enumerate(name for names in self.parameter_groups for name in names)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write the files on the first rank."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read all but weights, average and optimizer state, which each rank reads one tensor at a time."""
        return read_resumable(Path(checkpoint_path), lazily=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the full model, before it is sharded."""
        assert self.lightning_module is not None
        if strict:
            check_shapes(checkpoint["state_dict"], self.lightning_module.state_dict())
        with torch.no_grad():
            for name, parameter in self.lightning_module.state_dict().items():
                if name not in checkpoint["state_dict"] and not strict:
                    continue
                values = checkpoint["state_dict"][name].read()
                check_finite({name: values}, "the checkpoint", "use another checkpoint of the run")
                parameter.copy_(values)


def product_dtype_of(trainer: Trainer) -> torch.dtype:
    """Return the precision of matrix products and attention in a trainer's steps."""
    strategy = trainer.strategy
    if isinstance(strategy, ShardedStrategy):
        return strategy.compute_dtype
    with strategy.precision_plugin.forward_context():
        return product_dtype(torch.empty(0, device=strategy.root_device))


def sharded_strategy_of(module: LightningModule) -> ShardedStrategy | None:
    """Return the strategy that shards a module's weights across ranks, or None if every rank holds all of them."""
    trainer = attached_trainer(module)
    strategy = trainer.strategy if trainer is not None else None
    return strategy if isinstance(strategy, ShardedStrategy) and strategy.shards else None
