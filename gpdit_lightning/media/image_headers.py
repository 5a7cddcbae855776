"""Checks of image files that Pillow or FFmpeg leave out: checksums and packed texts of PNG, and scans of JPEG."""

import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from gpdit_lightning.errors import InputError
from gpdit_lightning.regular_files import BoundedReader

PNG_SIGNATURE, JPEG_SIGNATURE, JPEG_SCAN = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xda"
ANCILLARY = 0x20  # bit in the first letter of a PNG chunk that a reader may ignore
MAX_SCANS = 500  # of a JPEG; each takes the time of the whole image, though it may have a few bytes
PACKED = (b"zTXt", b"iTXt", b"iCCP")  # chunks of a PNG whose content may be packed
MAX_UNPACKED_BYTES = 2**24  # of these chunks of a file together
BLOCK_BYTES = 2**20  # most bytes per read


def check_image_file(file: str | Path | BinaryIO, name: str) -> None:
    """Check an image before Pillow opens it.

    Args:
        file: a path, or an open binary file, whose position is at its start afterwards.
        name: the image's name in errors.

    Raises:
        InputError: the path is that of a pipe, a device or a folder, or a JPEG has too many scans.
        ValueError: a checksum of a PNG is wrong.
        OSError: the file cannot be read.
    """
    if isinstance(file, (str, Path)):
        with BoundedReader(Path(file), "give the path of an image") as opened:
            return check_image_file(opened, name)
    start = file.read(len(PNG_SIGNATURE))
    if start == PNG_SIGNATURE:
        _check_png(file)
    elif start.startswith(JPEG_SIGNATURE) and (scans := _scans(file)) > MAX_SCANS:
        raise InputError(f"{name} is a JPEG of {scans} scans, and at most {MAX_SCANS} are read: convert it.")
    file.seek(0)


def check_png_texts(path: Path) -> None:
    """Check the packed texts and the colour profile of a PNG or APNG, all of which FFmpeg unpacks.

    Files of other formats are accepted.

    Raises:
        InputError: they have more than `MAX_UNPACKED_BYTES`.
    """
    with BoundedReader(path) as file:
        if file.read(len(PNG_SIGNATURE)) != PNG_SIGNATURE:
            return
        left = MAX_UNPACKED_BYTES
        for kind, length in _png_chunks(file):
            if kind in PACKED and length <= MAX_UNPACKED_BYTES:
                left -= _unpacked_size(kind, file.read(length), left + 1)
            elif kind in PACKED:
                left -= length
            if left < 0:
                raise InputError(
                    f"{path} has texts or a colour profile of more than {MAX_UNPACKED_BYTES} bytes: remove them, or "
                    "the file."
                )


def _png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yield kind and length of the chunks of a PNG after its signature, with the file at the content of each."""
    start = file.tell()
    while len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4]), head[4:]
        yield kind, length
        start += 8 + length + 4
        file.seek(start)


def _unpacked_size(kind: bytes, content: bytes, limit: int) -> int:
    """Return the number of bytes, at most `limit`, to which a chunk unpacks before its end or its first damage."""
    _, _, content = content.partition(b"\0")  # its name
    if kind == b"iTXt":
        if content[:1] != b"\1":
            return len(content)
        content = b"\0" + content[2:].split(b"\0", 2)[-1]  # without the language and the translated name
    unpacked, packed, unpacking = 0, content[1:], zlib.decompressobj()
    with suppress(zlib.error):
        while packed and unpacked < limit:
            unpacked += len(unpacking.decompress(packed, min(limit - unpacked, BLOCK_BYTES)))
            packed = unpacking.unconsumed_tail
    return unpacked


def _check_png(file: BinaryIO) -> None:
    """Compare the chunks that a reader needs with their checksums; a file that ends early is left to Pillow."""
    for kind, left in _png_chunks(file):
        if kind[0] & ANCILLARY:
            continue
        checksum = zlib.crc32(kind)
        while left and (block := file.read(min(left, BLOCK_BYTES))):
            checksum, left = zlib.crc32(block, checksum), left - len(block)
        stored = file.read(4)
        if len(stored) == 4 and int.from_bytes(stored) != checksum:
            raise ValueError(f"the checksum of its chunk {kind.decode('latin-1')} differs")
        if kind == b"IEND":
            return


def _scans(file: BinaryIO) -> int:
    """Return the number of markers of scans in the rest of a file."""
    scans, last = 0, b""
    while block := file.read(BLOCK_BYTES):
        scans += (last + block).count(JPEG_SCAN)
        last = block[-1:]
    return scans
