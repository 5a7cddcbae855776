"""Reading of remote files, block by block."""

import asyncio
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from fsspec import AbstractFileSystem
from upath import UPath

from gpdit_lightning.errors import InputError, TransientError

BLOCK_BYTES = 2**22  # most bytes per read
SLOW_SECONDS = 20.0  # of waiting, after each of which the rate is checked
LEAST_BYTES_PER_SECOND = 1024
SILENT_SECONDS = 30.0  # without data, after which a reply over HTTP is given up
HEADER_SECONDS = 60.0  # until all headers of a reply over HTTP must have arrived
PERMANENT_STATUSES = (401, 403, 405, 407, 410, 414, 451)  # of HTTP, besides 404; aiohttp calls broken replies 400


@dataclass(frozen=True)
class RemoteFile:
    """A remote file and the hash and size that a copy of it must have."""

    url: str
    """Any address that fsspec reads."""
    sha256: str
    """Hash of its bytes, in hexadecimal digits."""
    bytes: int | None = None
    """Its size; None if unknown. The cache then reserves space for the file only after the download."""


class FailedDownloadError(TransientError):
    """A remote file could not be read or has the wrong content; another attempt may succeed."""

    is_download = True


class WrongContentError(FailedDownloadError):
    """A remote file was read and has another size or hash than its manifest records."""


def read_blocks(url: str, most: int | None = None) -> Iterator[bytes]:
    """Yield the content of a remote file, block by block.

    Args:
        url: any address that fsspec reads.
        most: the largest size in bytes that is read; None if the caller ends a reply that is too long.

    Raises:
        FailedDownloadError: the file cannot be read for a reason that may pass.
        InputError: the file does not exist, may not be read, or is larger than `most`, or the package for its protocol
            is not installed.
    """
    try:
        # Built from the text each time: a filesystem object of the parent process does not work after a fork.
        path = UPath(url, **HTTP_OPTIONS) if url.startswith(("http://", "https://")) else UPath(url)
        _filesystems.add(path.fs)
        size = 0
        with path.open("rb") as file:
            for block in _not_too_slow(file, url):
                size += len(block)
                if most is not None and size > most:
                    raise InputError(f"{url} has more than {most} bytes, the most that such a file may have: check it.")
                yield block
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"{url} needs a package that is not installed ({error}): install it with pip.") from None
    except Exception as error:  # each protocol has its own exceptions
        raise _download_error(error, url) from None


def _not_too_slow(file: Any, url: str) -> Iterator[bytes]:
    """Yield the blocks of an open remote file; raise FailedDownloadError if they arrive too slowly."""
    waited, received = 0.0, 0
    while True:
        start = time.monotonic()
        block = file.read(BLOCK_BYTES)
        waited, received = waited + time.monotonic() - start, received + len(block)
        if not block:
            return
        yield block
        if waited > SLOW_SECONDS:
            if received < SLOW_SECONDS * LEAST_BYTES_PER_SECOND:
                raise FailedDownloadError(
                    f"{url} arrives at {received / waited:.0f} bytes per second: check the server and the network."
                )
            waited, received = 0.0, 0


def _download_error(error: Exception, url: str) -> InputError:
    """Return the error to raise for an exception of fsspec."""
    # Over HTTP, fsspec raises FileNotFoundError for every failure, with the actual error as its cause.
    reason = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    status = getattr(reason, "status", None)
    if isinstance(reason, FileNotFoundError) or status == 404:
        return InputError(f"{url} does not exist: check the address, or copy the file there.")
    description = ": ".join(filter(None, (type(reason).__name__, " ".join(str(reason).split()))))
    message = f"{url} cannot be read ({description}): check the address, the network and your access rights."
    if isinstance(reason, PermissionError) or (isinstance(status, int) and status in PERMANENT_STATUSES):
        return InputError(message)
    failure = FailedDownloadError(message)
    failure.requested_wait = _requested_wait(getattr(reason, "headers", None) or {})
    return failure


def _requested_wait(headers: Mapping[str, str]) -> float:
    """Return the seconds that a reply requests by `Retry-After`, a number or a date; 0 without it."""
    text = headers.get("Retry-After", "")
    if text.isdecimal():
        return float(text[:9])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0


# Never freed. If a forked child freed a filesystem that its parent uses, it would close the parent's connections in the
# event loop that both share, and the parent would wait for their bytes forever.
_filesystems: set[AbstractFileSystem] = set()


async def _http_client(**settings: Any) -> Any:
    """Return an HTTP client that limits the time without data instead of the total time (aiohttp: five minutes).

    A server that sends headers byte by byte, or one interim reply after another, is never without data, so the time
    of all headers has a limit too.
    """
    # Installed with fsspec[http]; needed for this protocol only.
    from aiohttp import ClientResponse, ClientSession, ClientTimeout

    class BoundedResponse(ClientResponse):
        async def start(self, connection: Any) -> ClientResponse:
            async with asyncio.timeout(HEADER_SECONDS):
                return await super().start(connection)

    limits: dict[str, Any] = {
        "timeout": ClientTimeout(total=None, sock_connect=30, sock_read=SILENT_SECONDS),
        "response_class": BoundedResponse,
    }
    return ClientSession(**limits | settings)


# One request for the whole file (block size 0), since not every server supports ranges.
HTTP_OPTIONS: dict[str, Any] = {"block_size": 0, "get_client": _http_client}
