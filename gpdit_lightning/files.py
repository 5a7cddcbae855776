"""Writing of files: checks before it, atomic writes, and locks."""

import errno
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gpdit_lightning.errors import InputError
from gpdit_lightning.names import MAX_NAME_BYTES
from gpdit_lightning.regular_files import open_regular

log = logging.getLogger(__name__)

LONGEST_WAIT = 10.0  # seconds for another process that writes the same file
POLL_INTERVAL = 0.05  # seconds
DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def partial_path(path: Path) -> Path:
    """Return the path at which `path` is written before it is complete; readers ignore it.

    It is in the same folder, so that renaming it to `path` is atomic. Its name is that of `path` with the ending
    ".partial", or a hash with that ending where this is too long for a file name.
    """
    name = f"{path.name}.partial"
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        name = f"{hashlib.sha256(os.fsencode(path.name)).hexdigest()}.partial"
    return path.with_name(name)


def check_writable(path: Path, option: str = "--out", is_folder: bool = False, extension: str = "") -> None:
    """Check that a file, or files in a folder, can be written; nothing is created.

    Args:
        path: the file or the folder; it does not have to exist.
        option: the option to change, for the message.
        is_folder: whether `path` is a folder that files are written into.
        extension: with which the name has to end, so that no file of another kind is replaced.

    Raises:
        InputError: the name has another extension or is too long, the closest existing parent is not a writable folder,
            or the path of the file is that of a folder, a pipe, a socket or a device.
    """
    if not is_folder and os.path.isdir(path):
        raise InputError(f"{path} cannot be written, since it is a folder: give another {option}.")
    file = path.absolute() / "file" if is_folder else path.absolute()
    folder = next(parent for parent in file.parents if os.path.exists(parent))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be written, since {folder} is not a writable folder: give another {option}.")
    if extension and path.suffix.lower() != extension:
        raise InputError(f"{option} is {path}: give a name that ends in {extension}, as the file to write does.")
    for name in (path, partial_path(path)) if path.name else ():  # not for / and the working directory
        try:
            os.lstat(name)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}): give another {option}.") from None
    if not is_folder:
        _check_replaceable(path, f"give another {option}")


def announce_replaced(paths: Iterable[Path]) -> None:
    """Log which files a command is going to replace, so that none is lost unnoticed; nothing if none exists."""
    existing = [path for path in paths if path.exists()]
    if len(existing) > 1:
        log.info("%d existing files are replaced, such as %s", len(existing), existing[0])
    elif existing:
        log.info("the existing %s is replaced", existing[0])


def check_keeps_inputs(results: Iterable[Path], inputs: Iterable[str | Path], cure: str) -> None:
    """Raise `InputError` if a result would replace an input: one of these files, or a file in one of these folders."""
    read = {os.path.realpath(path) for path in inputs}
    for path in results:
        real = os.path.realpath(path)
        if real in read or (os.path.exists(real) and os.path.dirname(real) in read):
            raise InputError(f"{path} is an input and would be overwritten by a result: {cure}.")


def _check_replaceable(path: Path, cure: str) -> None:
    """Raise `InputError` if a path is that of a pipe, a socket or a device: renaming a file to it would remove it."""
    kind = stat.S_IFMT(os.lstat(path).st_mode) if os.path.lexists(path) else stat.S_IFREG
    if kind not in (stat.S_IFREG, stat.S_IFLNK, stat.S_IFDIR):
        raise InputError(f"{path} cannot be written, since it is a pipe, a socket or a device: {cure}.")


def publish(path: Path) -> None:
    """Flush the file or folder at `partial_path(path)` to disk and rename it to `path`.

    A file replaces an existing one; a folder must not exist at `path` yet.
    """
    partial = partial_path(path)
    for entry in (partial, *partial.rglob("*")):
        flush(entry)
    partial.replace(path)
    flush(path.parent)  # the new name is on disk only after its folder is


def flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield the partial path to write to, and publish it when the block ends without an exception.

    After an exception the partial file is removed and an existing file at `path` is unchanged. A process that is
    killed leaves at most the partial file. Other processes that write the same file wait for the block.

    Raises:
        InputError: the path is that of a pipe, a socket or a device; or as :func:`new_partial`.
        OSError: the file cannot be written, or the path is that of a folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_replaceable(path, "move it away, or give another path")
    try:
        with new_partial(path) as partial:
            yield partial
            publish(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # of a failed write, such as on a full disk, it is not set
        raise


def write_once(path: Path, text: str) -> None:
    """Write a file atomically unless it exists: of several processes, also without locks, the first one writes it.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = partial_path(path.with_name(f"{path.name}.{secrets.token_hex(4)}"))
    try:
        own.write_text(text, encoding="utf-8", errors="backslashreplace")
        flush(own)
        try:
            os.link(own, path)
        except OSError:
            if not os.path.lexists(path):  # the file system has no links
                own.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # as in `atomic_write`
        raise
    finally:
        own.unlink(missing_ok=True)


@contextmanager
def new_partial(path: Path, is_folder: bool = False) -> Iterator[Path]:
    """Yield a new, empty file or folder at `partial_path(path)`, which no other process uses during the block.

    It is removed after an exception. A leftover of a killed process is replaced. On a file system without locks,
    processes do not exclude each other.

    Raises:
        InputError: another process uses it, and has not finished within `LONGEST_WAIT`.
        OSError: it cannot be made.
    """
    partial, end = partial_path(path), time.monotonic() + LONGEST_WAIT
    while (descriptor := _claim(partial, is_folder)) is None:
        if time.monotonic() > end:
            raise InputError(f"another process is writing {path}: wait for it or stop it, or give another path.")
        time.sleep(POLL_INTERVAL)
    try:
        yield partial
    except BaseException:
        remove(partial)
        raise
    finally:
        os.close(descriptor)  # the lock ends


def _lock(descriptor: int) -> None:
    """Lock an open file, unless its file system has no locks; raises `BlockingIOError` if another process holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass


def _claim(partial: Path, is_folder: bool) -> int | None:
    """Make a locked, empty file or folder; return its descriptor, or None if another process holds or moved it.

    The lock is of the open file (flock), since record locks would end as soon as a library closes the file.
    """
    kind, flags = (stat.S_IFDIR, os.O_RDONLY) if is_folder else (stat.S_IFREG, os.O_RDWR | os.O_CREAT)
    if os.path.lexists(partial) and stat.S_IFMT(os.lstat(partial).st_mode) != kind:
        remove(partial)  # a leftover, which might be a link or a pipe
    if is_folder:
        partial.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(partial, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except PermissionError:
        if not os.path.lexists(partial):
            raise
        remove(partial)
        return None
    try:
        _lock(descriptor)
        if os.path.samestat(os.fstat(descriptor), os.lstat(partial)):
            for entry in partial.iterdir() if is_folder else ():
                remove(entry)
            if not is_folder:
                os.ftruncate(descriptor, 0)
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder during the block, without a file in it; the folder is made if it is missing.

    On a file system without locks, processes do not exclude each other.

    Raises:
        InputError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            _lock(descriptor)
        except BlockingIOError:
            raise InputError(
                f"another process is writing to {folder}: wait for it or stop it, or give another path."
            ) from None
        yield
    finally:
        os.close(descriptor)  # the lock ends


@contextmanager
def process_lock(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on a file during the block; it is released when the process ends, even by a kill.

    Yields:
        Whether the lock is held; False on a file system without locks.

    Raises:
        BlockingIOError: another process holds it.
        InputError: the path is that of a pipe or a device.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_regular(path, os.O_RDWR | os.O_CREAT) as file:
        try:
            # A record lock: forked loader workers do not inherit it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise BlockingIOError(f"{path} is held by another process") from None
            locked = False
        yield locked
