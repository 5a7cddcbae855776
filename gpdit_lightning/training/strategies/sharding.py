"""What ZeRO and FSDP2 have in common: ranks keep parts of the parameters, a checkpoint is that of one process."""

from abc import abstractmethod
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed
from lightning import LightningModule
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from gpdit_lightning.checkpoints.files import read_content
from gpdit_lightning.errors import InputError


@dataclass(frozen=True)
class Part:
    """What this rank keeps of one parameter in float32, and updates.

    Attributes:
        shape: of the whole parameter.
        start: where in the flattened parameter the part begins.
        size: its elements; 0 where other ranks keep all of it.
        owner: the tensor that the optimiser updates and its moments belong to: with ZeRO a flat one with the parts of
            many parameters, with FSDP2 the distributed parameter itself.
        offset: where in what this rank has of `owner` the part begins.
    """

    shape: torch.Size
    start: int
    size: int
    owner: Tensor
    offset: int

    def of_owner(self, values: Tensor) -> Tensor:
        """The part (size,) of `owner`, or of a moment of the same layout; a view."""
        local = values.to_local() if isinstance(values, DTensor) else values
        return local.detach().view(-1).narrow(0, self.offset, self.size)

    def of_whole(self, whole: Tensor) -> Tensor:
        """The part (size,) of the whole parameter, or of a moment or an average of it; a view."""
        return whole.detach().flatten().narrow(0, self.start, self.size)


class Sharded(ParallelStrategy):
    """Spreads weights, gradients and moments over the ranks.

    A checkpoint is what one process would write, in float32, so that any number of ranks with any strategy
    goes on from it, and nothing in it is unpickled. The first rank gathers it, tensor by tensor, in main memory. Every
    rank builds the whole model in main memory before its weights are spread.

    Attributes:
        PRECISION: how inputs and products are cast, made from the name of a precision.
        parts: by parameter, once training is set up.
        groups: names of the parameters in the optimiser's groups.
    """

    PRECISION: ClassVar[type[Any]]
    parts: dict[str, Part]
    groups: list[list[str]]

    @property
    @abstractmethod
    def inner_optimizer(self) -> Optimizer:
        """torch's optimiser over the owners of the parts."""

    @abstractmethod
    def weights_changed(self) -> None:
        """Take the working copies, on all ranks, from what was written into `weights()`."""

    @abstractmethod
    def gradient_norm(self) -> Tensor:
        """Norm of the gradient over all ranks before clipping, once its last micro-batch is through: a scalar.

        All ranks must ask.
        """

    @abstractmethod
    def leave_out_step(self) -> None:
        """Have the optimizer step under way leave weights and moments alone; all ranks call it."""

    @property
    def working_dtype(self) -> torch.dtype:
        """Of the weights that the model computes with."""
        return torch.float32 if self.precision_plugin.precision == "32-true" else torch.bfloat16

    @property
    def precision_plugin(self) -> Precision:
        """Of the class `PRECISION`: float32 or bf16-mixed; to set another raises `InputError`."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if plugin is not None and plugin.precision not in ("32-true", "bf16-mixed"):
            raise InputError(f"trainer.precision is {plugin.precision}: with ZeRO or FSDP2 take bf16-mixed or 32-true.")
        self._precision_plugin = None if plugin is None else self.PRECISION(plugin.precision)

    def all_trained(self, module: LightningModule) -> None:
        """Raises `InputError` where some parameters are not trained."""
        frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
        if frozen:
            raise InputError(
                f"with ZeRO or FSDP2 all parameters are trained, but {frozen[0]} is not: use strategy ddp."
            )

    def keep_whole(self) -> None:
        """To evaluate a model each rank holds all of it, in the precision that it is trained in."""
        assert self.lightning_module is not None
        for parameter in self.lightning_module.parameters():
            parameter.data = parameter.data.to(self.working_dtype)
        self.model = self.lightning_module.to(self.root_device)
        self.barrier()

    # --- the float32 weights, for the average

    def weights(self) -> dict[str, Tensor]:
        """This rank's part (n,) of every parameter in float32: views of what the optimiser updates."""
        return {name: part.of_owner(part.owner) for name, part in self.parts.items()}

    def whole(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put together what all ranks have parts (n,) of, in the first rank's main memory; empty on the others."""
        found = {}
        for name, values in parts.items():
            part = self.parts[name]
            whole = torch.zeros(part.shape.numel(), dtype=torch.float32, device=self.root_device)
            part.of_whole(whole).copy_(values)
            torch.distributed.reduce(whole, dst=0)
            if self.is_global_zero:
                found[name] = whole.view(part.shape).cpu()
        return found

    # --- checkpoints

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """The model takes its weights before they are spread."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimiser's state is in the checkpoint, as in any other run."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """The model's state in float32, on the first rank."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict() | self.whole(self.weights())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As torch's optimiser over whole parameters would give it, on the first rank."""
        inner = self.inner_optimizer
        state: dict[int, dict[str, Any]] = {}
        for number, name in enumerate(name for group in self.groups for name in group):
            part = self.parts[name]
            for key, values in inner.state.get(part.owner, {}).items():
                if torch.is_tensor(values) and values.shape == part.owner.shape:
                    values = self.whole({name: part.of_owner(values)}).get(name)
                else:
                    values = deepcopy(values)  # the count of steps: with ZeRO one tensor for many parameters
                state.setdefault(number, {})[key] = values
        groups, first = [], 0
        for settings, group in zip(inner.param_groups, self.groups, strict=True):
            groups.append(settings | {"params": list(range(first, first + len(group)))})
            first += len(group)
        return {"state": state, "param_groups": groups}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's parts of the moments from a checkpoint of any strategy."""
        inner, saved = self.inner_optimizer, checkpoint["optimizer_states"][0]
        for number, name in enumerate(name for group in self.groups for name in group):
            part = self.parts[name]
            for key, values in saved["state"].get(number, {}).items():
                state = inner.state[part.owner]
                if torch.is_tensor(values) and values.shape == part.shape:
                    if key not in state:
                        state[key] = torch.zeros_like(part.owner)
                    part.of_owner(state[key]).copy_(part.of_whole(values))
                else:
                    state[key] = values.clone() if torch.is_tensor(values) else values
        for group, settings in zip(inner.param_groups, saved["param_groups"], strict=True):
            group.update({key: value for key, value in settings.items() if key != "params"})

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write the files, on the first rank."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Map the files into memory, which the ranks of a machine share: each reads the parts that it needs."""
        return read_content(Path(checkpoint_path))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Into the whole model, before it is spread."""
        Strategy.load_model_state_dict(self, checkpoint, strict)


def sharding_of(module: LightningModule) -> Sharded | None:
    """The strategy that spreads a module's weights over the ranks; None where every rank has them whole."""
    strategy = module._trainer.strategy if module._trainer is not None else None
    return strategy if isinstance(strategy, Sharded) and strategy.parts else None
