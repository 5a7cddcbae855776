"""Weights of a GPDiT with the record of their training."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from gpdit_lightning.checkpoints.facts import EXPORT_AGAIN, TrainingFacts
from gpdit_lightning.errors import InputError
from gpdit_lightning.model import GPDiT
from gpdit_lightning.model.config import EXECUTION_FIELDS, GPDiTConfig
from gpdit_lightning.schema import OBJECT, check
from gpdit_lightning.tensor_files import TensorOnDisk, is_finite

FIRST_BLOCK = "blocks.0."
NOT_FINITE = "use other weights, since these cannot be computed with"
# A model whose linear layers were cast has two of them.
DTYPES = {torch.float32, torch.bfloat16, torch.float16}


@dataclass(frozen=True)
class Weights:
    """Weights of a GPDiT with the record of their training.

    Attributes:
        tensors: state dict of a GPDiT; tensors in a file are read by `load_into`.
        config: the architecture.
        facts: record of the training.
        owner: name of their file, or `the model` if they are in memory; for messages.
        folder: the exported folder that they were read from, if any.
    """

    tensors: Mapping[str, Tensor | TensorOnDisk]
    config: GPDiTConfig
    facts: TrainingFacts
    owner: str = "the model"
    folder: Path | None = None

    @classmethod
    def checked(cls, tensors: Mapping[str, TensorOnDisk], config: Any, facts: Mapping[str, Any], file: str) -> Self:
        """Validate the content of files and return it as `Weights`.

        A file chooses neither code to import nor how a network is executed, which depends on the machine: the settings
        of execution are the defaults.

        Args:
            tensors: named weights; their number of layers is compared with the architecture, and all else by
                `check_fit`.
            config: a `GPDiTConfig.to_dict()`, not validated.
            facts: the fields of `TrainingFacts`, not validated; other fields are ignored.
            file: the file of `config` and `facts`, for messages.

        Raises:
            InputError: a field is missing or of the wrong type, or the layers are not those of the architecture.
        """
        known = TrainingFacts.from_dict(facts, file)
        check(config, OBJECT, "config", file, EXPORT_AGAIN)
        try:
            architecture = GPDiTConfig.from_dict(config)
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
        defaults = {field.name: field.default for field in fields(GPDiTConfig) if field.name in EXECUTION_FIELDS}
        architecture = architecture.replaced(**defaults)
        layers = {int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d{1,9})\.", name))}
        if layers != {*range(architecture.layers)}:
            raise InputError(
                f"{file} has layers = {architecture.layers} where its weights are of {len(layers)} layers: "
                f"{EXPORT_AGAIN}."
            )
        if len(known.classes) > architecture.classes:
            raise InputError(
                f"{file} names {len(known.classes)} classes where its architecture has {architecture.classes}: "
                f"{EXPORT_AGAIN}."
            )
        return cls(tensors, architecture, known, file)

    def load_into(self, model: nn.Module, assign: bool = False) -> None:
        """Copy the tensors into a model or, with `assign`, make them its parameters without a copy.

        Call `check_fit` before, and before the model is built.

        Raises:
            InputError: a tensor of a file cannot be read or is not finite.
        """
        if assign:
            model.load_state_dict(self.read_all(), assign=True)
            return
        with torch.no_grad():
            for name, parameter in model.state_dict().items():  # one by one: a second copy of all might not fit
                parameter.copy_(self.read(name))

    def check_fit(self) -> None:
        """Compare the tensors with the architecture, without reading them and without building the network.

        Raises:
            InputError: a tensor is missing, unknown, of another shape or not of a floating-point type, or of another
                type than similar ones.
        """
        expected = {name: f"shape {shape}" for name, shape in shapes_of(self.config).items()}
        actual = {name: _shape_text(tensor) for name, tensor in self.tensors.items()}
        for name in (*expected, *actual):
            if expected.get(name) != actual.get(name):
                raise InputError(
                    f"{self.owner} has {actual.get(name, 'nothing')} as {name} where its architecture "
                    f"has {expected.get(name, 'nothing')}: {EXPORT_AGAIN}."
                )
        stored = {tensor.dtype for tensor in self.tensors.values() if isinstance(tensor, TensorOnDisk)}
        if not stored <= DTYPES and stored != {torch.float64}:
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in stored))
            raise InputError(f"{self.owner} has weights of {names}, which are not computed with: {EXPORT_AGAIN}.")
        linear = {
            name.rpartition(".")[0]
            for name, tensor in self.tensors.items()
            if name.startswith("blocks.") and len(tensor.shape) == 2
        }
        first = dict[bool, torch.dtype]()  # of the linear layers of blocks, which may have been cast, and of all else
        for name, tensor in self.tensors.items():
            expected_type = first.setdefault(name.rpartition(".")[0] in linear, tensor.dtype)
            if tensor.dtype != expected_type:
                raise InputError(
                    f"{self.owner} has {name} of {tensor.dtype} where similar weights are of {expected_type}: "
                    f"{EXPORT_AGAIN}."
                )

    def read_all(self) -> dict[str, Tensor]:
        """Return all tensors; errors as of `read`."""
        return {name: self.read(name) for name in self.tensors}

    def read(self, name: str) -> Tensor:
        """Return a tensor; one in a file is read into host memory.

        Raises:
            InputError: it cannot be read, or has numbers that are not finite.
        """
        tensor = self.tensors[name]
        if isinstance(tensor, Tensor):
            return tensor
        values = tensor.read()
        if not is_finite(values):
            raise InputError(f"{self.owner} has numbers in {name} that are not finite (NaN or infinity): {NOT_FINITE}.")
        return values


def shapes_of(config: GPDiTConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of an architecture by their names; only one of its equal blocks is built."""
    with torch.device("meta"):
        state = GPDiT(config.replaced(layers=1)).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if not name.startswith(FIRST_BLOCK)}
    for name, tensor in state.items():
        if name.startswith(FIRST_BLOCK):
            of_block = name.removeprefix(FIRST_BLOCK)
            shapes |= {f"blocks.{layer}.{of_block}": tuple(tensor.shape) for layer in range(config.layers)}
    return shapes


def _shape_text(tensor: Any) -> str:
    is_floating_point = isinstance(tensor, Tensor) and tensor.is_floating_point()
    if not is_floating_point and not (isinstance(tensor, TensorOnDisk) and tensor.dtype.is_floating_point):
        return "something other than floating-point numbers"
    return f"shape {tuple(tensor.shape)}"
