"""Files that lie elsewhere: where, what they must be, and their content, block by block."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fsspec import AbstractFileSystem
from upath import UPath

from gpdit_lightning.errors import InputError

BLOCK = 2**22  # most bytes read at a time


@dataclass(frozen=True)
class RemoteFile:
    """A file somewhere else, and what its copy must be."""

    url: str
    """Any address that fsspec reads."""
    sha256: str
    """Of its bytes, in hexadecimal digits."""
    bytes: int | None = None
    """Its size; where that is not known, room is made for the file only once it is here."""


class FailedDownloadError(InputError):
    """A remote file could not be read, or was not what it should be; another attempt may go well."""


def remote_blocks(url: str) -> Iterator[bytes]:
    """The content of a remote file, block by block.

    Args:
        url: any address that fsspec reads.

    Raises:
        FailedDownloadError: it cannot be read, for whatever reason.
        InputError: the package for its protocol is not installed.
    """
    try:
        # From the text, not from a path that was used before: a filesystem of the parent is of no use after a fork.
        path = UPath(url, **HTTP_OPTIONS) if url.startswith(("http://", "https://")) else UPath(url)
        _filesystems.add(path.fs)
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                yield block
    except ImportError as error:
        raise InputError(f"{url} needs a package that is not installed ({error}): install it with pip.") from None
    except Exception as error:  # each protocol has its own
        # Over HTTP, fsspec says "not found" of everything that goes wrong, and keeps the reason as the cause.
        reason = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
        if isinstance(reason, FileNotFoundError) or getattr(reason, "status", None) == 404:
            raise FailedDownloadError(f"{url} does not exist: look at the address, or copy the file there.") from None
        raise FailedDownloadError(
            f"{url} cannot be read ({type(reason).__name__}: {reason}): look at the address, the network and your "
            "rights of access."
        ) from None


# They live as long as the process. Were one that the parent used freed in a forked child, it would close the parent's
# connections in the event loop that the two share, and the parent would wait for their bytes forever.
_filesystems: set[AbstractFileSystem] = set()


async def _patient_client(**settings: Any) -> Any:
    """An HTTP client with a limit on silence, not on a download, which aiohttp breaks off after five minutes."""
    from aiohttp import ClientSession, ClientTimeout  # comes with fsspec[http]; only this protocol needs it

    return ClientSession(**{"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)} | settings)


# One request for the whole file (a block size of 0), as not every server knows ranges.
HTTP_OPTIONS: dict[str, Any] = {"block_size": 0, "get_client": _patient_client}
