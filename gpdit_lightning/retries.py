"""Distinction between damaged files and failures that may pass, and the policy for repeated attempts.

Reading a local file is attempted three times, `RETRY_DELAYS` apart, if an error of `TRANSIENT_ERRORS` occurs or a read
ends before the end of the file.

A download is attempted three times, `DOWNLOAD_DELAYS` apart or as the server requests by `Retry-After` (at most
`MAX_WAIT`), after any failure that is not permanent, such as status 404: after another status, a connection that ends,
60 s without all headers, 30 s without data, 20 s with less than 1 KiB per second, or a content of another size or hash
than its manifest records.

Writing is attempted once, since the state of a file after a failed write or flush is unknown. The file is discarded.

When all attempts have failed, a failure that may pass is raised as a `TransientError` or a `ResourceError`. It ends the
command with one sentence; what was complete stays, and the same command resumes. It is never taken for damage. Damage
does not pass, so it is not repeated: a damaged sample is replaced and counted (`health.max_damaged_samples`), and a
damaged copy of a remote file is removed and downloaded again.
"""

import errno
import logging
import mmap
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from gpdit_lightning.errors import InputError, ResourceError, TransientError, file_of
from gpdit_lightning.files import DISK_FULL_ERRORS

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

ATTEMPTS = 3
RETRY_DELAYS = (0.2, 1.0)  # seconds before the second and the third attempt
DOWNLOAD_DELAYS = (1.0, 4.0)  # the same for a download
MAX_WAIT = 30.0  # seconds: the longest wait that a server may request

# Errors of the system that do not arise from the content of a file.
RESOURCE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, *DISK_FULL_ERRORS)
TRANSIENT_ERRORS = (
    *(errno.EIO, errno.ESTALE, errno.EINTR, errno.EAGAIN, errno.ETIMEDOUT, errno.EBUSY, errno.ENOLCK, errno.ENODEV),
    *(errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENOTCONN, errno.EPIPE),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    *(errno.EACCES, errno.ENOMEM),
)
NOT_WRITABLE_ERRORS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
CURES: dict[int | None, str] = {
    errno.ENOMEM: "free memory, or use fewer workers",
    errno.EACCES: "change its permissions",
}
RUST_ERROR = re.compile(r"\(os error (\d+)\)")
AMPLE_MEMORY = 2**30  # bytes; a video that needs more at once is damaged, or too large for this machine
CHUNK = 2**20  # bytes that are read at a time
OUT_OF_MEMORY = re.compile("out of memory|not enough memory|(can't|cannot|unable to) allocate", re.IGNORECASE)


_is_last_attempt: ContextVar[bool] = ContextVar("_is_last_attempt", default=False)


def transient_error(error: BaseException, name: object, file: Path | None = None) -> TransientError | None:
    """Return the error to raise instead of calling a file damaged; None if its content may be the reason.

    Memory that FFmpeg lacks is a :class:`TransientError` and no :class:`ResourceError`, because a damaged file can make
    FFmpeg request any amount.

    Args:
        error: exception of any library that read the file.
        name: the file, for the message.
        file: the file, if the library also raises errors of the system for damaged content, as FFmpeg does. Its content
            is the reason if the last of several attempts fails too, although all bytes can be read and memory is ample.
    """
    if isinstance(error, TransientError):
        return error
    number = getattr(error, "errno", None)
    if in_rust := RUST_ERROR.search(str(error)):  # of safetensors
        number = int(in_rust[1])
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    no_memory = isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))
    if no_memory or (isinstance(error, MemoryError) and number is None):
        return ResourceError(
            f"{name} could not be read, since memory ran out{f' ({reason})' if reason else ''}: use fewer workers or "
            "smaller batches, or free memory, and run the same command again."
        )
    if number in RESOURCE_ERRORS:
        return ResourceError(
            f"{name} could not be read ({reason}): use fewer workers, or raise that limit of the machine, and run the "
            "same command again."
        )
    if number in TRANSIENT_ERRORS or isinstance(error, (ConnectionError, TimeoutError, InterruptedError)):
        if file is not None and _is_last_attempt.get() and _is_content_to_blame(file, number):
            return None
        cure = CURES.get(number, "check its disk or the network")
        return TransientError(
            f"{name} could not be read ({reason or type(error).__name__}): {cure}, and run the same command again."
        )
    return None


def _is_content_to_blame(file: Path, number: int | None) -> bool:
    """Return whether the machine can do what a library failed to do: allocate memory, or read all bytes of a file."""
    try:
        if number == errno.ENOMEM:
            mmap.mmap(-1, AMPLE_MEMORY).close()
            return True
        with open(file, "rb", buffering=0) as opened:
            while opened.read(CHUNK):
                pass
        return True
    except OSError:
        return False


@contextmanager
def explain_write_errors(folder: Path, kept: str = "") -> Iterator[None]:
    """Convert the errors of a file system in the block that writes to a folder.

    Args:
        folder: the folder.
        kept: a sentence about what a failure leaves, for the message.

    Raises:
        ResourceError: the disk is full.
        TransientError: writing failed for another reason that may pass, such as an I/O error.
        InputError: the folder is not writable.
    """
    try:
        yield
    except OSError as error:
        path, end = file_of(error, str(folder)), f" {kept}" if kept else ""
        if error.errno in DISK_FULL_ERRORS:
            raise ResourceError(
                f"{folder} has no space left ({error.strerror}): free some space and run the same command again.{end}"
            ) from None
        if error.errno in NOT_WRITABLE_ERRORS:
            raise InputError(
                f"{path} cannot be written to ({error.strerror}): give another --out or change the permissions.{end}"
            ) from None
        if error.errno in TRANSIENT_ERRORS:
            raise TransientError(
                f"{path} could not be written or read ({error.strerror}): check its disk or the network, and run the "
                f"same command again.{end}"
            ) from None
        raise


def memory_error(error: BaseException, less_memory: str | None = None) -> ResourceError | None:
    """Return the error to raise if an exception of a library states that memory ran out, on any device; else None.

    Args:
        error: the exception.
        less_memory: what the user can change so that less memory is needed; None: batches or workers.
    """
    less_memory = less_memory or "use smaller batches or fewer workers"
    reason = next(iter(str(error).strip().splitlines()), "")
    if not isinstance(error, MemoryError) and not (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(reason)):
        return None
    return ResourceError(
        f"memory ran out{f' ({reason})' if reason else ''}: {less_memory}, or free memory, and run the command again."
    )


@contextmanager
def _attempt(number: int) -> Iterator[None]:
    """Within the block, `transient_error` finds out whether the content of a file is the reason if this is the last.

    After a `TransientError` of the block, wait for the next attempt. The error is raised if there is none, if an inner
    function has already repeated its attempts, or if the program is ending.
    """
    token = _is_last_attempt.set(number == ATTEMPTS - 1)
    try:
        yield
    except TransientError as error:
        if number == ATTEMPTS - 1 or error.retried or not threading.main_thread().is_alive():
            error.retried = True
            raise
        delays = DOWNLOAD_DELAYS if error.is_download else RETRY_DELAYS
        wait = max(delays[number], min(error.requested_wait, MAX_WAIT))
        log.warning("another attempt follows in %g s: %s", wait, error)
        time.sleep(wait)
    finally:
        _is_last_attempt.reset(token)


def retried(read: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function such that it is called again, at most twice, after a `TransientError`."""

    @wraps(read)
    def attempt(*args: P.args, **kwargs: P.kwargs) -> T:
        for number in range(ATTEMPTS):
            with _attempt(number):
                return read(*args, **kwargs)
        raise AssertionError("unreachable")

    return attempt


def retried_iterator(iterate: Callable[P, Iterator[T]]) -> Callable[P, Iterator[T]]:
    """Decorate a generator function such that it starts again, at most twice, after a `TransientError`.

    The items that were already yielded are generated again and dropped, so they must be the same every time.
    """

    @wraps(iterate)
    def attempt(*args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        yielded = attempts = 0
        items, number = iterate(*args, **kwargs), 0
        while True:
            item: Any = _FAILED
            with _attempt(attempts):
                item = next(items, _END)
            if item is _END:
                return
            if item is _FAILED:
                items, number = iterate(*args, **kwargs), 0
                attempts += 1
                continue
            number += 1
            if number > yielded:
                yielded = number
                yield item

    return attempt


_END: Any = object()
_FAILED: Any = object()
