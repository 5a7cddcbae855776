"""Opening what a checkpoint path means: a checkpoint, a run folder or an exported folder; nothing is unpickled."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gpdit_lightning.checkpoints.files import digest_of, fault_of, last_checkpoint, mark_path
from gpdit_lightning.checkpoints.hub import HubGPDiT
from gpdit_lightning.checkpoints.io import TRAINING, is_checkpoint, read_folder_of_checkpoint
from gpdit_lightning.checkpoints.weights import WEIGHTS, Weights, is_folder_of_weights, read_folder
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import sha256_of
from gpdit_lightning.model import GPDiTConfig


def identity_of(path: str | Path) -> str:
    """A sha256 that tells weights from others: of a checkpoint, or of an exported folder."""
    path = Path(path)
    return sha256_of(path / WEIGHTS) if is_folder_of_weights(path) else digest_of(path.resolve())


def whole_checkpoint(path: str | Path, verify: bool = False) -> Path:
    """The checkpoint that a path means: itself, or the last whole one of a run folder.

    Args:
        path: a checkpoint (its folder), wherever it was copied to, or the run folder that holds some.
        verify: whether to hash its files, where a mark says what they should be, instead of comparing sizes only.

    Raises:
        InputError: there is none, or it is not what its mark says.
    """
    path = Path(path)
    if path.name == TRAINING and path.is_file():
        path = path.parent
    if not is_checkpoint(path):
        last = last_checkpoint(path, verify) if path.is_dir() else None
        if last is None:
            raise InputError(f"there is no checkpoint at {path}: give a step-N.ckpt or a run folder that holds some.")
        return last
    own = path.resolve()  # `last.ckpt` is a link, and marks belong to what it names
    fault = fault_of(own, verify) if mark_path(own).exists() else ""
    if fault:
        raise InputError(f"{path} is not a whole checkpoint ({fault}): use another of the run's.")
    return path


def place_of_weights(path: str | Path) -> Path:
    """The exported folder at a path, or else the checkpoint that it means; raises as :func:`whole_checkpoint`."""
    path = Path(path)
    return path if is_folder_of_weights(path) else whole_checkpoint(path)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a training checkpoint, memory-mapped; objects other than tensors and plain values are refused.

    Args:
        path: a checkpoint or a run folder, as :func:`whole_checkpoint` takes it.

    Raises:
        InputError: a file is missing, cut off, not what the mark says, or not of a checkpoint of this library.
    """
    return read_folder_of_checkpoint(whole_checkpoint(path))


def check_architecture(saved: dict[str, Any], config: GPDiTConfig, where: str | Path) -> None:
    """Raise InputError, naming the first field that differs, unless saved weights are of this architecture."""
    ours, theirs = config.architecture(), GPDiTConfig.preset(**saved).architecture()
    for name, value in ours.items():
        if theirs[name] != value:
            raise InputError(
                f"{where} holds a model with {name} = {theirs[name]}, but this one has {value}: use the recipe it was "
                "trained with, or another checkpoint."
            )


def check_codec(saved: dict[str, Any], ours: dict[str, Any], where: str | Path) -> None:
    """Raise InputError unless weights were trained on latents of the codec that the data has."""
    for name in ("name", "fingerprint"):
        if saved[name] != ours[name]:
            raise InputError(
                f"{where} was trained on latents of another codec than the data's (codec {name} is {saved[name]} there "
                f"and {ours[name]} here): prepare the data with that codec, or begin from other weights."
            )


def check_classes(saved: Sequence[str], ours: Sequence[str], where: str | Path) -> None:
    """Raise InputError, naming the first that differs, unless weights were trained on the classes that the data has."""
    for number, (theirs, name) in enumerate(zip(saved, ours, strict=True)):
        if theirs != name:
            raise InputError(
                f"{where} was trained with {theirs!r} as class {number}, but the data has {name!r}: give manifests "
                "with the same labels in the same order, or begin from other weights."
            )


def backbone_weights(checkpoint: dict[str, Any], kind: Literal["ema", "raw"] = "ema") -> dict[str, Tensor]:
    """The backbone's state dict: averaged weights (`ema`; where there is no average, trained ones) or trained ones."""
    weights = checkpoint["state_dict"]
    if kind == "ema" and "ema" in checkpoint:
        weights = weights | checkpoint["ema"]["weights"]
    prefix = "backbone."
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def facts_of(checkpoint: dict[str, Any], kind: Literal["ema", "raw"]) -> dict[str, Any]:
    """What a checkpoint knows of its weights, by the names of `FACTS` (weights.py) as in an exported folder."""
    stage, data = checkpoint["gpdit"], checkpoint["LatentDataModule"]
    facts = {
        "weights": kind if "ema" in checkpoint else "raw",
        "step": checkpoint.get("global_step"),
        "stage": stage.get("stage"),
        "origin": stage.get("origin"),
        "schedule": stage.get("schedule"),
        "codec": data.get("codec"),
        "geometry": data.get("geometry"),
        "classes": data.get("classes"),
        "data": data.get("order"),
        "lightning_version": checkpoint.get("pytorch-lightning_version"),
    }
    return {name: value for name, value in facts.items() if value is not None}


def open_weights(path: str | Path, kind: Literal["ema", "raw"] = "ema") -> Weights:
    """Open weights where they lie, whatever kind of file or folder that is; nothing is copied, no object unpickled.

    Args:
        path: a checkpoint, a run folder (for its last checkpoint), or a folder that `export` or `save_pretrained` made.
        kind: averaged weights (`ema`; where there is no average, trained ones) or trained ones.

    Raises:
        InputError: it cannot be read, or holds averaged weights alone where trained ones are asked for.
    """
    path = Path(path)
    if not is_folder_of_weights(path):
        checkpoint = read_checkpoint(path)
        architecture, facts = checkpoint["gpdit"].get("backbone"), facts_of(checkpoint, kind)
        return Weights.checked(backbone_weights(checkpoint, kind), architecture, facts, str(path))
    weights = read_folder(path)
    if kind == "raw" and weights.facts.get("weights") == "ema":
        raise InputError(f"{path} holds averaged weights only: take those, or export again with --weights raw.")
    return weights


@dataclass(frozen=True)
class TrainedModel:
    """A model ready to generate, with what its checkpoint knows of its data.

    Attributes:
        backbone: in evaluation mode, its parameters on a CPU mapped from the file.
        schedule: name and shift of the noise schedule.
        codec: the spec of the codec whose latents it was trained on.
        geometry: `stride` between source frames, `sizes` in pixels, `frames` in latent frames of its training clips.
        step: optimizer steps trained.
        classes: the names of the classes that it takes as conditions, by their numbers; empty if it takes none.
    """

    backbone: HubGPDiT
    schedule: dict[str, Any]
    codec: dict[str, Any]
    geometry: dict[str, Any]
    step: int
    classes: tuple[str, ...] = ()


def load_trained_model(
    path: str | Path, device: torch.device | str = "cpu", weights: Literal["ema", "raw"] = "ema"
) -> TrainedModel:
    """Open weights for generation.

    Raises:
        InputError: as :func:`open_weights`, or they do not know what they were trained on.
    """
    opened = open_weights(path, weights)
    needed = ("schedule", "codec", "geometry", "step")
    unknown = [name for name in needed if name not in opened.facts]
    if unknown:
        raise InputError(
            f"{path} does not say with which {', '.join(unknown)} its weights were trained, so nothing can be "
            "generated: export them from a checkpoint."
        )
    backbone = HubGPDiT.from_weights(opened).to(device)
    classes = tuple(opened.facts.get("classes", ()))
    return TrainedModel(backbone, classes=classes, **{name: opened.facts[name] for name in needed})
