"""Weights of a GPDiT with what is known of them, and the exported folder in which they are shared.

The folder holds `model.safetensors`, `config.json` and the model card, `README.md`. Nothing else in it is read, and
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
from gpdit_lightning.files import atomic_write
from gpdit_lightning.model.attention.backends import BUILT_IN
from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.schema import OBJECT, check
from gpdit_lightning.version import __version__

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FORMAT = "gpdit_lightning-model-1"


@dataclass(frozen=True)
class Weights:
    """Weights of a GPDiT and what is known of them.

    Attributes:
        tensors: the state dict of a GPDiT; mapped from its file, so that only what is used is read.
        config: the architecture.
        facts: what is known of the training of the weights.
        path: the checkpoint or exported folder that they were read from; None for those of a model in memory.
    """

    tensors: dict[str, Tensor]
    config: GPDiTConfig
    facts: TrainingFacts
    path: Path | None = None

    @classmethod
    def checked(
        cls, tensors: dict[str, Tensor], config: Any, facts: Mapping[str, Any], path: Path, file: str | None = None
    ) -> Self:
        """Weights out of files that may hold anything.

        Args:
            tensors: named weights; `load_into` checks them.
            config: what should be a `GPDiTConfig.to_dict()`.
            facts: the fields of `TrainingFacts`, among others.
            path: the checkpoint or exported folder.
            file: the file that `config` and `facts` are from, for messages; `path` if not given.

        Raises:
            InputError: a field is missing or of the wrong kind.
        """
        file = file or str(path)
        known = TrainingFacts.from_dict(facts, file)
        check(config, OBJECT, "config", file, EXPORT_AGAIN)
        try:
            architecture = GPDiTConfig.preset(**config)
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
        if architecture.attention_backend not in BUILT_IN:
            # An import path or a name of another process: a file of weights must not choose code to import.
            architecture = architecture.replaced(attention_backend="auto")
        if known.classes and len(known.classes) != architecture.classes:
            raise InputError(
                f"{file} names {len(known.classes)} classes where its architecture has {architecture.classes}: "
                f"{EXPORT_AGAIN}."
            )
        return cls(tensors, architecture, known, path)

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
                    f"{self.path or 'the model'} has {given.get(name, 'nothing')} as {name} where its architecture has "
                    f"{wanted.get(name, 'nothing')}: {EXPORT_AGAIN}."
                )
        model.load_state_dict(self.tensors, assign=assign)


def read_exported(folder: Path) -> Weights:
    """The weights in an exported folder, mapped from their file.

    Raises:
        InputError: a file is missing, truncated, or of another kind.
    """
    path, config_path = folder / WEIGHTS, folder / CONFIG
    cure = f"{EXPORT_AGAIN}, or copy or download all of its folder"
    try:
        content = json.loads(config_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{config_path} does not exist: {cure}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{config_path} is no readable JSON ({error}): {cure}.") from None
    file_format = content.get("format") if isinstance(content, dict) else None
    if file_format != FORMAT:
        raise InputError(f"{config_path} has format {file_format!r} and this version reads {FORMAT!r}: {cure}.")
    if not path.is_file():
        raise InputError(f"{path} does not exist, and weights in other files are not opened: {cure}.")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is not a complete safetensors file ({error}): {cure}.") from None
    return Weights.checked(tensors, content.get("config"), content, folder, str(config_path))


def write_exported(folder: Path, weights: Weights) -> None:
    """Write the files of an exported folder, each completely or not at all; an existing card is kept.

    Raises:
        InputError: the disk has no room.
    """
    with atomic_write(folder / CONFIG) as path:
        path.write_text(config_json(weights), encoding="utf-8")
    with atomic_write(folder / WEIGHTS) as path:
        try:
            # Contiguous tensors, as nearly all are, are written without a copy.
            save_file({name: tensor.contiguous() for name, tensor in weights.tensors.items()}, path)
        except SafetensorError as error:
            raise InputError(f"{folder / WEIGHTS} cannot be written ({error}): free some disk space.") from None
        shutil.copymode(folder / CONFIG, path)  # safetensors lets its owner alone read it
    if not (folder / CARD).exists():
        parameters = sum(tensor.numel() for tensor in weights.tensors.values())
        with atomic_write(folder / CARD) as path:
            path.write_text(model_card(weights.config, weights.facts, parameters, _dtype(weights)), encoding="utf-8")


def config_json(weights: Weights) -> str:
    """The text of `config.json`, without the settings of how the model was executed, such as `compile`."""
    shared = GPDiTConfig.preset(weights.config.size, **weights.config.architecture())
    head = {"format": FORMAT, "library_version": __version__, "dtype": _dtype(weights), "config": shared.to_dict()}
    return json.dumps(head | weights.facts.to_dict(), indent=2) + "\n"


def _dtype(weights: Weights) -> str:
    return str(next(iter(weights.tensors.values())).dtype).removeprefix("torch.")


def _described(tensor: Any) -> str:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return "something other than floating-point numbers"
    return f"shape {tuple(tensor.shape)}"
