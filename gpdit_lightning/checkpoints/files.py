"""How checkpoints lie on disk: a checkpoint is there when its mark is, and the mark says what it must be like.

- checkpoints/step-N.ckpt: a folder (what is in it: checkpoint_io.py);
- checkpoints/step-N.ckpt.complete: its mark, the size and hash of every file, written when all of them are on disk;
- checkpoints/last.ckpt: a link to the newest.
"""

import hashlib
import json
import logging
import shutil
from pathlib import Path

from gpdit_lightning.errors import InputError
from gpdit_lightning.files import flush, partial_path, publish, sha256_of, written_whole

LAST = "last.ckpt"

log = logging.getLogger(__name__)


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return run_dir / "checkpoints" / f"step-{step}.ckpt"


def mark_path(path: Path) -> Path:
    """The completion mark of a checkpoint."""
    return path.with_name(f"{path.name}.complete")


def publish_checkpoint(path: Path) -> None:
    """Make the checkpoint that was built at `partial_path(path)` the last one; killed at any point, one is."""
    partial = partial_path(path)
    files = {}
    for part in sorted(part for part in (partial, *partial.rglob("*")) if part.is_file()):
        name = (path / part.relative_to(partial)).relative_to(path.parent)
        files[name.as_posix()] = {"bytes": part.stat().st_size, "sha256": sha256_of(part)}
    remove_checkpoint(path)  # a run that went back to an earlier step writes this one again
    publish(path)
    with written_whole(mark_path(path)) as mark:
        mark.write_text(json.dumps({"step": _step_of(path), "files": files}, indent=2), encoding="utf-8")
    link = path.with_name(LAST)
    partial_path(link).unlink(missing_ok=True)
    partial_path(link).symlink_to(path.name)
    partial_path(link).replace(link)
    flush(path.parent)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint if it is there; killed midway, what is left of it has a name that is cleared away."""
    discarded = partial_path(path.with_name(f"{path.name}.discarded"))
    if path.exists():
        remove(discarded)
        path.replace(discarded)
    mark_path(path).unlink(missing_ok=True)
    remove(discarded)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def prune(newest: Path, keep_last: int, keep_every_steps: int) -> None:
    """Remove the checkpoints before the newest, but the last ones and the milestones.

    Later ones, which a run has that went back to an earlier step, are left until it passes them. One without a mark is
    neither counted nor removed.
    """
    marked = [path for path in _by_step(newest.parent) if mark_path(path).exists()]
    earlier = [path for path in marked if _step_of(path) < _step_of(newest)]
    for path in earlier[keep_last - 1 :]:
        if keep_every_steps == 0 or _step_of(path) % keep_every_steps:
            remove_checkpoint(path)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run was writing or removing. Nobody may be at it any more.

    A checkpoint without a mark stays: somebody may have put it there.
    """
    for path in folder.glob("*.partial"):
        log.info("%s was never completed and is removed.", path)
        remove(path)


def discredit_torn_ones(folder: Path, after: int) -> None:
    """Take the mark from checkpoints after a step that are not what was written, so that none counts as a good one."""
    for path in _by_step(folder):
        if _step_of(path) > after and mark_path(path).exists() and fault_of(path, verify=True):
            mark_path(path).replace(mark_path(path).with_suffix(".torn"))


def fault_of(path: Path, verify: bool = False) -> str:
    """What is wrong with a checkpoint according to its mark; empty if nothing is.

    Args:
        path: the checkpoint, not a link to it.
        verify: whether to hash its files, instead of comparing their sizes only.
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
            return f"{name} is not what was written, by its sha256"
    return ""


def digest_of(path: Path) -> str:
    """A sha256 that tells a checkpoint from others: over those of its files, as its mark or, without one, they say."""
    if mark_path(path).exists():
        files = json.loads(mark_path(path).read_text(encoding="utf-8"))["files"]
        digests = [entry["sha256"] for entry in files.values()]
    else:
        digests = [sha256_of(file) for file in path.iterdir()]
    return hashlib.sha256(json.dumps(sorted(digests)).encode()).hexdigest()


def last_checkpoint(run_dir: Path, verify: bool = False) -> Path | None:
    """The checkpoint to go on from: the one that `last.ckpt` names or, if that is torn, the newest whole one.

    Args:
        run_dir: the run folder.
        verify: whether to hash files, instead of comparing their sizes only.

    Returns:
        its own path, not the link; None if there is no checkpoint yet.

    Raises:
        InputError: there are checkpoints and none is whole.
    """
    folder = run_dir / "checkpoints"
    candidates = [path for path in _by_step(folder) if mark_path(path).exists()]
    link = folder / LAST
    if link.is_symlink() or link.exists():
        named = folder / link.readlink() if link.is_symlink() else link
        candidates = [named, *(path for path in candidates if path != named)]
    faults: list[str] = []
    for path in candidates:
        fault = fault_of(path, verify)
        if not fault:
            if faults:
                log.warning("%s; going on from %s.", "; ".join(faults), path)
            return path
        faults.append(f"{path} is not whole ({fault})")
    if faults:
        raise InputError(
            f"{'; '.join(faults)}; no other checkpoint is left: put back a copy of one with its mark, or move "
            f"{folder} away to begin anew."
        )
    return None


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _by_step(folder: Path) -> list[Path]:
    """The checkpoints in a folder, marked or not, newest first."""
    found = [path for path in folder.glob("step-*.ckpt") if path.stem.removeprefix("step-").isdecimal()]
    return sorted(found, key=_step_of, reverse=True)
