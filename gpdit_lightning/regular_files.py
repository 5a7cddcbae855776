"""Reading of files from others: regular files only, within their size or a stated limit; their hashes and lines."""

import codecs
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from gpdit_lightning.errors import InputError

READ_BYTES = 2**22  # at a time
MAX_TEXT_BYTES = 2**26  # of a recipe, a card or a table
REPLACE_IT = "replace it by one"

# Marks at the beginning of files in encodings other than UTF-8; that of UTF-32 begins with that of UTF-16.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def check_regular(path: str | Path, cure: str = REPLACE_IT) -> None:
    """Check a file before a library opens it by its path.

    Args:
        path: the file.
        cure: what the user should do, for the message.

    Raises:
        InputError: it is not a regular file, such as a pipe, which would wait for a writer, or a device, which may have
            no end.
        OSError: it does not exist or cannot be found.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise InputError(f"{path} is not a regular file, but a folder, a pipe, a socket or a device: {cure}.")


Identity = tuple[int, ...]


def identity_of(status: os.stat_result) -> Identity:
    """Return what differs once a file is changed or replaced: size, times of change, inode and device."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev


def open_regular(path: str | Path, flags: int = os.O_RDONLY, cure: str = REPLACE_IT) -> io.FileIO:
    """Open a file without a buffer, to read it or with `os.O_RDWR` to change it.

    Args:
        path: the file.
        flags: those of `os.open`.
        cure: what the user should do, for the message.

    Raises:
        InputError, OSError: as by :func:`check_regular`.
    """
    if not flags & os.O_CREAT or os.path.exists(path):
        check_regular(path, cure)
    mode = "rb" if flags == os.O_RDONLY else "rb+"
    return io.FileIO(path, mode, opener=lambda name, _: os.open(name, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666))


class BoundedReader(io.BufferedReader):
    """Reader that never allocates more than the size of its file, for libraries that read as much as a header states.

    Args:
        path: the file.
        cure: what the user should do if it is not a regular file, for the message.

    Raises:
        InputError: it is not a regular file.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, cure: str = REPLACE_IT) -> None:
        super().__init__(open_regular(path, cure=cure))
        self.size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """Read at most `size` bytes; all that are left if it is None or negative."""
        left = max(0, self.size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def read_bounded(path: Path, most: int = MAX_TEXT_BYTES) -> bytes:
    """Return the content of a regular file.

    Args:
        path: the file.
        most: the largest size in bytes that is read; by default that of a text which people read.

    Raises:
        InputError: it is larger, or not a regular file.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        size, blocks = os.fstat(file.fileno()).st_size, list[bytes]()
        while size <= most and (block := file.read(min(READ_BYTES, most + 1))):
            blocks.append(block)
            size = max(size, sum(map(len, blocks)))  # the file may grow, or be of a system that states no size
        if size > most:
            raise InputError(f"{path} has {size} bytes, more than the {most} that such a file may have: replace it.")
        return b"".join(blocks)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal digits; raises as `open_regular`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_lines(path: Path, expected: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file, each with its line break, and their numbers from 1.

    Only a line feed ends a line, since file names and captions may contain other separators, such as U+2028. A byte
    order mark is removed.

    Args:
        path: the file.
        expected: the files that may be given, for the message.

    Raises:
        InputError: the file cannot be read, is not a regular file, or is not UTF-8.
    """
    number = 1
    try:
        with BoundedReader(path) as file:
            for number, line in enumerate(file, start=1):
                encodings = (name for mark, name in BYTE_ORDER_MARKS.items() if number == 1 and line.startswith(mark))
                if encoding := next(encodings, None):
                    raise InputError(f"{path} line {number} is not UTF-8 (it is {encoding}): save the file as UTF-8.")
                if b"\0" in line:
                    reason = "has a null character, as binary files and UTF-16 without a byte order mark"
                    raise InputError(f"{path} line {number} {reason}: give a text in UTF-8.")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} line {number} is not UTF-8 ({error.reason}): save the file as UTF-8.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {expected}.") from None
