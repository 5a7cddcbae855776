"""Exported models on disk: reading and writing of their folders.

An exported folder contains `model.safetensors`, `config.json` and the model card, `README.md`; and `codec.safetensors`
if the weights of the codec are a single file of the run, such as a linear codec that was fitted on its videos; and the
sample images of the card, `sample.png` and `sample.gif`, if there are any. Other files are never read, and none of
these can contain code. `config.json` is plain JSON:

    format, library_version, dtype   format of the folder, version of its writer, data type of the weights
    config                           architecture: `GPDiTConfig.to_dict()`
    weights, step, stage, ...        the recorded fields of `TrainingFacts`
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gpdit_lightning.checkpoints.card import CardDetails, is_unedited, model_card
from gpdit_lightning.checkpoints.facts import EXPORT_AGAIN
from gpdit_lightning.checkpoints.weights import Weights
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write, utf8_path
from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.retries import retried, transient_error
from gpdit_lightning.version import __version__

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
CODEC = "codec.safetensors"
STRIP, ANIMATION = IMAGES = "sample.png", "sample.gif"
FORMAT = "gpdit_lightning-model-1"


def is_exported(path: Path) -> bool:
    """Return whether a path is an exported folder, possibly incomplete."""
    return (path / CONFIG).is_file() or (path / WEIGHTS).is_file()


@retried
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
        damaged = InputError(f"{config_path} is not readable JSON ({error}): {cure}.")
        raise transient_error(error, config_path) or damaged from None
    file_format = content.get("format") if isinstance(content, dict) else None
    if file_format != FORMAT:
        raise InputError(f"{config_path} has format {file_format!r} and this version reads {FORMAT!r}: {cure}.")
    if not path.is_file():
        raise InputError(f"{path} does not exist, and weights in other files are not opened: {cure}.")
    try:
        with utf8_path(path) as readable:
            tensors = load_file(readable)
    except (OSError, SafetensorError) as error:
        damaged = InputError(f"{path} is not a complete safetensors file ({error}): {cure}.")
        raise transient_error(error, path) or damaged from None
    weights = Weights.checked(tensors, content.get("config"), content, str(config_path))
    return replace(weights, owner=str(path), folder=folder)


def write_exported(folder: Path, weights: Weights, details: CardDetails | None = None) -> None:
    """Write the files of an exported folder, each atomically; a card that was edited is kept.

    Args:
        folder: the folder.
        weights: the weights with the record of their training.
        details: sample images, which are in the folder, and scores for the card.

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
    if not has_edited_card(folder):
        parameters = sum(tensor.numel() for tensor in weights.tensors.values())
        with atomic_write(folder / CARD) as path:
            card = model_card(weights.config, weights.facts, parameters, _dtype(weights), details)
            path.write_text(card, encoding="utf-8")


def has_edited_card(folder: Path) -> bool:
    """Return whether a folder contains a card that was edited, or written by an earlier version or another program."""
    card = folder / CARD
    return card.exists() and not is_unedited(card.read_text(encoding="utf-8", errors="replace"))


def contains(folder: Path, weights: Weights) -> bool:
    """Return whether an exported folder contains exactly these weights with the same record of their training."""
    saved = read_exported(folder)
    return (saved.config, saved.facts) == (weights.config, weights.facts) and all(
        value.dtype == weights.tensors[name].dtype and torch.equal(value, weights.tensors[name].cpu())
        for name, value in saved.tensors.items()
    )


def copy_companions(source: Path, folder: Path, *, card: bool) -> None:
    """Copy the weights of the codec from one exported folder to another.

    Args:
        source: an exported folder.
        folder: the other one.
        card: whether to copy the card with its images too, unless the other folder has an edited one.
    """
    names = [CODEC, *(IMAGES if card else ()), *([CARD] if card and not has_edited_card(folder) else [])]
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def config_json(weights: Weights) -> str:
    """Return the text of `config.json`, without settings of execution such as `compile`."""
    config = GPDiTConfig.preset(weights.config.size, **weights.config.architecture())
    head = {"format": FORMAT, "library_version": __version__, "dtype": _dtype(weights), "config": config.to_dict()}
    return json.dumps(head | weights.facts.to_dict(), indent=2) + "\n"


def _dtype(weights: Weights) -> str:
    return str(next(iter(weights.tensors.values())).dtype).removeprefix("torch.")
