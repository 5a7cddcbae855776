"""Local cache of remote files, verified by hash, bounded in size and shared by all processes of a machine.

A copy is named by its sha256, so runs and manifests that refer to the same bytes share it.

    CACHE/ab/ab12...                 a copy; its modification time is the time of its last use
    CACHE/ab/ab12....TOKEN.partial   a download in progress, at its full size from the start
    CACHE/locks/ab1                  lock of the thread that downloads a file whose hash starts with ab1
    CACHE/locks/capacity             lock for counting and evicting copies, and for renaming a download to its copy

Lock files are never removed: a process that has opened one before its removal would hold a lock that no other process
sees. Their number is limited by the three digits, so a download occasionally waits for an unrelated one. On file
systems without locks, a file may be downloaded twice, and copies may briefly exceed the size limit.
"""

import hashlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from gpdit_lightning.data.remote import FailedDownloadError, RemoteFile, WrongContentError, read_blocks
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import DISK_FULL_ERRORS, flush, process_lock
from gpdit_lightning.regular_files import sha256_of
from gpdit_lightning.retries import retried

log = logging.getLogger(__name__)

T = TypeVar("T")

PARTIAL = ".partial"
POLL_INTERVAL = 0.05  # seconds between two attempts to get a lock or space
USE_TIME_RESOLUTION = 10.0  # seconds; the time of last use is not updated more often
ABANDONED_AFTER = 60.0  # seconds without a write after which a partial file counts as abandoned, without locks
PREFETCH_THREADS = 2  # per process
MAX_OPEN_ATTEMPTS = 10  # times a copy is fetched if other processes evict it before it is opened


@dataclass(frozen=True)
class CacheConfig:
    """Location and size of the cache of remote shards; sources on this machine do not use it."""

    directory: str = "~/.cache/gpdit_lightning/shards"
    """Folder on a local disk; several runs may share it."""
    gib: float = 100.0
    """Maximum space for copies, in GiB; the least recently used ones are evicted."""

    def check(self) -> None:
        """Raise `InputError` if the limit is not positive; also for runs that need no cache."""
        if not self.gib > 0:
            raise InputError(f"data.cache.gib is {self.gib}; it must be above 0.")

    def open(self) -> "ShardCache":
        """Open the cache; raises as `check` and `ShardCache`."""
        self.check()
        return ShardCache(Path(self.directory).expanduser(), self.gib)


class ShardCache:
    """Cache of remote files in one folder. Any number of processes and threads may use it at once.

    It may be pickled and forked: threads are started in each process at first use.

    Args:
        directory: folder on a local disk; created if it does not exist.
        gib: most space for copies and downloads in progress, in GiB.

    Raises:
        InputError: the folder cannot be created.
    """

    def __init__(self, directory: Path, gib: float) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{directory} cannot be a folder for copies of shards ({error.strerror}): set data.cache.directory to "
                "another folder."
            ) from None
        self.directory, self.limit = directory, int(gib * 2**30)
        self._prefetcher: _Prefetcher | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prefetcher": None}

    def fetch(self, file: RemoteFile) -> Path:
        """Return the local copy of a file; download it first, or wait for the process that is downloading it.

        Other processes may evict the copy at any time: open it at once, or use `use`. An open file stays readable.

        Raises:
            InputError: three attempts to download the file failed, it is larger than the cache, the disk is full, or
                the folder is not writable.
        """
        return self._fetch(file, wait=True)

    def use(self, file: RemoteFile, read: Callable[[Path], T]) -> T:
        """Return `read(path)` of the local copy, which is fetched again if it was evicted before `read` opened it.

        Raises:
            InputError: as `fetch`; or the copy was evicted repeatedly, so the cache is too small for its readers.
        """
        for _ in range(MAX_OPEN_ATTEMPTS):
            path = self.fetch(file)
            try:
                return read(path)
            except FileNotFoundError:
                continue
        raise InputError(
            f"{file.url} was evicted from {self.directory} {MAX_OPEN_ATTEMPTS} times before it could be opened: raise "
            "data.cache.gib, which is too small for the number of readers."
        )

    def remove_if_damaged(self, file: RemoteFile) -> bool:
        """Remove the copy of a file if its hash is wrong or it cannot be read; return whether it was removed.

        Raises:
            InputError: it cannot be removed.
        """
        path = self._path(file)
        try:
            if sha256_of(path) == file.sha256:
                return False
        except FileNotFoundError:
            return False
        except (OSError, InputError):  # a read error of the disk, or not a regular file
            pass
        log.warning("the copy of %s at %s is damaged or cannot be read, and will be fetched again.", file.url, path)
        with self._explain_write_errors(file):
            path.unlink(missing_ok=True)
        return True

    def prefetch(self, files: Sequence[RemoteFile]) -> None:
        """Download files in the background, in this order, after those requested earlier; returns at once.

        Requests for files that are present or already requested are cheap. Failures are left to the reader that needs
        the file, and files that another process is downloading are skipped. The files should fit into the cache
        together; otherwise the last ones evict those that are needed first.
        """
        missing = [file for file in files if not _exists_and_touch(self._path(file))]
        if not missing:
            return
        if self._prefetcher is None or self._prefetcher.process != os.getpid():  # a fork does not copy threads
            self._prefetcher = _Prefetcher(lambda file: self._fetch(file, wait=False))
        self._prefetcher.add(missing)

    def _path(self, file: RemoteFile) -> Path:
        return self.directory / file.sha256[:2] / file.sha256

    def _lock_path(self, path: Path) -> Path:
        """Return the lock file of a copy or of a partial file."""
        return self.directory / "locks" / path.name[:3]

    def _fetch(self, file: RemoteFile, wait: bool) -> Path:
        """Fetch as `fetch`; without `wait`, raise BlockingIOError if another thread or process downloads the file."""
        path = self._path(file)
        if not _exists_and_touch(path):
            with self._explain_write_errors(file), _exclusive_lock(self._lock_path(path), wait) as locked:
                for partial in path.parent.glob(f"{path.name}.*{PARTIAL}"):
                    _remove_abandoned(partial, locked)
                if not path.exists():  # it exists if another process finished it while this one waited for the lock
                    self._download(file, path)
        return path

    @contextmanager
    def _explain_write_errors(self, file: RemoteFile) -> Iterator[None]:
        """Convert an OSError of writing a copy to an InputError that names the folder and the cure."""
        try:
            yield
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno in DISK_FULL_ERRORS:
                raise InputError(
                    f"{self.directory} has no space left for {file.url} ({error.strerror}): free space on that disk, "
                    "lower data.cache.gib, or set data.cache.directory to a folder on another disk."
                ) from None
            raise InputError(
                f"a copy of {file.url} cannot be written to {self.directory} ({error}): set data.cache.directory to a "
                "writable folder."
            ) from None

    @retried
    def _download(self, file: RemoteFile, path: Path) -> None:
        """Download a file to a partial file, verify it, and rename it to `path`."""
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._write_partial(file, partial)
            try:
                flush(partial)
                with self._capacity_lock():  # otherwise a process that counts the files could miss both names
                    partial.replace(path)
            except FileNotFoundError:  # without locks, a download that stalls looks abandoned
                raise FailedDownloadError(
                    f"the copy of {file.url} was removed from {self.directory} while it was written: leave that folder "
                    "to the cache."
                ) from None
        finally:
            partial.unlink(missing_ok=True)

    def _write_partial(self, file: RemoteFile, partial: Path) -> None:
        """Write the content of a remote file to `partial`.

        Raises:
            WrongContentError: the content has another size or hash.
        """
        digest, size = hashlib.sha256(), 0
        with partial.open("wb") as copy:
            self._reserve(copy, file, file.bytes or 0)
            for block in read_blocks(file.url):
                copy.write(block)
                digest.update(block)
                size += len(block)
                if file.bytes is not None and size > file.bytes:
                    break  # already wrong, and the stream may be endless
            if file.bytes is None:
                self._reserve(copy, file, size)
        if (size, digest.hexdigest()) != (file.bytes or size, file.sha256):
            raise WrongContentError(
                f"{file.url} has {size} bytes with sha256 {digest.hexdigest()} instead of {file.bytes or size} with "
                f"{file.sha256}: copy the folder there again or prepare the data again."
            )

    def _reserve(self, copy: BinaryIO, file: RemoteFile, size: int) -> None:
        """Wait until `size` bytes fit, then extend a partial file to that size, so that it is counted from the start.

        Raises:
            InputError: the file is larger than the cache.
        """
        if size > self.limit:
            raise InputError(
                f"{file.url} has {size} bytes, more than the limit of {self.directory}: raise data.cache.gib above "
                f"{size / 2**30:.3g}."
            )
        while True:
            with self._capacity_lock():
                if self._evict_for(size - os.fstat(copy.fileno()).st_size):
                    copy.truncate(size)
                    return
            time.sleep(POLL_INTERVAL)  # until other downloads have finished

    def _capacity_lock(self) -> AbstractContextManager[bool]:
        return _exclusive_lock(self.directory / "locks" / "capacity")

    def _evict_for(self, needed: int) -> bool:
        """Evict least recently used copies until `needed` more bytes fit; return False if downloads take the space."""
        copies, total = [], needed
        for path in self.directory.glob("??/*"):
            if path.suffix == PARTIAL:
                with suppress(BlockingIOError), _exclusive_lock(self._lock_path(path), wait=False) as locked:
                    _remove_abandoned(path, locked)
            try:
                status = path.stat()
            except FileNotFoundError:  # removed or renamed in the meantime
                continue
            total += status.st_size
            if not path.suffix:
                copies.append((status.st_mtime_ns, status.st_size, path))
        if total - sum(size for _, size, _ in copies) > self.limit:
            return False
        for _, size, path in sorted(copies):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= size
        return True


class _Prefetcher:
    """Daemon threads of one process that download files until the queue is empty, then end.

    Args:
        fetch: downloads one file; its exceptions are logged and ignored.
    """

    def __init__(self, fetch: Callable[[RemoteFile], object]) -> None:
        self.fetch, self.process = fetch, os.getpid()
        self._queue: dict[str, RemoteFile] = {}  # by sha256, in the order of the requests
        self._threads = 0
        self._lock = threading.Lock()

    def add(self, files: Sequence[RemoteFile]) -> None:
        """Append files to the queue."""
        with self._lock:
            for file in files:
                self._queue.setdefault(file.sha256, file)
            for _ in range(min(PREFETCH_THREADS - self._threads, len(self._queue))):
                threading.Thread(target=self._work, daemon=True).start()
                self._threads += 1

    def _work(self) -> None:
        while (file := self._next()) is not None:
            try:
                self.fetch(file)
            except Exception as error:
                log.debug("%s was not prefetched: %s", file.url, error)

    def _next(self) -> RemoteFile | None:
        with self._lock:
            if self._queue:
                return self._queue.pop(next(iter(self._queue)))
            self._threads -= 1
            return None


def _exists_and_touch(path: Path) -> bool:
    """Return whether a copy exists, and update the time of its last use if that is not recent."""
    try:
        if time.time() - path.stat().st_mtime > USE_TIME_RESOLUTION:
            os.utime(path)
    except OSError:  # other errors of the folder are reported when it is written to
        return False
    return True


def _remove_abandoned(partial: Path, locked: bool) -> None:
    """Remove a partial file whose writer has died.

    Args:
        partial: the partial file.
        locked: whether this thread holds its lock, so that it has no writer. Otherwise its age decides.
    """
    with suppress(FileNotFoundError):
        if locked or time.time() - partial.stat().st_mtime > ABANDONED_AFTER:
            partial.unlink()


@contextmanager
def _exclusive_lock(lock: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file against all other threads of all processes.

    Yields:
        Whether the lock is held; False on a file system without locks.

    Raises:
        BlockingIOError: another thread or process holds it, and `wait` is False.
    """
    with ExitStack() as stack:
        while True:
            try:
                locked = stack.enter_context(_thread_lock(lock))
                break
            except BlockingIOError:
                if not wait:
                    raise
                # Polling instead of a blocking lock: the kernel detects deadlocks between processes, and reports one
                # if threads of two processes wait for each other, although other threads would release the locks.
                time.sleep(POLL_INTERVAL)
        yield locked


_lock_owners: dict[Path, object] = {}  # by the lock files that threads of this process hold
os.register_at_fork(after_in_child=_lock_owners.clear)  # a fork does not copy the threads that hold them


@contextmanager
def _thread_lock(lock: Path) -> Iterator[bool]:
    """Hold a lock file as `process_lock`, and against other threads of this process too."""
    # A record lock belongs to the process and is lost when any of its threads closes the file: only one may open it.
    thread = object()
    if _lock_owners.setdefault(lock, thread) is not thread:  # atomic; a mutex could stay locked in a forked child
        raise BlockingIOError(f"{lock} is held by another thread")
    try:
        with process_lock(lock) as locked:
            yield locked
    finally:
        _lock_owners.pop(lock, None)
