"""Weights of a GPDiT with what is known of them, and the folder in which they are shared.

The folder holds `model.safetensors`, `config.json` and a card for people, `README.md`. Nothing else in it is read, and
neither of the first two can carry code. `config.json` is plain JSON:

    format, library_version, dtype   how it was written
    config                           the architecture: `GPDiTConfig.to_dict()`
    and of `FACTS` whatever is known
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gpdit_lightning.checkpoints.card import model_card
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import written_whole
from gpdit_lightning.model.attention.backends import BUILT_IN
from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.version import __version__

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FORMAT = "gpdit_lightning-model-1"

Kind = tuple[str, Callable[[Any], bool]]
TEXT: Kind = "a string", lambda value: isinstance(value, str)
TEXT_OR_NOTHING: Kind = "a string or null", lambda value: value is None or isinstance(value, str)
COUNT: Kind = "a whole number from 0", lambda value: type(value) is int and value >= 0
SIZE: Kind = "a whole number from 1", lambda value: type(value) is int and value >= 1
NUMBER: Kind = "a finite number", lambda value: type(value) in (int, float) and math.isfinite(value)
OBJECT: Kind = "an object", lambda value: isinstance(value, dict)

# What may be known of weights besides their architecture: of those from a checkpoint all of it, `origin` where there
# is one. A dict has at least these fields, a list at least one element, all of this kind.
FACTS: dict[str, Any] = {
    "weights": ("ema or raw", lambda value: value in ("ema", "raw")),
    "step": COUNT,  # optimizer steps trained
    "stage": TEXT,  # the class of the stage that trained them
    "origin": {"path": TEXT, "step": COUNT},  # the weights that the stage began with
    "schedule": {"name": TEXT, "shift": NUMBER},  # of the noise
    "codec": {  # Codec.spec(): mean and std whiten the latents
        "name": TEXT,
        "source": TEXT_OR_NOTHING,
        "latent_channels": SIZE,
        "spatial_factor": SIZE,
        "temporal_factor": SIZE,
        "mean": [NUMBER],
        "std": [NUMBER],
        "fingerprint": TEXT,
    },
    "geometry": {"stride": SIZE, "sizes": [[SIZE]], "frames": SIZE},  # of the training clips
    "classes": [TEXT],  # their names, by the numbers that `GPDiT.forward` takes as conditions
    "data": OBJECT,  # what the order of the training data depends on
    "lightning_version": TEXT,
}


@dataclass(frozen=True)
class Weights:
    """Weights and what is known of them, wherever they lay.

    Attributes:
        tensors: the state dict of a GPDiT; mapped from its file, so that only what is used is read.
        config: the architecture.
        facts: what else is known, by the names of `FACTS`.
        where: the file or folder, for messages.
    """

    tensors: dict[str, Tensor]
    config: GPDiTConfig
    facts: dict[str, Any]
    where: str

    @classmethod
    def checked(cls, tensors: dict[str, Tensor], config: Any, known: Mapping[str, Any], where: str) -> Self:
        """Weights out of a file that may hold anything.

        Args:
            tensors: named weights; `load_into` checks them.
            config: what ought to be a `GPDiTConfig.to_dict()`.
            known: among others, what ought to be `FACTS`.
            where: the file that says so.

        Raises:
            InputError: a field that is missing or of the wrong kind.
        """
        facts = {name: known[name] for name in FACTS if name in known}
        for name, value in {"config": config, **facts}.items():
            _check(value, FACTS.get(name, OBJECT), where, name)
        try:
            architecture = GPDiTConfig.preset(**config)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if architecture.attention_backend not in BUILT_IN:
            # An import path or a name of another process: a file of weights must not choose code to import.
            architecture = architecture.replaced(attention_backend="auto")
        names = facts.get("classes", ())
        if names and len(names) != architecture.classes:
            raise InputError(
                f"{where} names {len(names)} classes where its architecture has {architecture.classes}: its parts do "
                "not belong together, export the model again."
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
    return json.dumps(head | weights.facts, indent=2) + "\n"


def _dtype(weights: Weights) -> str:
    return str(next(iter(weights.tensors.values())).dtype).removeprefix("torch.")


def _described(tensor: Any) -> str:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return "something other than floating-point numbers"
    return f"shape {tuple(tensor.shape)}"


def _check(value: Any, kind: Any, where: str, name: str) -> None:
    """Raise InputError unless a value is of a kind (see `FACTS`)."""
    if isinstance(kind, dict):
        _check(value, OBJECT, where, name)
        for field, inner in kind.items():
            if field not in value:
                raise InputError(f"{where} lacks {name}.{field}: export the model again.")
            _check(value[field], inner, where, f"{name}.{field}")
    elif isinstance(kind, list):
        if not isinstance(value, list) or not value:
            raise InputError(f"{where} has {name} = {value!r} where a list belongs: export the model again.")
        for i, element in enumerate(value):
            _check(element, kind[0], where, f"{name}[{i}]")
    elif not kind[1](value):
        raise InputError(f"{where} has {name} = {value!r} where {kind[0]} belongs: export the model again.")
