"""Common base of ZeRO and FSDP2: ranks keep shards of the parameters, and write them as parts of a checkpoint."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed
from lightning import LightningModule, Trainer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from gpdit_lightning.checkpoints.content import check_shapes, read_resumable
from gpdit_lightning.checkpoints.distributed import BackgroundTask, Publish, as_bytes, save_parts
from gpdit_lightning.checkpoints.io import FolderCheckpointIO
from gpdit_lightning.checkpoints.parts import TensorSlice, places, take_slices
from gpdit_lightning.errors import InputError
from gpdit_lightning.model.precision import product_dtype
from gpdit_lightning.tensor_files import TensorOnDisk, check_finite
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

    def read(self, stored: TensorOnDisk) -> Tensor:
        """Read the shard (size,) of a full parameter, optimizer state or average on disk, and no other elements."""
        return stored.read_range(self.start, self.size)

    def in_full(self, values: Tensor) -> Tensor:
        """Return the shard (size,) of the full parameter, or of its full optimizer state or average, as a view."""
        return values.detach().flatten().narrow(0, self.start, self.size)


class SaveInBackground(NamedTuple):
    """How a checkpoint is written while the training continues.

    Attributes:
        task: the thread that writes; it must be free.
        publish: called in that thread of the first rank, when all parts are on disk.
    """

    task: BackgroundTask
    publish: Publish


class LaterWeights(NamedTuple):
    """The weights of a model that is built on the meta device.

    Attributes:
        values: value of each parameter by name; a later one of the same name replaces an earlier one. Each rank reads
            its elements of those on disk, and drops those in memory one after the other.
        device: the default device on which values are computed.
        owner, cure: whose values they are, and what the user should do if they are not finite; for messages.
    """

    values: Iterable[tuple[str, Tensor | TensorOnDisk]]
    device: torch.device
    owner: str = "the checkpoint"
    cure: str = "use another checkpoint of the run"


class ShardedStrategy(ParallelStrategy):
    """Shards weights, gradients and optimizer state across ranks.

    A checkpoint has the content that a single process would write, in float32: any number of ranks with any strategy
    can resume from it, without unpickling. Each rank writes its slices of the tensors to a file, after it has copied
    them to host memory.

    A stage of the library builds its model on the meta device: a rank has its shards only, and at the start one more
    tensor at a time. A stage with a custom `configure_model` builds the full model on every rank.

    Attributes:
        PRECISION: class of the precision plugin, constructed with the name of a precision.
        shards: this rank's shard of every parameter by name; empty before the setup of training.
        parameter_groups: names of the parameters in the optimizer's groups.
        later_weights: those that a model on the meta device gets after it is sharded; set by its stage.
    """

    PRECISION: ClassVar[type[Any]]
    shards: dict[str, ParameterShard]
    parameter_groups: list[list[str]]
    later_weights: LaterWeights | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shards, self.parameter_groups = {}, []
        self._staging: dict[str, Tensor] = {}
        self.later_weights: LaterWeights | None = None
        self._writing: BackgroundTask | None = None
        self._group: ProcessGroup | None = None  # of the thread that writes checkpoints

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

    @torch.no_grad()
    def fill_weights(self) -> None:
        """Set this rank's shards to `later_weights`, if there are any; call it when the model is sharded.

        Raises:
            InputError: an element on disk is not finite.
        """
        if self.later_weights is None:
            return
        values, device, owner, cure = self.later_weights
        self.later_weights = None
        with device:
            for name, full in values:
                shard = self.shards[name]
                if isinstance(full, TensorOnDisk):
                    mine = shard.read(full)
                    check_finite({name: mine}, owner, cure)
                else:
                    mine = shard.in_full(full)
                shard.in_storage(shard.storage).copy_(mine)
        self.refresh_weights()

    def master_weights(self) -> dict[str, Tensor]:
        """Return this rank's shard (size,) of every parameter in float32, as views of the optimizer's tensors."""
        return {name: shard.in_storage(shard.storage) for name, shard in self.shards.items()}

    def slices(self, shards: Mapping[str, Tensor]) -> dict[str, TensorSlice]:
        """Return this rank's shards (size,) of parameters, or of values like them, as slices of full tensors."""
        return {
            name: TensorSlice(values, self.shards[name].start, tuple(self.shards[name].shape))
            for name, values in shards.items()
        }

    def gather(self, part: TensorSlice) -> Tensor | None:
        """Gather the slices of all ranks as a full tensor in host memory on the first rank; others get None."""
        full = torch.zeros(math.prod(part.shape), dtype=part.values.dtype, device=self.root_device)
        full[part.start : part.start + part.values.numel()] = part.values
        torch.distributed.reduce(full, dst=0)
        return full.view(part.shape).cpu() if self.is_global_zero else None

    # --- checkpoints

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Return False: the model loads its weights before it is sharded."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Return True: the checkpoint contains the optimizer state, as in any other run."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the model's state in float32, with this rank's slices of the parameters (`TensorSlice`)."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict() | self.slices(self.master_weights())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state dict of torch's optimizer for full parameters, with this rank's slices of the state."""
        inner = self.inner_optimizer
        state: dict[int, dict[str, Any]] = {}
        for number, name in self._numbered_parameters():
            shard = self.shards[name]
            for key, values in inner.state.get(shard.storage, {}).items():
                if torch.is_tensor(values) and values.shape == shard.storage.shape:
                    values = TensorSlice(shard.in_storage(values), shard.start, tuple(shard.shape))
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
                if isinstance(stored, TensorOnDisk) and stored.shape == shard.shape:
                    if key not in state:
                        state[key] = torch.zeros_like(shard.storage)
                    shard.in_storage(state[key]).copy_(shard.read(stored))
                else:
                    state[key] = stored.read() if isinstance(stored, TensorOnDisk) else stored
        for group, settings in zip(inner.param_groups, saved["param_groups"], strict=True):
            group.update({key: value for key, value in settings.items() if key != "params"})

    def _numbered_parameters(self) -> Iterator[tuple[int, str]]:
        """Yield the number of every parameter in an optimizer's state dict, and its name."""
        return enumerate(name for names in self.parameter_groups for name in names)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: SaveInBackground | None = None
    ) -> None:
        """Write the checkpoint in parts, a file of each rank; as whole tensors if there is one rank.

        Whole tensors are also written by a `CheckpointIO` of the recipe: the first rank gathers them.

        Args:
            checkpoint: the content, with slices.
            filepath: folder of the checkpoint.
            storage_options: how to write the parts in the background; None: they are written before this returns.
        """
        if not self.writes_parts:
            for place in places(checkpoint):
                if isinstance(place.value, TensorSlice):
                    place.container[place.key] = self.gather(place.value)
            Strategy.save_checkpoint(self, checkpoint, filepath)
            return
        if self._writing is not None:  # another callback may save, too
            self._writing.join()
        slices = self._staged(take_slices(checkpoint))
        record = as_bytes(checkpoint) if self.is_global_zero else b""
        if self._group is None:
            self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=1))
        save = partial(save_parts, Path(filepath), record, slices, self._group)
        if storage_options is None:
            save(lambda files: None)
        else:
            self._writing = storage_options.task
            self._writing.start(partial(save, storage_options.publish))

    @property
    def writes_parts(self) -> bool:
        """Whether each rank writes its part of a checkpoint."""
        return self.world_size > 1 and isinstance(self.checkpoint_io, FolderCheckpointIO)

    def _staged(self, slices: Mapping[str, TensorSlice]) -> dict[str, TensorSlice]:
        """Copy this rank's slices to host memory, which the next checkpoint overwrites."""
        staged = {}
        for name, part in slices.items():
            known = self._staging.get(name)
            if known is None or known.shape != part.values.shape:
                self._staging[name] = known = torch.empty(part.values.shape, dtype=part.values.dtype)
            staged[name] = TensorSlice(known.copy_(part.values), part.start, part.shape)
        return staged

    def teardown(self) -> None:
        """Release the host memory of checkpoints and their process group, as the base class does with all else."""
        module = self.lightning_module
        if module is not None and any(parameter.is_meta for parameter in module.parameters()):
            module.to_empty(device="cpu")  # after a failed start, since Lightning moves the module there
        super().teardown()
        self._staging = {}
        if self._group is not None and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group(self._group)
        self._group = None

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read all but weights, average and optimizer state, which each rank reads one tensor at a time."""
        return read_resumable(Path(checkpoint_path), lazily=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the full model, before it is sharded; one on the meta device gets its weights after that."""
        assert self.lightning_module is not None
        if strict:
            check_shapes(checkpoint["state_dict"], self.lightning_module.state_dict())
        if self.later_weights is not None:
            self.later_weights = LaterWeights(checkpoint["state_dict"].items(), torch.device("cpu"))
            return
        with torch.no_grad():
            for name, parameter in self.lightning_module.state_dict().items():
                if name not in checkpoint["state_dict"] and not strict:
                    continue
                values = checkpoint["state_dict"][name].read()
                check_finite({name: values}, "the checkpoint", "use another checkpoint of the run")
                parameter.copy_(values)


def strategy_of_later_weights(module: LightningModule) -> ShardedStrategy | None:
    """Return the strategy for which a module is to be built on the meta device; None if it is built as usual."""
    trainer = attached_trainer(module)
    if trainer is None or trainer.state.fn != TrainerFn.FITTING:
        return None
    return trainer.strategy if isinstance(trainer.strategy, ShardedStrategy) else None


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
