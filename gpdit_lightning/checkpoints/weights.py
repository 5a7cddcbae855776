"""Weights of a GPDiT with the record of their training."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from gpdit_lightning.checkpoints.facts import EXPORT_AGAIN, TrainingFacts
from gpdit_lightning.errors import InputError
from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.schema import OBJECT, check


@dataclass(frozen=True)
class Weights:
    """Weights of a GPDiT with the record of their training.

    Attributes:
        tensors: state dict of a GPDiT; memory-mapped, so that only tensors in use are read.
        config: the architecture.
        facts: record of the training.
        owner: name of their file, or `the model` if they are in memory; for messages.
        folder: the exported folder that they were read from, if any.
    """

    tensors: dict[str, Tensor]
    config: GPDiTConfig
    facts: TrainingFacts
    owner: str = "the model"
    folder: Path | None = None

    @classmethod
    def checked(cls, tensors: dict[str, Tensor], config: Any, facts: Mapping[str, Any], file: str) -> Self:
        """Validate the content of files and return it as `Weights`.

        Args:
            tensors: named weights; they are checked by `load_into`.
            config: a `GPDiTConfig.to_dict()`, not validated.
            facts: the fields of `TrainingFacts`, not validated; other fields are ignored.
            file: the file of `config` and `facts`, for messages.

        Raises:
            InputError: a field is missing or of the wrong type.
        """
        known = TrainingFacts.from_dict(facts, file)
        check(config, OBJECT, "config", file, EXPORT_AGAIN)
        try:
            architecture = GPDiTConfig.from_dict(config)
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
        if architecture.attention_backend not in ("auto", "sdpa"):
            # xformers, for which this device may have no kernels (auto selects it where it can be used); an import path
            # or a name registered elsewhere: a file of weights must not choose code to import.
            architecture = architecture.replaced(attention_backend="auto")
        if len(known.classes) > architecture.classes:
            raise InputError(
                f"{file} names {len(known.classes)} classes where its architecture has {architecture.classes}: "
                f"{EXPORT_AGAIN}."
            )
        return cls(tensors, architecture, known, file)

    def load_into(self, model: nn.Module, assign: bool = False) -> None:
        """Copy the tensors into a model or, with `assign`, make them its parameters without a copy.

        Raises:
            InputError: a tensor is missing, unknown, of another shape, or not of a floating-point type.
        """
        expected = {name: f"shape {tuple(tensor.shape)}" for name, tensor in model.state_dict().items()}
        actual = {name: _shape_text(tensor) for name, tensor in self.tensors.items()}
        for name in (*expected, *actual):
            if expected.get(name) != actual.get(name):
                raise InputError(
                    f"{self.owner} has {actual.get(name, 'nothing')} as {name} where its architecture "
                    f"has {expected.get(name, 'nothing')}: {EXPORT_AGAIN}."
                )
        model.load_state_dict(self.tensors, assign=assign)


def _shape_text(tensor: Any) -> str:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return "something other than floating-point numbers"
    return f"shape {tuple(tensor.shape)}"
