"""Checkpoints of a run: written whole or not at all, found again by themselves, read without unpickling objects."""

import os
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.files import partial_path, publish
from gpdit_lightning.model import GPDiT, GPDiTConfig

LAST = "last.ckpt"


class RunCheckpoint(Checkpoint):
    """Saves `checkpoints/last.ckpt` in the run folder, only ever after a whole optimizer step.

    A checkpoint gets its name when it is complete, so a process killed while saving leaves the one before.

    Args:
        every_steps: optimizer steps between checkpoints; reaching trainer.max_steps saves too.
        keep_every_steps: additionally keep `step-N.ckpt` every so many steps (a multiple of every_steps); 0 keeps none.
    """

    def __init__(self, every_steps: int = 1000, keep_every_steps: int = 0) -> None:
        if every_steps < 1 or keep_every_steps % every_steps:
            raise InputError(
                f"checkpoint.every_steps is {every_steps} and keep_every_steps {keep_every_steps}: take at least 1, "
                "and keep at a multiple of it."
            )
        self.every_steps, self.keep_every_steps = every_steps, keep_every_steps
        self._saved_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run stands at a step that is saved already."""
        self._saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save when an optimizer step completes an interval."""
        step = trainer.global_step
        if step != self._saved_step and (step % self.every_steps == 0 or step == trainer.max_steps):
            self._save(trainer, step)

    def _save(self, trainer: Trainer, step: int) -> None:
        directory = Path(trainer.default_root_dir) / "checkpoints"
        directory.mkdir(parents=True, exist_ok=True)
        last = directory / LAST
        trainer.save_checkpoint(partial_path(last), weights_only=False)
        if trainer.is_global_zero:
            publish(last)
            if self.keep_every_steps and step % self.keep_every_steps == 0:
                kept = directory / f"step-{step}.ckpt"
                kept.unlink(missing_ok=True)
                os.link(last, kept)
        trainer.strategy.barrier()
        self._saved_step = step


def last_checkpoint(run_dir: Path) -> Path | None:
    """Where the run in a folder left off, if it did."""
    path = run_dir / "checkpoints" / LAST
    return path if path.exists() else None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a training checkpoint, memory-mapped; objects other than tensors and plain values are refused.

    Raises:
        InputError: the file is missing, cut off, or not a checkpoint of this library.
    """
    path = Path(path)
    if path.is_dir():
        path = last_checkpoint(path) or path
    if not path.is_file():
        raise InputError(f"there is no checkpoint at {path}: give a .ckpt file or a run folder that holds one.")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is not a whole checkpoint (cut off or of another kind): use another of the run's.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} cannot be read as a checkpoint ({reason}): use another of the run's.") from None
    if not isinstance(checkpoint, dict) or not {"gpdit", "LatentDataModule"} <= checkpoint.keys():
        raise InputError(f"{path} is not a checkpoint of gpdit_lightning: give one that `fit` wrote.")
    return checkpoint


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


def backbone_weights(checkpoint: dict[str, Any], kind: Literal["ema", "raw"] = "ema") -> dict[str, Tensor]:
    """The backbone's state dict: averaged weights (`ema`; where there is no average, trained ones) or trained ones."""
    weights = checkpoint["state_dict"]
    if kind == "ema" and "ema" in checkpoint:
        weights = weights | checkpoint["ema"]["weights"]
    prefix = "backbone."
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class TrainedModel:
    """A model ready to generate, with what its checkpoint knows of its data.

    Attributes:
        backbone: in evaluation mode.
        schedule: name and shift of the noise schedule.
        codec: the spec of the codec whose latents it was trained on.
        geometry: `stride` between source frames, `sizes` in pixels, `frames` in latent frames of its training clips.
        step: optimizer steps trained.
    """

    backbone: GPDiT
    schedule: dict[str, Any]
    codec: dict[str, Any]
    geometry: dict[str, Any]
    step: int


def load_trained_model(
    path: str | Path, device: torch.device | str = "cpu", weights: Literal["ema", "raw"] = "ema"
) -> TrainedModel:
    """Open a checkpoint for generation.

    Raises:
        InputError: as :func:`read_checkpoint`.
    """
    checkpoint = read_checkpoint(path)
    config = GPDiTConfig.preset(**checkpoint["gpdit"]["backbone"])
    with torch.device("meta"):
        backbone = GPDiT(config)
    backbone.load_state_dict(backbone_weights(checkpoint, weights), assign=True)
    data = checkpoint["LatentDataModule"]
    return TrainedModel(
        backbone=backbone.to(device).eval(),
        schedule=checkpoint["gpdit"]["schedule"],
        codec=data["codec"],
        geometry=data["geometry"],
        step=checkpoint["global_step"],
    )
