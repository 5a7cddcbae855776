"""Reading of remote files, block by block."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fsspec import AbstractFileSystem
from upath import UPath

from gpdit_lightning.errors import InputError

BLOCK_BYTES = 2**22  # most bytes per read


@dataclass(frozen=True)
class RemoteFile:
    """A remote file and the hash and size that a copy of it must have."""

    url: str
    """Any address that fsspec reads."""
    sha256: str
    """Hash of its bytes, in hexadecimal digits."""
    bytes: int | None = None
    """Its size; None if unknown. The cache then reserves space for the file only after the download."""


class FailedDownloadError(InputError):
    """A remote file could not be read or has the wrong content; another attempt may succeed."""


def read_blocks(url: str) -> Iterator[bytes]:
    """Yield the content of a remote file, block by block.

    Args:
        url: any address that fsspec reads.

    Raises:
        FailedDownloadError: the file cannot be read, for whatever reason.
        InputError: the package for its protocol is not installed.
    """
    try:
        # Built from the text each time: a filesystem object of the parent process does not work after a fork.
        path = UPath(url, **HTTP_OPTIONS) if url.startswith(("http://", "https://")) else UPath(url)
        _filesystems.add(path.fs)
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                yield block
    except ImportError as error:
        raise InputError(f"{url} needs a package that is not installed ({error}): install it with pip.") from None
    except Exception as error:  # each protocol has its own exceptions
        # Over HTTP, fsspec raises FileNotFoundError for every failure, with the actual error as its cause.
        reason = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
        if isinstance(reason, FileNotFoundError) or getattr(reason, "status", None) == 404:
            raise FailedDownloadError(f"{url} does not exist: check the address, or copy the file there.") from None
        raise FailedDownloadError(
            f"{url} cannot be read ({type(reason).__name__}: {reason}): check the address, the network and your "
            "access rights."
        ) from None


# Never freed. If a forked child freed a filesystem that its parent uses, it would close the parent's connections in the
# event loop that both share, and the parent would wait for their bytes forever.
_filesystems: set[AbstractFileSystem] = set()


async def _http_client(**settings: Any) -> Any:
    """Return an HTTP client that limits the time without data instead of the total time (aiohttp: five minutes)."""
    from aiohttp import ClientSession, ClientTimeout  # installed with fsspec[http]; needed for this protocol only

    return ClientSession(**{"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)} | settings)


# One request for the whole file (block size 0), since not every server supports ranges.
HTTP_OPTIONS: dict[str, Any] = {"block_size": 0, "get_client": _http_client}
