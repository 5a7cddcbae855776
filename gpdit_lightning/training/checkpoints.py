"""Checkpoints of a run: when they are saved, and how they are read without unpickling objects."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.files import partial_path, sha256_of
from gpdit_lightning.model import GPDiT, GPDiTConfig
from gpdit_lightning.model.weights import WEIGHTS, Weights, is_folder_of_weights, read_folder
from gpdit_lightning.training.checkpoint_files import (
    checkpoint_path,
    digest_of,
    discredit_torn_ones,
    fault_of,
    last_checkpoint,
    mark_path,
    prune,
    publish_checkpoint,
    remove,
    remove_leftovers,
)
from gpdit_lightning.training.checkpoint_io import (
    TRAINING,
    FolderCheckpointIO,
    is_checkpoint,
    read_folder_of_checkpoint,
)
from gpdit_lightning.training.stopping import Stopped, StopSignals


class RunCheckpoint(Checkpoint):
    """Saves checkpoints in the run folder, and leaves the training at SIGTERM and SIGINT when it has saved.

    Only ever after a whole optimizer step and, if a validation is due then, after that too: who goes on from a
    checkpoint has everything up to its step behind them.

    Args:
        every_steps: optimizer steps between checkpoints; the end of the training and milestones are saved too.
        every_minutes: minutes after which one is saved in between; 0 saves by steps alone.
        keep_last: how many checkpoints are kept.
        keep_every_steps: milestones: a checkpoint every so many steps is kept for good; 0 keeps none.
    """

    def __init__(
        self, every_steps: int = 1000, every_minutes: float = 0.0, keep_last: int = 2, keep_every_steps: int = 0
    ) -> None:
        for name, value, least in (
            ("every_steps", every_steps, 1),
            ("every_minutes", every_minutes, 0),
            ("keep_last", keep_last, 1),
            ("keep_every_steps", keep_every_steps, 0),
        ):
            if value < least:
                raise InputError(f"checkpoint.{name} is {value}: take at least {least}.")
        self.every_steps, self.every_minutes = every_steps, every_minutes
        self.keep_last, self.keep_every_steps = keep_last, keep_every_steps
        self._signals = StopSignals(announce=False)
        self._finished_step = 0
        self._saved_at = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write directly, unless the recipe names another way; and keep Lightning from handling signals."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = FolderCheckpointIO()
        # Its SIGTERM handler waits for the other ranks, wherever this one stands.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear away what a killed run left, and see that there is a place to save.

        Raises:
            InputError: the folder cannot be written.
        """
        folder = checkpoint_path(Path(trainer.default_root_dir), 0).parent
        failure = ""
        if trainer.is_global_zero:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                remove_leftovers(folder)
                probe = partial_path(folder / "probe")
                probe.write_text("can be written")
                probe.unlink()
            except OSError as error:
                failure = f"no checkpoint can be saved in {folder} ({error.strerror}): choose another --run_dir."
        _fail_together(trainer, failure)
        self._signals = StopSignals(announce=trainer.is_global_zero)
        self._signals.install()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run stands at a step that is saved already."""
        self._finished_step, self._saved_at = trainer.global_step, time.monotonic()
        if trainer.is_global_zero:
            discredit_torn_ones(checkpoint_path(Path(trainer.default_root_dir), 0).parent, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """The end of a step, if this was its last micro-batch and no validation follows."""
        if trainer.global_step != self._finished_step and not _validation_follows(trainer):
            self._finish_step(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The end of a step, if the validation did not come in the middle of one."""
        if not trainer.sanity_checking and trainer.global_step != self._finished_step:
            self._finish_step(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Signals mean what they meant before."""
        self._signals.restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As at a regular end."""
        self._signals.restore()

    def _finish_step(self, trainer: Trainer) -> None:
        step = self._finished_step = trainer.global_step
        signum, time_is_up = self._agreed(trainer)
        at_the_end = step == trainer.max_steps or trainer.should_stop
        is_milestone = self.keep_every_steps > 0 and step % self.keep_every_steps == 0
        if signum or time_is_up or at_the_end or is_milestone or step % self.every_steps == 0:
            self._save(trainer, step)
        if signum:
            raise Stopped(step, signum, trainer.is_global_zero)

    def _agreed(self, trainer: Trainer) -> tuple[int, bool]:
        """A stop signal that any rank received (or 0), and whether it is time to save by the first rank's clock."""
        minutes = (time.monotonic() - self._saved_at) / 60
        found = [self._signals.received, int(trainer.is_global_zero and 0 < self.every_minutes <= minutes)]
        if trainer.world_size > 1:
            over_ranks = torch.tensor(found, device=trainer.strategy.root_device)
            found = trainer.strategy.reduce(over_ranks, reduce_op="max").tolist()
        return found[0], bool(found[1])

    def _save(self, trainer: Trainer, step: int) -> None:
        run_dir = Path(trainer.default_root_dir)
        path = checkpoint_path(run_dir, step)
        failure = ""
        try:
            try:
                trainer.save_checkpoint(partial_path(path), weights_only=False)
            except OSError:
                trainer.strategy.barrier()  # the one that saving ends with, where the other ranks wait
                raise
            if trainer.is_global_zero:
                for logger in trainer.loggers:
                    logger.save()  # the curves up to this step: a killed run draws only later ones again
                publish_checkpoint(path)
                prune(path, self.keep_last, self.keep_every_steps)
        except OSError as error:
            with suppress(OSError):
                remove(partial_path(path))
            before = last_checkpoint(run_dir)
            kept = f"{before.name} is whole and the same command goes on from it" if before else "there is none before"
            failure = (
                f"the checkpoint of step {step} could not be written to {path} ({error.strerror or error}): see that "
                f"there is room and permission to write; {kept}."
            )
        _fail_together(trainer, failure)
        self._saved_at = time.monotonic()


def _validation_follows(trainer: Trainer) -> bool:
    """Whether Lightning will validate right after this micro-batch: its own decision, asked for early."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return loop._should_check_val_fx(fetcher) and not loop.val_loop.skip


def _fail_together(trainer: Trainer, failure: str) -> None:
    """End all ranks if the first one failed, so that none waits for it.

    Raises:
        InputError: on the first rank.
        SystemExit: on the others, with status 0, as Lightning's launcher kills the first if another ends otherwise.
    """
    failure = trainer.strategy.broadcast(failure)
    if failure:
        raise InputError(failure) if trainer.is_global_zero else SystemExit(0)


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
    """What a checkpoint knows of its weights, as an exported folder will know it (`FACTS` in model/weights.py)."""
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

    backbone: GPDiT
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
    backbone = GPDiT.from_weights(opened).to(device)
    classes = tuple(opened.facts.get("classes", ()))
    return TrainedModel(backbone, classes=classes, **{name: opened.facts[name] for name in needed})
