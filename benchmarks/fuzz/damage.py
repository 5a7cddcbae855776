"""Damage of files of any kind: their bytes, and what lies at their path."""

import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

EXTREMES = (
    b"\xff" * 8,
    b"\x7f" + b"\xff" * 7,
    b"\x80" + b"\0" * 7,
    b"\0" * 8,
    b"\xff\xff\xff\x7f\0\0\0\0",
    b"\x01" * 8,
)


class Damage(NamedTuple):
    """What was done.

    Attributes:
        description: in words.
        paths: the files that were changed.
    """

    description: str
    paths: tuple[Path, ...]


BytesOperator = Callable[[bytes, bytes, random.Random], bytes]
"""(content, content of a similar file, source of choices) -> damaged content"""


def _flip(content: bytes, _: bytes, numbers: random.Random) -> bytes:
    damaged = bytearray(content)
    for _number in range(numbers.choice((1, 1, 1, 2, 8, 64))):
        damaged[numbers.randrange(len(damaged))] ^= 1 << numbers.randrange(8)
    return bytes(damaged)


def _run(content: bytes, numbers: random.Random) -> tuple[int, int]:
    start = numbers.randrange(len(content))
    return start, min(len(content), start + numbers.choice((1, 4, 16, 64, 512, 4096)))


def _zeros(content: bytes, _: bytes, numbers: random.Random) -> bytes:
    start, end = _run(content, numbers)
    return content[:start] + bytes(end - start) + content[end:]


def _noise(content: bytes, _: bytes, numbers: random.Random) -> bytes:
    start, end = _run(content, numbers)
    return content[:start] + numbers.randbytes(end - start) + content[end:]


def _truncated(content: bytes, _: bytes, numbers: random.Random) -> bytes:
    return content[: numbers.choice((numbers.randrange(len(content)), len(content) - 1, min(len(content), 100)))]


def _extended(content: bytes, other: bytes, numbers: random.Random) -> bytes:
    return content + numbers.choice((b"\0", b"\n", bytes(512), numbers.randbytes(100), content, other))


def _cut(content: bytes, _: bytes, numbers: random.Random) -> bytes:
    start, end = _run(content, numbers)
    return content[:start] + content[end:]


def _inserted(content: bytes, _: bytes, numbers: random.Random) -> bytes:
    start, end = _run(content, numbers)
    return content[:end] + content[start:end] + content[end:]


def _spliced(content: bytes, other: bytes, numbers: random.Random) -> bytes:
    place = numbers.randrange(len(content))
    return content[:place] + other[place:]


def _exchanged(content: bytes, _: bytes, numbers: random.Random) -> bytes:
    """Exchange two blocks of equal size."""
    size = min(len(content) // 2, numbers.choice((8, 64, 512, 1024)))
    first = numbers.randrange(len(content) - 2 * size + 1)
    second = numbers.randrange(first + size, len(content) - size + 1)
    damaged = bytearray(content)
    damaged[first : first + size], damaged[second : second + size] = content[second:][:size], content[first:][:size]
    return bytes(damaged)


def _extreme(content: bytes, _: bytes, numbers: random.Random) -> bytes:
    """Overwrite a field of the header, where lengths, counts and offsets are stored, by an extreme number."""
    size, place = numbers.choice((2, 4, 8)), numbers.randrange(min(len(content), 1024))
    return content[:place] + numbers.choice(EXTREMES)[:size] + content[place + size :]


BYTES: Mapping[str, BytesOperator] = {
    "flipped bits": _flip,
    "zeros": _zeros,
    "random bytes": _noise,
    "truncated": _truncated,
    "extended": _extended,
    "bytes removed": _cut,
    "bytes repeated": _inserted,
    "end of another file": _spliced,
    "blocks exchanged": _exchanged,
    "extreme number in the header": _extreme,
}


def damage_bytes(path: Path, siblings: Sequence[Path], numbers: random.Random) -> Damage:
    """Damage the bytes of a file.

    Args:
        path: the file.
        siblings: other files of the kind.
        numbers: source of all choices.
    """
    content = path.read_bytes()
    other = numbers.choice(siblings).read_bytes() if siblings else content
    name = numbers.choice(list(BYTES))
    path.write_bytes(BYTES[name](content, other, numbers) if content else b"x")
    return Damage(f"{name} of {path.name}", (path,))


def exchange_files(path: Path, siblings: Sequence[Path], numbers: random.Random) -> Damage:
    """Exchange a file with another one, or copy another one over it."""
    if not siblings:
        return replace_path(path, siblings, numbers)
    other = numbers.choice(siblings)
    if numbers.random() < 0.5:
        shutil.copyfile(other, path)
        return Damage(f"{other.name} was copied over {path.name}", (path,))
    content = path.read_bytes()
    shutil.copyfile(other, path)
    other.write_bytes(content)
    return Damage(f"{path.name} and {other.name} were exchanged", (path, other))


def replace_path(path: Path, siblings: Sequence[Path], numbers: random.Random) -> Damage:
    """Replace a file by something that is no such file."""
    kinds = (
        "nothing",
        "empty",
        "folder",
        "fifo",
        "link to itself",
        "dangling link",
        "endless",
        "full folder",
        "device",
    )
    kind = numbers.choice(kinds)
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "full folder":
        path.mkdir()
        (path / path.name).write_bytes(b"x")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "dangling link":
        path.symlink_to("nothing")
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "device":
        path.symlink_to("/dev/full")
    return Damage(f"{path.name} became: {kind}", (path,))
