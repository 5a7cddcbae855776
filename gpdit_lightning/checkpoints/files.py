"""Training checkpoints on disk: finding, reading, publishing and removing them.

A run folder contains

    checkpoints/step-N.ckpt/training.ckpt      written by torch.save: weights, optimizer, states of callbacks and data
    checkpoints/step-N.ckpt/ema.safetensors    averaged weights, if there are any
    checkpoints/step-N.ckpt/part-00001-of-00004.safetensors     of a training on 4 ranks under ZeRO or FSDP2: a rank's
                                               slices of weights, average and optimizer (parts.py)
    checkpoints/step-N.ckpt.complete           completion mark: the size and sha256 of each file
    checkpoints/last.ckpt                      link to the newest checkpoint

marks.py describes the mark. A command verifies the files that it reads by their hashes in the mark; each machine
computes them once, and remembers them as long as the files do not change (hashes.py). Newer checkpoints are those of
later steps, whatever the times of files are.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpdit_lightning import path_kinds
from gpdit_lightning.checkpoints.content import CURE, read_content
from gpdit_lightning.checkpoints.facts import Origin, WeightsKind
from gpdit_lightning.checkpoints.marks import AVERAGE as AVERAGE  # the names of all files of a checkpoint are here
from gpdit_lightning.checkpoints.marks import (
    TRAINING,
    FileMark,
    damage_of,
    mark_entries,
    mark_path,
    marks_of_files,
    step_of,
    write_mark,
)
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import flush, partial_path, publish, remove
from gpdit_lightning.tensor_files import TensorOnDisk

CHECKPOINTS, LAST = path_kinds.CHECKPOINTS, "last.ckpt"  # the folder in a run folder, and the link in it

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A training checkpoint.

    Attributes:
        path: folder of the checkpoint.
        content: content of `training.ckpt`, with the averaged weights in `content["ema"]["weights"]`; the tensors of
            weights, average and optimizer state are `TensorOnDisk`.
    """

    path: Path
    content: dict[str, Any]

    @property
    def step(self) -> int:
        """The number of optimizer steps trained."""
        return int(self.content["global_step"])

    @property
    def origin(self) -> Origin | None:
        """The weights from which training started; None if they were random."""
        saved = self.content["gpdit"].get("origin")
        return Origin.from_dict(saved, str(self.path / TRAINING), CURE) if saved else None

    @property
    def config(self) -> Any:
        """The `GPDiTConfig.to_dict()` of the backbone, not validated."""
        return self.content["gpdit"].get("backbone")

    def stored_weights(self, kind: WeightsKind) -> dict[str, TensorOnDisk]:
        """Return the backbone's state dict: averaged (`ema`; trained if there is no average) or trained (`raw`).

        Raises:
            InputError: the checkpoint is of a classifier, or a value is not a tensor.
        """
        if "classes" in self.content["gpdit"]:
            raise InputError(
                f"{self.path} is a classifier, which has no output layer for denoising: give the checkpoint of the "
                "generative training, and evaluate this one by `validate`."
            )
        weights = self.content["state_dict"]
        if kind == "ema" and "ema" in self.content:
            weights = weights | self.content["ema"]["weights"]
        prefix = "backbone."
        stored = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        for name, value in stored.items():
            if not isinstance(value, TensorOnDisk):
                raise InputError(f"{self.path / TRAINING} has something other than a tensor as {name}: {CURE}.")
        return stored

    def facts(self, kind: WeightsKind) -> dict[str, Any]:
        """Return the record of the training, not validated, as input of `TrainingFacts.from_dict`."""
        stage, data = self.content["gpdit"], self.content["LatentDataModule"]
        weights = kind if "ema" in self.content else "raw"
        is_scored = weights == "ema" or "ema" not in self.content  # scores are of averaged weights if there are any
        facts = {
            "weights": weights,
            "step": self.content.get("global_step"),
            "stage": stage.get("stage"),
            "origin": stage.get("origin"),
            "schedule": stage.get("schedule"),
            "codec": data.get("codec"),
            "geometry": data.get("geometry"),
            "classes": data.get("classes"),
            "data": data.get("order"),
            "validation": self.content.get("validation"),
            "scores": self.content.get("scores") if is_scored else None,
            "run": self.content.get("run"),
            "lightning_version": self.content.get("pytorch-lightning_version"),
        }
        return {name: value for name, value in facts.items() if value is not None}


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open the checkpoint that a path refers to, as :func:`find_checkpoint`, and verify it; tensors are not read.

    Raises:
        InputError: as :func:`find_checkpoint`, or the file cannot be read or is not a checkpoint of this library.
    """
    folder = find_checkpoint(path, verify=True)
    checkpoint = Checkpoint(folder, read_content(folder, lazily=True))
    if not mark_path(folder).exists():
        log.info("%s has no completion mark, so its files could not be verified.", folder)
    return checkpoint


def find_checkpoint(path: str | Path, verify: bool = False) -> Path:
    """Return the folder of the checkpoint that a path refers to: itself, or the last complete one of a run folder.

    Args:
        path: a checkpoint, possibly copied out of its run folder, its `training.ckpt`, or a run folder.
        verify: whether to compare the hashes of its files with its mark, and not only their sizes.

    Raises:
        InputError: there is no checkpoint, or its files differ from its mark.
    """
    path = Path(path)
    if path.name == TRAINING and path.is_file():
        path = path.parent
    if not (path / TRAINING).is_file():
        last = last_checkpoint(path, verify) if path.is_dir() else None
        if last is None:
            cure = "give a step-N.ckpt, a run folder of `fit` that has one, or an exported model"
            raise InputError(
                f"there is no checkpoint at {path}, {path_kinds.reason_and_cure(path, 'checkpoint', cure)}."
            )
        return last
    if path.is_symlink():  # such as `last.ckpt`: the mark is beside the target of the link
        path = path.parent / path.readlink()
    damage = damage_of(path, verify) if mark_path(path).exists() else ""
    if damage:
        raise InputError(f"{path} is not a complete checkpoint ({damage}): {CURE}.")
    return path


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return run_dir / CHECKPOINTS / f"step-{step}.ckpt"


def publish_checkpoint(path: Path, files: Mapping[str, FileMark] | None = None) -> None:
    """Publish the checkpoint at `partial_path(path)` as the last one of its run.

    If the process is killed at any moment, `last_checkpoint` still finds a complete checkpoint.

    Args:
        path: the checkpoint.
        files: sizes and hashes of its files by their names, if known; else they are read.
    """
    entries = mark_entries(path, files or marks_of_files(partial_path(path)))
    remove_checkpoint(path)  # it exists if the run resumed from an earlier step
    publish(path)
    write_mark(path, entries)
    link = path.with_name(LAST)
    partial_path(link).unlink(missing_ok=True)
    partial_path(link).symlink_to(path.name)
    if link.is_dir() and not link.is_symlink():  # of a run that was copied with links replaced by what they refer to
        remove(link)
    partial_path(link).replace(link)
    flush(path.parent)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint if it exists; after a kill, `remove_leftovers` removes the rest."""
    discarded = partial_path(path.with_name(f"{path.name}.discarded"))
    if path.exists():
        remove(discarded)
        path.replace(discarded)
    mark_path(path).unlink(missing_ok=True)
    remove(discarded)


def prune(newest: Path, keep_last: int, keep_every_steps: int) -> None:
    """Remove old checkpoints of a run.

    If a run resumed from an earlier step, checkpoints of later steps stay until the run passes them. Checkpoints
    without a mark are neither counted nor removed.

    Args:
        newest: the checkpoint that was published last.
        keep_last: number of checkpoints to keep, including the newest.
        keep_every_steps: checkpoints whose step is a multiple of this are kept too; 0 for none.
    """
    marked = [path for path in _by_step(newest.parent) if mark_path(path).exists()]
    earlier = [path for path in marked if _step(path) < _step(newest)]
    for path in earlier[keep_last - 1 :]:
        if keep_every_steps == 0 or _step(path) % keep_every_steps:
            remove_checkpoint(path)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run has left in a folder; no process may be writing to it.

    This is everything under a temporary name, and of checkpoints marks without a folder, and folders without a mark
    and without weights. A checkpoint without a mark is kept, since a user may have copied it there.
    """
    marks = [mark.with_suffix("") for mark in folder.glob("step-*.ckpt.complete")]
    for path in (
        *folder.glob("*.partial"),
        *(mark_path(path) for path in marks if not os.path.lexists(path)),
        *(path for path in _by_step(folder) if _is_emptied(path)),
    ):
        log.info("%s is incomplete and is removed.", path)
        remove(path)


def _is_emptied(path: Path) -> bool:
    """Return whether a checkpoint is a folder without a mark and without weights."""
    return path.is_dir() and not path.is_symlink() and not mark_path(path).exists() and not (path / TRAINING).exists()


def damaged_checkpoints(folder: Path, after: int) -> Iterator[tuple[Path, str]]:
    """Yield the damaged checkpoints of steps above `after`, newest first, each with its damage in words."""
    for path in _by_step(folder):
        if _step(path) > after and (damage := damage_of(path, verify=True)):
            yield path, damage


def unmark_damaged(folder: Path, after: int) -> None:
    """Rename the marks of damaged checkpoints of steps above `after`, so that pruning does not count them."""
    for path, _ in damaged_checkpoints(folder, after):
        if mark_path(path).exists():
            mark_path(path).replace(mark_path(path).with_suffix(".torn"))


def last_checkpoint(run_dir: Path, verify: bool = False) -> Path | None:
    """Return the checkpoint to resume from: the target of `last.ckpt` or, if that is damaged, the newest complete one.

    Args:
        run_dir: the run folder.
        verify: whether to compare the hashes of files, and not only their sizes.

    Returns:
        The path of the checkpoint, not of the link; None if there is no checkpoint yet.

    Raises:
        InputError: there are checkpoints, but none is complete.
    """
    folder = run_dir / CHECKPOINTS
    candidates = [path for path in _by_step(folder) if mark_path(path).exists()]
    unusable: list[str] = []
    link = folder / LAST
    if os.path.lexists(link):
        target = folder / link.readlink() if link.is_symlink() else link
        if link.is_symlink() and (target.parent != folder or step_of(target) is None):
            unusable.append(f"{link} points to {link.readlink()}, which is not a checkpoint of this run")
        else:
            if candidates and step_of(target) is not None and _step(target) < _step(candidates[0]):
                log.info("%s points to step %d, although there is step %d.", link, _step(target), _step(candidates[0]))
            candidates = [target, *(path for path in candidates if path != target)]
    for path in candidates:
        damage = damage_of(path, verify)
        if not damage:
            if unusable:
                log.warning("%s; using %s instead.", "; ".join(unusable), path)
            return path
        unusable.append(f"{path} is not complete ({damage})")
    if unusable:
        raise InputError(
            f"{'; '.join(unusable)}; there is no other checkpoint: restore a copy of one with its mark, or move "
            f"{folder} away to start again."
        )
    return None


def _step(path: Path) -> int:
    step = step_of(path)
    assert step is not None, path
    return step


def _by_step(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, with or without a mark, newest first."""
    return sorted((path for path in folder.glob("step-*.ckpt") if step_of(path) is not None), key=_step, reverse=True)
