"""Completion marks of checkpoints: the size and sha256 of each file, written when all files are on disk.

    {"step": 1000, "files": {"step-1000.ckpt/training.ckpt": {"bytes": 52428800, "sha256": "..."}, ...}}

A checkpoint with a mark was complete at that time; later damage, and files of another checkpoint, differ from the mark.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpdit_lightning import path_kinds
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write
from gpdit_lightning.hashes import remembered_sha256
from gpdit_lightning.regular_files import read_bounded, sha256_of
from gpdit_lightning.retries import retried, transient_error
from gpdit_lightning.schema import COUNT, OBJECT, SHA256, check, parse_json, shown

TRAINING, AVERAGE = path_kinds.TRAINING, "ema.safetensors"
MAX_MARK_BYTES = 2**20
MAX_HASHED_AT_ONCE = 8  # files of a checkpoint, each by a thread
SCHEMA = {"step": COUNT, "files": OBJECT}
FILE_SCHEMA = {"bytes": COUNT, "sha256": SHA256}

FileMark = tuple[int, str]
"""The size in bytes and the sha256 of a file."""


def mark_path(path: Path) -> Path:
    """Return the path of the completion mark of a checkpoint."""
    return path.with_name(f"{path.name}.complete")


def step_of(path: Path) -> int | None:
    """Return the step in the name of a checkpoint, `step-N.ckpt`; None for another name."""
    digits = path.name.removeprefix("step-").removesuffix(".ckpt")
    is_step = path.name == f"step-{digits}.ckpt" and digits.isascii() and digits.isdecimal() and len(digits) < 20
    return int(digits) if is_step else None


def files_of(path: Path) -> dict[str, Path]:
    """Return the files of a checkpoint by their paths within it; "." is the checkpoint itself if it is a file.

    Hidden files, which file systems and desktops create, do not belong to it.
    """
    return {
        file.relative_to(path).as_posix(): file
        for file in sorted((path, *path.rglob("*")))
        if not file.is_dir() and not file.name.startswith(".")
    }


def marks_of_files(path: Path) -> dict[str, FileMark]:
    """Return the sizes and hashes of the files of a checkpoint, which are read, by their names."""
    return {name: (file.stat().st_size, sha256_of(file)) for name, file in files_of(path).items()}


def mark_entries(path: Path, files: Mapping[str, FileMark]) -> dict[str, dict[str, Any]]:
    """Return the entries of the mark of a checkpoint with files of the given names, sizes and hashes."""
    return {
        (Path(path.name) / name).as_posix(): {"bytes": size, "sha256": digest}
        for name, (size, digest) in sorted(files.items())
    }


def write_mark(path: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Write the mark of a checkpoint with the result of `mark_entries`."""
    with atomic_write(mark_path(path)) as mark:
        mark.write_text(json.dumps({"step": step_of(path), "files": entries}, indent=2), encoding="utf-8")


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


@retried
def checkpoint_sha256(path: Path) -> str:
    """Return a sha256 over the hashes of a checkpoint's files, which are read from its mark if it has one.

    Raises:
        InputError: its mark or a file is damaged.
        TransientError: three attempts to read a file failed for a reason other than its content.
    """
    try:
        if mark_path(path).exists():
            digests = [digest for _, digest in _read_mark(path).values()]
        else:
            digests = [remembered_sha256(file) for file in files_of(path).values()]
    except OSError as error:
        raise transient_error(error, error.filename or path) or error from None
    return hashlib.sha256(json.dumps(sorted(digests)).encode()).hexdigest()


def _difference_from_mark(path: Path, verify: bool) -> str:
    try:
        expected = _read_mark(path)
    except FileNotFoundError:
        return "it has no completion mark"
    except (InputError, IsADirectoryError) as error:
        return f"its completion mark cannot be read: {str(error).rstrip('.')}"
    if not path.exists():
        return f"{path.name} is missing"
    found = {(Path(path.name) / name).as_posix(): file for name, file in files_of(path).items()}
    for name, (size, _) in expected.items():
        file = found.get(name)
        if file is None:
            return f"{name} is missing"
        if not file.is_file():
            return f"{name} is not a regular file"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    if surplus := sorted(found.keys() - expected.keys()):
        return f"{surplus[0]} is not part of it"
    if verify:
        with ThreadPoolExecutor(MAX_HASHED_AT_ONCE) as pool:
            digests = pool.map(remembered_sha256, (found[name] for name in expected))
            for (name, (_, digest)), found_digest in zip(expected.items(), digests, strict=True):
                if found_digest != digest:
                    return f"{name} has another sha256 than when it was written"
    return ""


def _read_mark(path: Path) -> dict[str, FileMark]:
    """Read the mark of a checkpoint; return the sizes and hashes of its files by name.

    Raises:
        InputError: it cannot be parsed, or is the mark of another checkpoint.
        OSError: it cannot be read.
    """
    mark, cure = mark_path(path), "restore it"
    content = parse_json(read_bounded(mark, MAX_MARK_BYTES), str(mark), cure)
    check(content, SCHEMA, "", str(mark), cure)
    if not content["files"]:
        raise InputError(f"{mark} lists no files: {cure}.")
    files: dict[str, FileMark] = {}
    for name, entry in content["files"].items():
        owner = name.partition("/")[0]
        if owner != path.name:
            raise InputError(f"{mark} is the mark of {shown(owner)}: {cure}.")
        check(entry, FILE_SCHEMA, f"files.{name}", str(mark), cure)
        files[name] = entry["bytes"], entry["sha256"]
    step = step_of(path)
    if step is not None and content["step"] != step:
        raise InputError(f"{mark} is the mark of step {shown(content['step'])}: {cure}.")
    return files
