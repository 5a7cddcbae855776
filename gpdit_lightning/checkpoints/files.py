"""Training checkpoints on disk: finding, reading, publishing and removing them.

A run folder holds

    checkpoints/step-N.ckpt/training.ckpt      what torch saves: weights, optimizer, what the parts of the run keep
    checkpoints/step-N.ckpt/ema.safetensors    the averaged weights, where there are some
    checkpoints/step-N.ckpt.complete           its completion mark: the size and sha256 of each file
    checkpoints/last.ckpt                      a link to the newest

The mark is written when all files are on disk, so a checkpoint with a mark is complete, or was damaged later. Reading
unpickles nothing but tensors and plain values.
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
from gpdit_lightning.files import atomic_write, flush, partial_path, publish, sha256_of

LAST = "last.ckpt"
TRAINING, AVERAGE = "training.ckpt", "ema.safetensors"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A training checkpoint.

    Attributes:
        path: its folder.
        content: what `training.ckpt` holds, with the averaged weights in `content["ema"]["weights"]`; tensors are
            mapped into memory.
    """

    path: Path
    content: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps trained."""
        return int(self.content["global_step"])

    @property
    def origin(self) -> Origin | None:
        """The weights that training started from; None if these were random."""
        saved = self.content["gpdit"]["origin"]
        return Origin(**saved) if saved else None

    @property
    def config(self) -> Any:
        """What should be the `GPDiTConfig.to_dict()` of its backbone."""
        return self.content["gpdit"].get("backbone")

    def backbone_weights(self, kind: WeightsKind = "ema") -> dict[str, Tensor]:
        """The backbone's state dict: averaged weights (`ema`; trained ones where there is no average) or trained."""
        weights = self.content["state_dict"]
        if kind == "ema" and "ema" in self.content:
            weights = weights | self.content["ema"]["weights"]
        prefix = "backbone."
        return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}

    def facts(self, kind: WeightsKind) -> dict[str, Any]:
        """What it records of the training of its weights, as `TrainingFacts.from_dict` takes it."""
        stage, data = self.content["gpdit"], self.content["LatentDataModule"]
        facts = {
            "weights": kind if "ema" in self.content else "raw",
            "step": self.content.get("global_step"),
            "stage": stage.get("stage"),
            "origin": stage.get("origin"),
            "schedule": stage.get("schedule"),
            "codec": data.get("codec"),
            "geometry": data.get("geometry"),
            "classes": data.get("classes"),
            "data": data.get("order"),
            "lightning_version": self.content.get("pytorch-lightning_version"),
        }
        return {name: value for name, value in facts.items() if value is not None}


def open_checkpoint(path: str | Path, verify: bool = False) -> Checkpoint:
    """The checkpoint that a path refers to; arguments and errors as of :func:`find_checkpoint`.

    Raises:
        InputError: also if it cannot be read, or is not a checkpoint of this library.
    """
    found = find_checkpoint(path, verify)
    return Checkpoint(found, read_content(found))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of the checkpoint that a path refers to; see :func:`open_checkpoint`."""
    return open_checkpoint(path).content


def find_checkpoint(path: str | Path, verify: bool = False) -> Path:
    """The folder of the checkpoint that a path refers to: the path itself, or the last complete one of a run folder.

    Args:
        path: a checkpoint, which may be a copy anywhere, its `training.ckpt`, or a run folder.
        verify: whether to hash its files, where there is a mark, instead of comparing only their sizes.

    Raises:
        InputError: there is none, or its files differ from what its mark records.
    """
    path = Path(path)
    if path.name == TRAINING and path.is_file():
        path = path.parent
    if not (path / TRAINING).is_file():
        last = last_checkpoint(path, verify) if path.is_dir() else None
        if last is None:
            raise InputError(f"there is no checkpoint at {path}: give a step-N.ckpt or a run folder that has some.")
        return last
    if path.is_symlink():  # as `last.ckpt` is: the mark is beside the link's target
        path = path.parent / path.readlink()
    damage = damage_of(path, verify) if mark_path(path).exists() else ""
    if damage:
        raise InputError(f"{path} is not a complete checkpoint ({damage}): use another one of the run.")
    return path


def read_content(folder: Path, mapped: bool = True) -> dict[str, Any]:
    """The content of a checkpoint; objects other than tensors and plain values are refused.

    Args:
        folder: the checkpoint.
        mapped: whether its tensors are mapped into memory, which processes share, instead of read.

    Raises:
        InputError: a file is missing, truncated, or of another kind.
    """
    path, cure = folder / TRAINING, "use another one of the run"
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is not a complete checkpoint (truncated, or of another kind): {cure}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(f"{path} cannot be read as a checkpoint ({str(error).splitlines()[0]}): {cure}.") from None
    required = ("state_dict", "gpdit", "LatentDataModule")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), dict) for name in required):
        raise InputError(f"{path} is not a checkpoint of gpdit_lightning: give one that `fit` wrote.")
    if "ema" in content:
        try:
            average = load_file(folder / AVERAGE)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{folder / AVERAGE} is not a complete safetensors file ({error}): {cure}.") from None
        content["ema"]["weights"] = average if mapped else {name: value.clone() for name, value in average.items()}
    return content


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return run_dir / "checkpoints" / f"step-{step}.ckpt"


def mark_path(path: Path) -> Path:
    """The completion mark of a checkpoint."""
    return path.with_name(f"{path.name}.complete")


def publish_checkpoint(path: Path) -> None:
    """Publish the checkpoint that was built at `partial_path(path)`, as the last one of its run.

    At any moment during this, so also after a kill, `last_checkpoint` finds a complete checkpoint.
    """
    partial = partial_path(path)
    files = {}
    for file in sorted(file for file in (partial, *partial.rglob("*")) if file.is_file()):
        name = (path / file.relative_to(partial)).relative_to(path.parent)
        files[name.as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    remove_checkpoint(path)  # a run that resumed from an earlier step writes this one again
    publish(path)
    with atomic_write(mark_path(path)) as mark:
        mark.write_text(json.dumps({"step": _step_of(path), "files": files}, indent=2), encoding="utf-8")
    link = path.with_name(LAST)
    partial_path(link).unlink(missing_ok=True)
    partial_path(link).symlink_to(path.name)
    partial_path(link).replace(link)
    flush(path.parent)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint if it exists; what a kill leaves of it has a name that `remove_leftovers` removes."""
    discarded = partial_path(path.with_name(f"{path.name}.discarded"))
    if path.exists():
        remove(discarded)
        path.replace(discarded)
    mark_path(path).unlink(missing_ok=True)
    remove(discarded)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def prune(newest: Path, keep_last: int, keep_every_steps: int) -> None:
    """Remove old checkpoints of a run.

    Checkpoints of later steps, left over where a run resumed from an earlier one, stay until the run passes them. A
    checkpoint without a mark is neither counted nor removed.

    Args:
        newest: the checkpoint that was just published.
        keep_last: how many to keep, including the newest.
        keep_every_steps: keep also those whose step is a multiple of it; 0: none.
    """
    marked = [path for path in _by_step(newest.parent) if mark_path(path).exists()]
    earlier = [path for path in marked if _step_of(path) < _step_of(newest)]
    for path in earlier[keep_last - 1 :]:
        if keep_every_steps == 0 or _step_of(path) % keep_every_steps:
            remove_checkpoint(path)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run left half written or half removed; no process may be writing in the folder.

    A checkpoint without a mark stays, since a user may have copied it there.
    """
    for path in folder.glob("*.partial"):
        log.info("%s is incomplete and is removed.", path)
        remove(path)


def unmark_damaged(folder: Path, after: int) -> None:
    """Remove the marks of damaged checkpoints of steps above `after`, so that pruning does not count them."""
    for path in _by_step(folder):
        if _step_of(path) > after and mark_path(path).exists() and damage_of(path, verify=True):
            mark_path(path).replace(mark_path(path).with_suffix(".torn"))


def damage_of(path: Path, verify: bool = False) -> str:
    """How a checkpoint differs from what its mark records, in words; empty if it does not.

    Args:
        path: the checkpoint, not a link to it.
        verify: whether to hash its files, instead of comparing only their sizes.
    """
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


def checkpoint_sha256(path: Path) -> str:
    """A sha256 that identifies a checkpoint: over the hashes of its files, from its mark if it has one."""
    if mark_path(path).exists():
        files = json.loads(mark_path(path).read_text(encoding="utf-8"))["files"]
        digests = [entry["sha256"] for entry in files.values()]
    else:
        digests = [sha256_of(file) for file in path.iterdir()]
    return hashlib.sha256(json.dumps(sorted(digests)).encode()).hexdigest()


def last_checkpoint(run_dir: Path, verify: bool = False) -> Path | None:
    """The checkpoint to resume from: the target of `last.ckpt` or, if that is damaged, the newest complete one.

    Args:
        run_dir: the run folder.
        verify: whether to hash files, instead of comparing only their sizes.

    Returns:
        The path of the checkpoint, not of the link; None if there is no checkpoint yet.

    Raises:
        InputError: there are checkpoints, and none is complete.
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
            f"{'; '.join(incomplete)}; no other checkpoint is left: restore a copy of one with its mark, or move "
            f"{folder} away to start again."
        )
    return None


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _by_step(folder: Path) -> list[Path]:
    """The checkpoints in a folder, marked or not, newest first."""
    paths = [path for path in folder.glob("step-*.ckpt") if path.stem.removeprefix("step-").isdecimal()]
    return sorted(paths, key=_step_of, reverse=True)
