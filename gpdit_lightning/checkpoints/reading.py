"""Opening a model from any path that holds one: a checkpoint, a run folder or an exported folder."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from gpdit_lightning.checkpoints.facts import WeightsKind
from gpdit_lightning.checkpoints.files import checkpoint_sha256, find_checkpoint, open_checkpoint
from gpdit_lightning.checkpoints.hub import HubGPDiT
from gpdit_lightning.checkpoints.weights import CONFIG, WEIGHTS, Weights, read_exported
from gpdit_lightning.diffusion import NoiseSchedule
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import sha256_of
from gpdit_lightning.specs import ClipGeometry, CodecSpec


def is_exported(path: Path) -> bool:
    """Whether a path is an exported folder, perhaps an incomplete one."""
    return (path / CONFIG).is_file() or (path / WEIGHTS).is_file()


def find_weights(path: str | Path) -> Path:
    """The exported folder at a path, or the checkpoint that it refers to; raises as :func:`find_checkpoint`."""
    return Path(path) if is_exported(Path(path)) else find_checkpoint(path)


def sha256_of_weights(path: Path) -> str:
    """A sha256 that identifies the weights of a checkpoint or an exported folder, as `find_weights` returns them."""
    return sha256_of(path / WEIGHTS) if is_exported(path) else checkpoint_sha256(path)


def open_weights(path: str | Path, kind: WeightsKind = "ema", verify: bool = False) -> Weights:
    """Open weights; nothing is copied, and no object is unpickled.

    Args:
        path: a checkpoint, a run folder (its last checkpoint), or a folder that `export` or `save_pretrained` made.
        kind: averaged weights (`ema`; trained ones where there is no average) or trained ones (`raw`).
        verify: whether to hash the files of a checkpoint, instead of comparing only their sizes with its mark.

    Raises:
        InputError: it cannot be read, or has only averaged weights where trained ones are requested.
    """
    if is_exported(Path(path)):
        weights = read_exported(Path(path))
        if kind == "raw" and weights.facts.weights == "ema":
            raise InputError(f"{path} has averaged weights only: use those, or export again with --weights raw.")
        return weights
    checkpoint = open_checkpoint(path, verify)
    return Weights.checked(
        checkpoint.backbone_weights(kind), checkpoint.config, checkpoint.facts(kind), checkpoint.path
    )


@dataclass(frozen=True)
class TrainedModel:
    """A model ready to generate, with what its checkpoint records of its training.

    Attributes:
        backbone: in evaluation mode; on a CPU its parameters are mapped from the file.
        path: the checkpoint or exported folder that it was read from.
        weights: which weights these are; a run without averaged ones has trained ones only.
        schedule: from noise levels to angles.
        codec: of the latents that it was trained on.
        geometry: of its training clips.
        step: optimizer steps trained.
        classes: the names of the classes that it takes as conditions, by their numbers; empty if it takes none.
    """

    backbone: HubGPDiT
    path: Path
    weights: WeightsKind
    schedule: NoiseSchedule
    codec: CodecSpec
    geometry: ClipGeometry
    step: int
    classes: tuple[str, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """Identifies the checkpoint or exported folder."""
        return sha256_of_weights(self.path)


def load_trained_model(
    path: str | Path, device: torch.device | str = "cpu", weights: WeightsKind = "ema"
) -> TrainedModel:
    """Open weights for generation.

    Args:
        path: as of :func:`open_weights`.
        device: for the model.
        weights: averaged (`ema`) or trained (`raw`).

    Raises:
        InputError: as :func:`open_weights`, or what they were trained on is not recorded.
    """
    found = open_weights(path, weights)
    facts = found.facts
    if facts.schedule is None or facts.codec is None or facts.geometry is None or facts.step is None:
        unknown = [name for name in ("schedule", "codec", "geometry", "step") if getattr(facts, name) is None]
        raise InputError(
            f"{path} does not record with which {', '.join(unknown)} its weights were trained, so it cannot generate: "
            "export it from a checkpoint."
        )
    assert found.path is not None
    return TrainedModel(
        backbone=HubGPDiT.from_weights(found).to(device),
        path=found.path,
        weights=facts.weights or weights,
        schedule=facts.schedule,
        codec=facts.codec,
        geometry=facts.geometry,
        step=facts.step,
        classes=facts.classes,
    )
