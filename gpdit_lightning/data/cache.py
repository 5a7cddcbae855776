"""Local copies of remote files: whole, proven, bounded in their total size, shared by all processes of a machine.

A copy is named by its sha256, so runs and manifests that mean the same bytes share it without knowing of each other.

    CACHE/ab/ab12...                 a copy; its time of change is the time of its last use
    CACHE/ab/ab12....TOKEN.partial   what is being downloaded, at its full size from the start
    CACHE/locks/ab1                  held by the one thread that downloads a file whose name begins so
    CACHE/locks/room                 held while files are counted, and while one takes its name

Lock files are never removed, as whoever has opened one by then would hold what no other finds. So they are few, and now
and then a download waits for another that it has nothing to do with. Where a file system knows no locks, a file may be
downloaded twice, and for moments the copies may take more space than they should.
"""

import errno
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

from gpdit_lightning.data.remote import FailedDownloadError, RemoteFile, remote_blocks
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import flush, process_lock, sha256_of

log = logging.getLogger(__name__)

T = TypeVar("T")

PARTIAL = ".partial"
PAUSES = (1.0, 4.0)  # seconds before the second and the third attempt at a download
POLL = 0.05  # seconds between two looks at what others do
FRESH = 10.0  # seconds within which a copy's last use is not noted again
ABANDONED = 60.0  # seconds without a write after which a partial file has no writer, where locks cannot tell
THREADS = 2  # that download ahead of use, in each process
OPENINGS = 10  # times a copy is fetched that others evict before it is opened
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class CacheConfig:
    """Where copies of remote shards are kept; sources on this machine need none."""

    directory: str = "~/.cache/gpdit_lightning/shards"
    """Folder on a local disk; several runs may share it."""
    gib: float = 100.0
    """Most space the copies take together, in GiB; what was used least recently makes room."""

    def open(self) -> "ShardCache":
        """The cache; raises as `ShardCache`."""
        return ShardCache(Path(self.directory).expanduser(), self.gib)


class ShardCache:
    """Copies of remote files in one folder. Any number of processes and threads may use it at once.

    It may be pickled and forked: what belongs to one process is made there, at first use.

    Args:
        directory: the folder, on a local disk; made when it is not there.
        gib: most space for copies and running downloads, in GiB.

    Raises:
        InputError: a bound that is not positive, or a folder that cannot be made.
    """

    def __init__(self, directory: Path, gib: float) -> None:
        if not gib > 0:
            raise InputError(f"data.cache.gib is {gib}; it must be above 0.")
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{directory} cannot be a folder for copies of shards ({error.strerror}): give data.cache.directory "
                "another."
            ) from None
        self.directory, self.limit = directory, int(gib * 2**30)
        self._prefetcher: _Prefetcher | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prefetcher": None}

    def fetch(self, file: RemoteFile) -> Path:
        """The local copy of a file, downloaded if it is not there, by this process or by another that is at it.

        Others may evict it at any time: open it at once, or through `use`. Once open, it stays readable.

        Raises:
            InputError: the file cannot be read or is not what it should be, at three attempts; it is larger than the
                cache; the disk is full; the folder cannot be written.
        """
        return self._fetch(file, wait=True)

    def use(self, file: RemoteFile, read: Callable[[Path], T]) -> T:
        """What `read` makes of the local copy, which is fetched again should it be gone before `read` opens it.

        Raises:
            InputError: as `fetch`; or others evict the copy again and again, so the cache is too small for them all.
        """
        for _ in range(OPENINGS):
            path = self.fetch(file)
            try:
                return read(path)
            except FileNotFoundError:
                continue
        raise InputError(
            f"{file.url} was evicted from {self.directory} {OPENINGS} times before it could be opened: raise "
            "data.cache.gib, which is too small for so many readers."
        )

    def drop_if_damaged(self, file: RemoteFile) -> bool:
        """Remove the copy if its bytes are not, or no longer, what they should be; returns whether it was removed."""
        path = self._path(file)
        try:
            if sha256_of(path) == file.sha256:
                return False
        except FileNotFoundError:
            return False
        except OSError:  # the disk cannot read it back
            pass
        log.warning("The copy of %s at %s is damaged and will be fetched again.", file.url, path)
        path.unlink(missing_ok=True)
        return True

    def prefetch(self, files: Sequence[RemoteFile]) -> None:
        """Bring files in the background, in this order, behind those asked for earlier; returns at once.

        Asking again for the same files costs next to nothing. Failures are left to the reader that needs the file, and
        what another process is bringing is left to it. Ask for less than the cache holds, or the files that come last
        evict those that are needed first.
        """
        missing = [file for file in files if not _used(self._path(file))]
        if not missing:
            return
        if self._prefetcher is None or self._prefetcher.process != os.getpid():  # threads stay behind at a fork
            self._prefetcher = _Prefetcher(lambda file: self._fetch(file, wait=False))
        self._prefetcher.add(missing)

    def _path(self, file: RemoteFile) -> Path:
        return self.directory / file.sha256[:2] / file.sha256

    def _lock_of(self, path: Path) -> Path:
        """The lock file of a copy or of a partial file."""
        return self.directory / "locks" / path.name[:3]

    def _fetch(self, file: RemoteFile, wait: bool) -> Path:
        """`fetch`; without `wait`, a BlockingIOError where another thread of any process downloads the file."""
        path = self._path(file)
        if not _used(path):
            with self._writing(file), _held(self._lock_of(path), wait) as alone:
                for partial in path.parent.glob(f"{path.name}.*{PARTIAL}"):
                    _remove_leftover(partial, alone)
                if not path.exists():  # else another was at it until now
                    self._download(file, path)
        return path

    @contextmanager
    def _writing(self, file: RemoteFile) -> Iterator[None]:
        """Say what is wrong with the folder when the block cannot write there."""
        try:
            yield
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno in FULL:
                raise InputError(
                    f"{self.directory} has no room left for {file.url} ({error.strerror}): free space on that disk, "
                    "lower data.cache.gib, or give data.cache.directory a folder on another."
                ) from None
            raise InputError(
                f"{self.directory} takes no copy of {file.url} ({error}): give data.cache.directory a folder that can "
                "be written."
            ) from None

    def _download(self, file: RemoteFile, path: Path) -> None:
        for pause in PAUSES:
            try:
                return self._attempt(file, path)
            except FailedDownloadError as error:
                if not threading.main_thread().is_alive():  # the program is ending, and fsspec has closed connections
                    raise
                log.warning("%s Trying again in %g s.", error, pause)
                time.sleep(pause)
        return self._attempt(file, path)

    def _attempt(self, file: RemoteFile, path: Path) -> None:
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
        digest, size = hashlib.sha256(), 0
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as copy:
                self._reserve(copy, file, file.bytes or 0)
                for block in remote_blocks(file.url):
                    copy.write(block)
                    digest.update(block)
                    size += len(block)
                    if file.bytes is not None and size > file.bytes:
                        break  # wrong, and there may be no end of it
                if file.bytes is None:
                    self._reserve(copy, file, size)
            if (size, digest.hexdigest()) != (file.bytes or size, file.sha256):
                raise FailedDownloadError(
                    f"{file.url} came as {size} bytes with sha256 {digest.hexdigest()} instead of "
                    f"{file.bytes or size} with {file.sha256}: copy the folder there again or prepare the data again."
                )
            try:
                flush(partial)
                with self._room():  # who counts the files must not meet this one by neither name
                    partial.replace(path)
            except FileNotFoundError:  # without locks, a download that hangs looks abandoned
                raise FailedDownloadError(
                    f"The copy of {file.url} was removed from {self.directory} while it was written: leave that folder "
                    "to the cache."
                ) from None
        finally:
            partial.unlink(missing_ok=True)

    def _reserve(self, copy: BinaryIO, file: RemoteFile, size: int) -> None:
        """Give a partial file its full size, so that it counts before its bytes come, once there is room for it."""
        if size > self.limit:
            raise InputError(
                f"{file.url} has {size} bytes, more than all of {self.directory} may hold: raise data.cache.gib above "
                f"{size / 2**30:.3g}."
            )
        while True:
            with self._room():
                if self._make_room(size - os.fstat(copy.fileno()).st_size):
                    copy.truncate(size)
                    return
            time.sleep(POLL)  # until others have finished what they download

    def _room(self) -> AbstractContextManager[bool]:
        return _held(self.directory / "locks" / "room")

    def _make_room(self, needed: int) -> bool:
        """Remove what was used least recently until `needed` bytes more fit; False while downloads take the room."""
        copies, total = [], needed
        for path in self.directory.glob("??/*"):
            if path.suffix == PARTIAL:
                with suppress(BlockingIOError), _held(self._lock_of(path), wait=False) as alone:
                    _remove_leftover(path, alone)
            try:
                status = path.stat()
            except FileNotFoundError:  # removed, or given its name, meanwhile
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
    """Daemon threads of one process that bring files until none is left; then they end.

    Args:
        bring: downloads one file; whatever it raises is ignored.
    """

    def __init__(self, bring: Callable[[RemoteFile], object]) -> None:
        self.bring, self.process = bring, os.getpid()
        self._waiting: dict[str, RemoteFile] = {}  # by sha256, in the order they were asked for
        self._threads = 0
        self._lock = threading.Lock()

    def add(self, files: Sequence[RemoteFile]) -> None:
        """Bring these too, behind the others."""
        with self._lock:
            for file in files:
                self._waiting.setdefault(file.sha256, file)
            for _ in range(min(THREADS - self._threads, len(self._waiting))):
                threading.Thread(target=self._work, daemon=True).start()
                self._threads += 1

    def _work(self) -> None:
        while (file := self._next()) is not None:
            try:
                self.bring(file)
            except Exception as error:
                log.debug("%s is not brought ahead of use: %s", file.url, error)

    def _next(self) -> RemoteFile | None:
        with self._lock:
            if self._waiting:
                return self._waiting.pop(next(iter(self._waiting)))
            self._threads -= 1
            return None


def _used(path: Path) -> bool:
    """Whether a copy is there; if so, its use is noted, though not at every sample."""
    try:
        if time.time() - path.stat().st_mtime > FRESH:
            os.utime(path)
    except OSError:  # whatever is wrong with the folder shows when it is written
        return False
    return True


def _remove_leftover(partial: Path, alone: bool) -> None:
    """Remove a partial file whose writer is gone.

    Args:
        partial: the file.
        alone: whether its lock is really held here, so that it has no writer; else it is left for a while.
    """
    with suppress(FileNotFoundError):
        if alone or time.time() - partial.stat().st_mtime > ABANDONED:
            partial.unlink()


@contextmanager
def _held(lock: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file against all other threads of all processes.

    Yields:
        Whether it really is held: on a file system that knows no locks it is not.

    Raises:
        BlockingIOError: another holds it, and `wait` is False.
    """
    with ExitStack() as stack:
        while True:
            try:
                really = stack.enter_context(_held_by_one_thread(lock))
                break
            except BlockingIOError:
                if not wait:
                    raise
                # Not left to the kernel: it takes two processes, threads of which wait for each other's locks, for a
                # deadlock, and knows nothing of threads that go on.
                time.sleep(POLL)
        yield really


_holders: dict[Path, object] = {}  # lock files that this process holds
os.register_at_fork(after_in_child=_holders.clear)  # the threads that hold them stay behind


@contextmanager
def _held_by_one_thread(lock: Path) -> Iterator[bool]:
    # A record lock belongs to the process, and is lost when any thread of it closes the file: so only one may open it.
    thread = object()
    if _holders.setdefault(lock, thread) is not thread:  # one step, which needs no lock that a fork could tear apart
        raise BlockingIOError(f"{lock} is held by another thread")
    try:
        with process_lock(lock) as really:
            yield really
    finally:
        _holders.pop(lock, None)
