"""Opening what a checkpoint path means: a checkpoint, a run folder or an exported folder; nothing is unpickled."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpdit_lightning.checkpoints.facts import WeightsKind
from gpdit_lightning.checkpoints.files import digest_of, fault_of, last_checkpoint, mark_path
from gpdit_lightning.checkpoints.hub import HubGPDiT
from gpdit_lightning.checkpoints.io import TRAINING, is_checkpoint, read_folder_of_checkpoint
from gpdit_lightning.checkpoints.weights import WEIGHTS, Weights, is_folder_of_weights, read_folder
from gpdit_lightning.diffusion import NoiseSchedule
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import sha256_of
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.specs import ClipGeometry, CodecSpec


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


def check_classes(saved: Sequence[str], ours: Sequence[str], where: str | Path) -> None:
    """Raise InputError, naming the first that differs, unless weights were trained on the classes that the data has."""
    for number, (theirs, name) in enumerate(zip(saved, ours, strict=True)):
        if theirs != name:
            raise InputError(
                f"{where} was trained with {theirs!r} as class {number}, but the data has {name!r}: give manifests "
                "with the same labels in the same order, or begin from other weights."
            )


def backbone_weights(checkpoint: dict[str, Any], kind: WeightsKind = "ema") -> dict[str, Tensor]:
    """The backbone's state dict: averaged weights (`ema`; where there is no average, trained ones) or trained ones."""
    weights = checkpoint["state_dict"]
    if kind == "ema" and "ema" in checkpoint:
        weights = weights | checkpoint["ema"]["weights"]
    prefix = "backbone."
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def facts_of(checkpoint: dict[str, Any], kind: WeightsKind) -> dict[str, Any]:
    """What a checkpoint knows of its weights, by the names of `TrainingFacts` as in an exported folder."""
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


def open_weights(path: str | Path, kind: WeightsKind = "ema") -> Weights:
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
    if kind == "raw" and weights.facts.weights == "ema":
        raise InputError(f"{path} holds averaged weights only: take those, or export again with --weights raw.")
    return weights


@dataclass(frozen=True)
class TrainedModel:
    """A model ready to generate, with what its checkpoint records of its training.

    Attributes:
        backbone: in evaluation mode, its parameters on a CPU mapped from the file.
        weights: which of the checkpoint's weights these are; a run without averaged ones has trained ones alone.
        schedule: from noise levels to angles.
        codec: of the latents that it was trained on.
        geometry: of its training clips.
        step: optimizer steps trained.
        classes: the names of the classes that it takes as conditions, by their numbers; empty if it takes none.
    """

    backbone: HubGPDiT
    weights: WeightsKind
    schedule: NoiseSchedule
    codec: CodecSpec
    geometry: ClipGeometry
    step: int
    classes: tuple[str, ...] = ()


def load_trained_model(
    path: str | Path, device: torch.device | str = "cpu", weights: WeightsKind = "ema"
) -> TrainedModel:
    """Open weights for generation.

    Raises:
        InputError: as :func:`open_weights`, or what they were trained on is not recorded.
    """
    opened = open_weights(path, weights)
    facts = opened.facts
    if facts.schedule is None or facts.codec is None or facts.geometry is None or facts.step is None:
        unknown = [name for name in ("schedule", "codec", "geometry", "step") if getattr(facts, name) is None]
        raise InputError(
            f"{path} does not say with which {', '.join(unknown)} its weights were trained, so nothing can be "
            "generated: export them from a checkpoint."
        )
    backbone = HubGPDiT.from_weights(opened).to(device)
    kind = facts.weights or weights
    return TrainedModel(backbone, kind, facts.schedule, facts.codec, facts.geometry, facts.step, facts.classes)
