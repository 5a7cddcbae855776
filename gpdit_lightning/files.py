"""Files that are either whole or absent."""

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpdit_lightning.errors import InputError


def partial_path(path: Path) -> Path:
    """Where `path` is built until it is whole: beside it, so that renaming is one step. No reader opens it."""
    return path.with_name(f"{path.name}.partial")


def check_place(path: Path, option: str = "--out", is_folder: bool = False) -> None:
    """Find out beforehand that a file, or the files of a folder, cannot be written; nothing is made.

    Args:
        path: the file or the folder, which need not be there.
        option: what the error says to change.
        is_folder: `path` is a folder to write files into.

    Raises:
        InputError: no folder that can be written in, a folder where the file shall be, or too long a name.
    """
    places = path.absolute() / "file" if is_folder else path.absolute()
    folder = next(place for place in places.parents if os.path.exists(place))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be written, since {folder} is no folder to write in: give another {option}.")
    if not is_folder and os.path.isdir(path):
        raise InputError(f"{path} cannot be written, since it is a folder: give another {option}.")
    try:
        os.lstat(partial_path(path))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): give another {option}.") from None


def publish(path: Path) -> None:
    """Flush what was built at `partial_path(path)`, a file or a folder, to disk and give it its name for good.

    A file takes the place of an older one; a folder needs its name to be free.
    """
    partial = partial_path(path)
    for part in (partial, *partial.rglob("*")):
        flush(part)
    partial.replace(path)
    flush(path.parent)  # a name is on disk when its folder is


def flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give the partial path to write to, and publish it when the block ends well.

    When the block raises, the partial file is removed and an older file at `path` stays as it was. A process that is
    killed leaves at most the partial file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial_path(path)
        publish(path)
    finally:
        partial_path(path).unlink(missing_ok=True)


@contextmanager
def held_by_one_process(path: Path) -> Iterator[bool]:
    """Hold a lock file during the block; it is free again when this process ends, however it ends.

    Yields:
        Whether it really is held: on a file system that knows no locks it is not.

    Raises:
        BlockingIOError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            # A record lock, which the loader's forked workers do not inherit.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise BlockingIOError(f"{path} is held by another process") from None
            locked = False
        yield locked


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
