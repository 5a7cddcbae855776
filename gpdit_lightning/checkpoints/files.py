"""Training checkpoints on disk: finding, reading, publishing and removing them.

A run folder contains

    checkpoints/step-N.ckpt/training.ckpt      written by torch.save: weights, optimizer, states of callbacks and data
    checkpoints/step-N.ckpt/ema.safetensors    averaged weights, if there are any
    checkpoints/step-N.ckpt.complete           completion mark: the size and sha256 of each file
    checkpoints/last.ckpt                      link to the newest checkpoint

The mark is written when all files are on disk, so a checkpoint with a mark was complete at that time; later damage
shows as a difference from the mark. Only tensors and plain values are unpickled.
"""

import hashlib
import json
import logging
import pickle
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gpdit_lightning.checkpoints.facts import Origin, WeightsKind
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write, flush, partial_path, publish, sha256_of, utf8_path
from gpdit_lightning.retries import retried, transient_error

LAST = "last.ckpt"
TRAINING, AVERAGE = "training.ckpt", "ema.safetensors"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A training checkpoint.

    Attributes:
        path: folder of the checkpoint.
        content: content of `training.ckpt`, with the averaged weights in `content["ema"]["weights"]`; tensors are
            memory-mapped.
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
        saved = self.content["gpdit"]["origin"]
        return Origin(**saved) if saved else None

    @property
    def config(self) -> Any:
        """The `GPDiTConfig.to_dict()` of the backbone, not validated."""
        return self.content["gpdit"].get("backbone")

    def backbone_weights(self, kind: WeightsKind = "ema") -> dict[str, Tensor]:
        """Return the backbone's state dict: averaged (`ema`; trained if there is no average) or trained (`raw`).

        Raises:
            InputError: the checkpoint is of a classifier.
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
        return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}

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


def open_checkpoint(path: str | Path, verify: bool = False) -> Checkpoint:
    """Open the checkpoint that a path refers to, with the arguments of :func:`find_checkpoint`.

    Raises:
        InputError: as :func:`find_checkpoint`, or the file cannot be read or is not a checkpoint of this library.
    """
    folder = find_checkpoint(path, verify)
    return Checkpoint(folder, read_content(folder))


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
            raise InputError(f"there is no checkpoint at {path}: give a step-N.ckpt or a run folder that has some.")
        return last
    if path.is_symlink():  # such as `last.ckpt`: the mark is beside the target of the link
        path = path.parent / path.readlink()
    damage = damage_of(path, verify) if mark_path(path).exists() else ""
    if damage:
        raise InputError(f"{path} is not a complete checkpoint ({damage}): use another checkpoint of the run.")
    return path


@retried
def read_content(folder: Path, mapped: bool = True) -> dict[str, Any]:
    """Read a checkpoint; objects other than tensors and plain values are rejected.

    Args:
        folder: folder of the checkpoint.
        mapped: whether to memory-map the tensors, which processes then share, instead of reading them.

    Raises:
        InputError: a file is missing, truncated or of another type.
        TransientError: three attempts to read a file failed for a reason other than its content.
    """
    path, cure = folder / TRAINING, "use another checkpoint of the run"
    try:
        with path.open("rb") as file:
            file.read(1)  # an error of the disk is raised here, which is_zipfile would ignore
            if not zipfile.is_zipfile(file):
                raise EOFError("truncated, or of another type")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        fault = "is not a complete" if isinstance(error, (EOFError, OSError)) else "cannot be read as a"
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        damaged = InputError(f"{path} {fault} checkpoint ({reason}): {cure}.")
        raise transient_error(error, path) or damaged from None
    required = ("state_dict", "gpdit", "LatentDataModule")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), dict) for name in required):
        raise InputError(f"{path} is not a checkpoint of gpdit_lightning: give one that `fit` wrote.")
    if "ema" in content:
        try:
            with utf8_path(folder / AVERAGE) as readable:
                average = load_file(readable)
        except (OSError, SafetensorError) as error:
            damaged = InputError(f"{folder / AVERAGE} is not a complete safetensors file ({error}): {cure}.")
            raise transient_error(error, folder / AVERAGE) or damaged from None
        content["ema"]["weights"] = average if mapped else {name: value.clone() for name, value in average.items()}
    return content


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return run_dir / "checkpoints" / f"step-{step}.ckpt"


def mark_path(path: Path) -> Path:
    """Return the path of the completion mark of a checkpoint."""
    return path.with_name(f"{path.name}.complete")


def publish_checkpoint(path: Path) -> None:
    """Publish the checkpoint at `partial_path(path)` as the last one of its run.

    If the process is killed at any moment, `last_checkpoint` still finds a complete checkpoint.
    """
    partial = partial_path(path)
    files = {}
    for file in sorted(file for file in (partial, *partial.rglob("*")) if file.is_file()):
        name = (path / file.relative_to(partial)).relative_to(path.parent)
        files[name.as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    remove_checkpoint(path)  # it exists if the run resumed from an earlier step
    publish(path)
    with atomic_write(mark_path(path)) as mark:
        mark.write_text(json.dumps({"step": _step_of(path), "files": files}, indent=2), encoding="utf-8")
    link = path.with_name(LAST)
    partial_path(link).unlink(missing_ok=True)
    partial_path(link).symlink_to(path.name)
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


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
    earlier = [path for path in marked if _step_of(path) < _step_of(newest)]
    for path in earlier[keep_last - 1 :]:
        if keep_every_steps == 0 or _step_of(path) % keep_every_steps:
            remove_checkpoint(path)


def remove_leftovers(folder: Path) -> None:
    """Remove incomplete files of a killed run; no process may be writing to the folder.

    A checkpoint without a mark is kept, since a user may have copied it there.
    """
    for path in folder.glob("*.partial"):
        log.info("%s is incomplete and is removed.", path)
        remove(path)


def unmark_damaged(folder: Path, after: int) -> None:
    """Rename the marks of damaged checkpoints of steps above `after`, so that pruning does not count them."""
    for path in _by_step(folder):
        if _step_of(path) > after and mark_path(path).exists() and damage_of(path, verify=True):
            mark_path(path).replace(mark_path(path).with_suffix(".torn"))


@retried
def damage_of(path: Path, verify: bool = False) -> str:
    """Return the difference of a checkpoint from its mark, in words; empty if there is none.

    Args:
        path: the checkpoint, not a link to it.
        verify: whether to compare the hashes of its files, and not only their sizes.

    Raises:
        TransientError: three attempts to read a file failed for a reason other than its content.
    """
    try:
        return _difference_from_mark(path, verify)
    except OSError as error:
        raise transient_error(error, error.filename or path) or error from None


def _difference_from_mark(path: Path, verify: bool) -> str:
    try:
        files = json.loads(mark_path(path).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return "it has no completion mark"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its completion mark cannot be read"
    for name, (size, digest) in expected.items():
        file = path.parent / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if verify and sha256_of(file) != digest:
            return f"{name} has another sha256 than when it was written"
    return ""


@retried
def checkpoint_sha256(path: Path) -> str:
    """Return a sha256 over the hashes of a checkpoint's files, which are read from its mark if it has one.

    Raises:
        TransientError: three attempts to read a file failed for a reason other than its content.
    """
    try:
        if mark_path(path).exists():
            files = json.loads(mark_path(path).read_text(encoding="utf-8"))["files"]
            digests = [entry["sha256"] for entry in files.values()]
        else:
            digests = [sha256_of(file) for file in path.iterdir()]
    except OSError as error:
        raise transient_error(error, error.filename or path) or error from None
    return hashlib.sha256(json.dumps(sorted(digests)).encode()).hexdigest()


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
    folder = run_dir / "checkpoints"
    candidates = [path for path in _by_step(folder) if mark_path(path).exists()]
    link = folder / LAST
    if link.is_symlink() or link.exists():
        target = folder / link.readlink() if link.is_symlink() else link
        candidates = [target, *(path for path in candidates if path != target)]
    incomplete: list[str] = []
    for path in candidates:
        damage = damage_of(path, verify)
        if not damage:
            if incomplete:
                log.warning("%s; using %s instead.", "; ".join(incomplete), path)
            return path
        incomplete.append(f"{path} is not complete ({damage})")
    if incomplete:
        raise InputError(
            f"{'; '.join(incomplete)}; there is no other checkpoint: restore a copy of one with its mark, or move "
            f"{folder} away to start again."
        )
    return None


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _by_step(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, with or without a mark, newest first."""
    paths = [path for path in folder.glob("step-*.ckpt") if path.stem.removeprefix("step-").isdecimal()]
    return sorted(paths, key=_step_of, reverse=True)
