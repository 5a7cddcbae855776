"""Distinction between damaged files and failures of the machine, and repeated attempts after the latter."""

import errno
import logging
import re
import time
from collections.abc import Callable, Iterator
from functools import wraps
from itertools import islice
from typing import ParamSpec, TypeVar

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
OUT_OF_MEMORY = re.compile("out of memory|not enough memory|(can't|cannot|unable to) allocate", re.IGNORECASE)


def transient_error(error: BaseException, name: object) -> TransientError | None:
    """Return the error to raise instead of calling a file damaged; None if its content may be the reason.

    Memory that FFmpeg lacks is a :class:`TransientError` and no :class:`ResourceError`, because a damaged file can make
    FFmpeg request any amount.

    Args:
        error: exception of any library that read the file.
        name: the file, for the message.
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
        cure = CURES.get(number, "check its disk or the network")
        return TransientError(
            f"{name} could not be read ({reason or type(error).__name__}): {cure}, and run the same command again."
        )
    return None


def memory_error(error: BaseException) -> ResourceError | None:
    """Return the error to raise if an exception of a library states that memory ran out, on any device; else None."""
    reason = next(iter(str(error).strip().splitlines()), "")
    if not isinstance(error, MemoryError) and not (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(reason)):
        return None
    return ResourceError(
        f"memory ran out{f' ({reason})' if reason else ''}: use smaller batches or fewer workers, or free memory, and "
        "run the same command again."
    )


def retried(read: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function such that it is called again, at most twice, after a `TransientError`."""

    @wraps(read)
    def attempt(*args: P.args, **kwargs: P.kwargs) -> T:
        for delay in (*RETRY_DELAYS, None):
            try:
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
        count = 0
        for delay in (*RETRY_DELAYS, None):
            try:
                for item in islice(iterate(*args, **kwargs), count, None):
                    count += 1
                    yield item
                return
            except TransientError as error:
                _wait_or_raise(error, delay)

    return attempt


def _wait_or_raise(error: TransientError, delay: float | None) -> None:
    """Wait before the next attempt; raise the error if there is none, or if an inner function has already retried."""
    if delay is None or error.retried:
        error.retried = True
        raise error
    log.warning("another attempt follows in %g s: %s", delay, error)
    time.sleep(delay)
