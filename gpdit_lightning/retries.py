"""Distinction between damaged files and failures of the machine, and repeated attempts after the latter."""

import errno
import logging
import mmap
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from gpdit_lightning.errors import ResourceError, TransientError
from gpdit_lightning.files import DISK_FULL_ERRORS

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

RETRY_DELAYS = (0.2, 1.0)  # seconds before the second and the third attempt

# Errors of the system that do not arise from the content of a file.
RESOURCE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, *DISK_FULL_ERRORS)
TRANSIENT_ERRORS = (
    *(errno.EIO, errno.ESTALE, errno.EINTR, errno.EAGAIN, errno.ETIMEDOUT, errno.EBUSY, errno.ENOLCK, errno.ENODEV),
    *(errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENOTCONN, errno.EPIPE),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    *(errno.EACCES, errno.ENOMEM),
)
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


def memory_error(error: BaseException) -> ResourceError | None:
    """Return the error to raise if an exception of a library states that memory ran out, on any device; else None."""
    reason = next(iter(str(error).strip().splitlines()), "")
    if not isinstance(error, MemoryError) and not (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(reason)):
        return None
    return ResourceError(
        f"memory ran out{f' ({reason})' if reason else ''}: use smaller batches or fewer workers, or free memory, and "
        "run the same command again."
    )


@contextmanager
def _attempt(is_last: bool) -> Iterator[None]:
    """Within the block, `transient_error` finds out whether the content of a file is the reason if this is the last."""
    token = _is_last_attempt.set(is_last)
    try:
        yield
    finally:
        _is_last_attempt.reset(token)


def retried(read: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function such that it is called again, at most twice, after a `TransientError`."""

    @wraps(read)
    def attempt(*args: P.args, **kwargs: P.kwargs) -> T:
        for delay in (*RETRY_DELAYS, None):
            try:
                with _attempt(is_last=delay is None):
                    return read(*args, **kwargs)
            except TransientError as error:
                _wait_or_raise(error, delay)
        raise AssertionError("unreachable")

    return attempt


def retried_iterator(iterate: Callable[P, Iterator[T]]) -> Callable[P, Iterator[T]]:
    """Decorate a generator function such that it starts again, at most twice, after a `TransientError`.

    The items that were already yielded are generated again and dropped, so they must be the same every time.
    """

    @wraps(iterate)
    def attempt(*args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        yielded = 0
        for delay in (*RETRY_DELAYS, None):
            try:
                items, number = iterate(*args, **kwargs), 0
                while True:
                    with _attempt(is_last=delay is None):
                        item = next(items, _END)
                    if item is _END:
                        return
                    number += 1
                    if number > yielded:
                        yielded = number
                        yield item
            except TransientError as error:
                _wait_or_raise(error, delay)

    return attempt


_END: Any = object()


def _wait_or_raise(error: TransientError, delay: float | None) -> None:
    """Wait before the next attempt; raise the error if there is none, or if an inner function has already retried."""
    if delay is None or error.retried:
        error.retried = True
        raise error
    log.warning("another attempt follows in %g s: %s", delay, error)
    time.sleep(delay)
