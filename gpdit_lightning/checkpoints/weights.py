"""Weights of a GPDiT with what is known of them, and the folder in which they are shared.

The folder holds `model.safetensors`, `config.json` and a card for people, `README.md`. Nothing else in it is read, and
neither of the first two can carry code. `config.json` is plain JSON:

    format, library_version, dtype   how it was written
    config                           the architecture: `GPDiTConfig.to_dict()`
    and the fields of `TrainingFacts` that are known
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gpdit_lightning.checkpoints.card import model_card
from gpdit_lightning.checkpoints.facts import EXPORT_AGAIN, TrainingFacts
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import written_whole
from gpdit_lightning.model.attention.backends import BUILT_IN
from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.schema import OBJECT, check
from gpdit_lightning.version import __version__

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FORMAT = "gpdit_lightning-model-1"


@dataclass(frozen=True)
class Weights:
    """Weights and what is known of them, wherever they lay.

    Attributes:
        tensors: the state dict of a GPDiT; mapped from its file, so that only what is used is read.
        config: the architecture.
        facts: what else is known.
        where: the file or folder, for messages.
    """

    tensors: dict[str, Tensor]
    config: GPDiTConfig
    facts: TrainingFacts
    where: str

    @classmethod
    def checked(cls, tensors: dict[str, Tensor], config: Any, known: Mapping[str, Any], where: str) -> Self:
        """Weights out of a file that may hold anything.

        Args:
            tensors: named weights; `load_into` checks them.
            config: what ought to be a `GPDiTConfig.to_dict()`.
            known: among others, the fields of `TrainingFacts`.
            where: the file that says so.

        Raises:
            InputError: a field that is missing or of the wrong kind.
        """
        facts = TrainingFacts.from_dict(known, where)
        check(config, OBJECT, "config", where, EXPORT_AGAIN)
        try:
            architecture = GPDiTConfig.preset(**config)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if architecture.attention_backend not in BUILT_IN:
            # An import path or a name of another process: a file of weights must not choose code to import.
            architecture = architecture.replaced(attention_backend="auto")
        if facts.classes and len(facts.classes) != architecture.classes:
            raise InputError(
                f"{where} names {len(facts.classes)} classes where its architecture has {architecture.classes}: its "
                "parts do not belong together, export the model again."
            )
        return cls(tensors, architecture, facts, where)

    def load_into(self, model: nn.Module, assign: bool = False) -> None:
        """Copy the tensors into a model or, with `assign`, make them its parameters without a copy.

        Raises:
            InputError: a tensor is missing, unknown, of another shape, or not of floating-point numbers.
        """
        wanted = {name: f"shape {tuple(tensor.shape)}" for name, tensor in model.state_dict().items()}
        given = {name: _described(tensor) for name, tensor in self.tensors.items()}
        for name in (*wanted, *given):
            if wanted.get(name) != given.get(name):
                raise InputError(
                    f"{self.where} has {given.get(name, 'nothing')} as {name} where its architecture has "
                    f"{wanted.get(name, 'nothing')}: its parts do not belong together, export the model again."
                )
        model.load_state_dict(self.tensors, assign=assign)


def is_folder_of_weights(path: Path) -> bool:
    """Whether a path is a folder as `write_folder` makes them, or what is left of one."""
    return any((path / name).is_file() for name in (CONFIG, WEIGHTS))


def read_folder(folder: Path) -> Weights:
    """Weights as `write_folder` left them, mapped from their file.

    Raises:
        InputError: a file is missing, cut off, or not what it ought to be.
    """
    path = folder / WEIGHTS
    config_path = folder / CONFIG
    again = "export the model again, or copy or download all of its folder"
    try:
        content = json.loads(config_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{config_path} does not exist: {again}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{config_path} is no readable JSON ({error}): {again}.") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise InputError(f"{config_path} has format {found!r} and this version reads {FORMAT!r}: {again}.")
    if not path.is_file():
        raise InputError(f"{path} does not exist, and weights in no other file are opened: {again}.")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is no whole safetensors file ({error}): {again}.") from None
    return Weights.checked(tensors, content.get("config"), content, str(config_path))


def write_folder(folder: Path, weights: Weights) -> None:
    """Write the files of a folder, each whole or not at all; a card that is there already stays.

    Raises:
        InputError: there is no room.
    """
    with written_whole(folder / CONFIG) as path:
        path.write_text(config_json(weights), encoding="utf-8")
    with written_whole(folder / WEIGHTS) as path:
        try:
            # Tensors that lie in one piece, as nearly all do, are written from where they are.
            save_file({name: tensor.contiguous() for name, tensor in weights.tensors.items()}, path)
        except SafetensorError as error:
            raise InputError(f"{folder / WEIGHTS} cannot be written ({error}): see that there is room.") from None
        shutil.copymode(folder / CONFIG, path)  # safetensors lets its owner alone read it
    if not (folder / CARD).exists():
        parameters = sum(tensor.numel() for tensor in weights.tensors.values())
        with written_whole(folder / CARD) as path:
            path.write_text(model_card(weights.config, weights.facts, parameters, _dtype(weights)), encoding="utf-8")


def config_json(weights: Weights) -> str:
    """The text of `config.json`. How the model was executed, on which GPU and how compiled, is not the reader's."""
    shared = GPDiTConfig.preset(weights.config.size, **weights.config.architecture())
    head = {"format": FORMAT, "library_version": __version__, "dtype": _dtype(weights), "config": shared.to_dict()}
    return json.dumps(head | weights.facts.to_dict(), indent=2) + "\n"


def _dtype(weights: Weights) -> str:
    return str(next(iter(weights.tensors.values())).dtype).removeprefix("torch.")


def _described(tensor: Any) -> str:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return "something other than floating-point numbers"
    return f"shape {tuple(tensor.shape)}"
