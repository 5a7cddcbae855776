"""Weights of a GPDiT with the record of their training, and the format of exported models.

An exported folder contains `model.safetensors`, `config.json` and the model card, `README.md`. Other files are never
read, and neither of the first two can contain code. `config.json` is plain JSON:

    format, library_version, dtype   format of the folder, version of its writer, data type of the weights
    config                           architecture: `GPDiTConfig.to_dict()`
    weights, step, stage, ...        the recorded fields of `TrainingFacts`
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
    """Weights of a GPDiT with the record of their training.

    Attributes:
        tensors: state dict of a GPDiT; memory-mapped, so that only tensors in use are read.
        config: the architecture.
        facts: record of the training.
        path: the checkpoint or exported folder that they were read from; None for a model in memory.
    """

    tensors: dict[str, Tensor]
    config: GPDiTConfig
    facts: TrainingFacts
    path: Path | None = None

    @classmethod
    def checked(
        cls, tensors: dict[str, Tensor], config: Any, facts: Mapping[str, Any], path: Path, file: str | None = None
    ) -> Self:
        """Validate the content of files and return it as `Weights`.

        Args:
            tensors: named weights; they are checked by `load_into`.
            config: a `GPDiTConfig.to_dict()`, not validated.
            facts: the fields of `TrainingFacts`, not validated; other fields are ignored.
            path: the checkpoint or exported folder.
            file: the file of `config` and `facts`, for messages; None for `path`.

        Raises:
            InputError: a field is missing or of the wrong type.
        """
        file = file or str(path)
        known = TrainingFacts.from_dict(facts, file)
        check(config, OBJECT, "config", file, EXPORT_AGAIN)
        try:
            architecture = GPDiTConfig.preset(**config)
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
        if architecture.attention_backend not in BUILT_IN:
            # An import path or a name registered elsewhere: a file of weights must not choose code to import.
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
            InputError: a tensor is missing, unknown, of another shape, or not of a floating-point type.
        """
        expected = {name: f"shape {tuple(tensor.shape)}" for name, tensor in model.state_dict().items()}
        actual = {name: _shape_text(tensor) for name, tensor in self.tensors.items()}
        for name in (*expected, *actual):
            if expected.get(name) != actual.get(name):
                raise InputError(
                    f"{self.path or 'the model'} has {actual.get(name, 'nothing')} as {name} where its architecture "
                    f"has {expected.get(name, 'nothing')}: {EXPORT_AGAIN}."
                )
        model.load_state_dict(self.tensors, assign=assign)


def read_exported(folder: Path) -> Weights:
    """Open the weights in an exported folder, memory-mapped.

    Raises:
        InputError: a file is missing, truncated or of another type.
    """
    path, config_path = folder / WEIGHTS, folder / CONFIG
    cure = f"{EXPORT_AGAIN}, or copy or download all of its folder"
    try:
        content = json.loads(config_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{config_path} does not exist: {cure}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{config_path} is not readable JSON ({error}): {cure}.") from None
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
    """Write the files of an exported folder, each atomically; an existing card is kept.

    Raises:
        InputError: the weights cannot be written, usually because the disk is full.
    """
    with atomic_write(folder / CONFIG) as path:
        path.write_text(config_json(weights), encoding="utf-8")
    with atomic_write(folder / WEIGHTS) as path:
        try:
            # `contiguous` copies only the few tensors that are not contiguous already.
            save_file({name: tensor.contiguous() for name, tensor in weights.tensors.items()}, path)
        except SafetensorError as error:
            raise InputError(f"{folder / WEIGHTS} cannot be written ({error}): free some disk space.") from None
        shutil.copymode(folder / CONFIG, path)  # safetensors makes it readable by its owner only
    if not (folder / CARD).exists():
        parameters = sum(tensor.numel() for tensor in weights.tensors.values())
        with atomic_write(folder / CARD) as path:
            path.write_text(model_card(weights.config, weights.facts, parameters, _dtype(weights)), encoding="utf-8")


def config_json(weights: Weights) -> str:
    """Return the text of `config.json`, without settings of execution such as `compile`."""
    config = GPDiTConfig.preset(weights.config.size, **weights.config.architecture())
    head = {"format": FORMAT, "library_version": __version__, "dtype": _dtype(weights), "config": config.to_dict()}
    return json.dumps(head | weights.facts.to_dict(), indent=2) + "\n"


def _dtype(weights: Weights) -> str:
    return str(next(iter(weights.tensors.values())).dtype).removeprefix("torch.")


def _shape_text(tensor: Any) -> str:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return "something other than floating-point numbers"
    return f"shape {tuple(tensor.shape)}"
