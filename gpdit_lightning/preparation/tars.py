"""Pictures in WebDataset tars, as img2dataset writes them: `KEY.jpg` (or .png, .webp), `KEY.txt`, `KEY.json`.

The rule by which members are one sample is webdataset's: they stand together, and their names agree up to the first dot
of the last part. The tar itself is read here, since webdataset takes a broken header for the end, passes over links in
silence, and decodes what it does not need.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from braceexpand import braceexpand
from torch import Tensor
from webdataset.tariterators import base_plus_ext

from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import IMAGE_EXTENSIONS, read_image

# What a member is to its sample, by the ending of its name. No other member is opened.
PARTS = dict.fromkeys(IMAGE_EXTENSIONS, "picture") | {".txt": "text", ".json": "json"}
CARRIED = ("caption", "url")  # of what img2dataset notes in the json


@dataclass(frozen=True)
class TarSample:
    """One sample of a tar, or what is wrong at its place."""

    key: str
    """What the names of its members have in common."""
    pixels: Tensor | None
    """uint8 (1, 3, H, W); None where there is no picture that can be used."""
    metadata: dict[str, Any]
    """`caption` and `url`, where they are known."""
    problem: str | None
    """What of the sample could not be used, and why; None if all of it could. The picture may be there all the same."""


class Member(NamedTuple):
    """A member of a tar that belongs to a sample."""

    name: str
    key: str
    part: str | None
    """A value of `PARTS`; None for what is never opened."""
    content: bytes
    problem: str | None


def expand(pattern: str) -> list[Path]:
    """The tars that a pattern names, in its order.

    Args:
        pattern: a tar, a folder of tars (searched in depth), or either with braces: `laion/{00000..00012}.tar`.

    Raises:
        InputError: braces that do not close, tars that are missing, or a folder without any.
    """
    try:
        places = [Path(place) for place in ([pattern] if Path(pattern).exists() else braceexpand(pattern))]
    except ValueError:
        raise InputError(f"{pattern} has braces that do not close: write it like laion/{{00000..00012}}.tar.") from None
    missing = [place for place in places if not place.exists()]
    if missing:
        raise InputError(
            f"{missing[0]} does not exist ({len(missing)} of {len(places)} places that {pattern!r} names are missing): "
            "download it or name fewer."
        )
    return [tar for place in places for tar in _tars(place)]


def iterate_images(path: Path) -> Iterator[TarSample]:
    """The samples of a tar in its order, one in memory at a time.

    Whatever is wrong comes as a sample with a `problem`, and the iteration goes on. Where the tar is broken it ends,
    after saying so in the same way; the sample at the break may lack parts and is not given.
    """
    keys: set[str] = set()
    try:
        for key, group in groupby(_members(path), key=lambda member: member.key):
            members = list(group)
            if key in keys:
                again = ", ".join(repr(member.name) for member in members)
                yield TarSample(key, None, {}, f"{path} has the key {key!r} again ({again}): only the first was used.")
            else:
                keys.add(key)
                yield _sample(path, key, members)
    except tarfile.ReadError as error:
        reason = f"{path} is broken after {len(keys)} samples ({error}): copy or download it again."
        yield TarSample(path.name, None, {}, reason)


def _tars(place: Path) -> list[Path]:
    if not place.is_dir():
        return [place]
    tars = sorted(path for path in place.rglob("*.tar") if path.is_file())
    if not tars:
        raise InputError(f"{place} holds no .tar files: give another folder.")
    return tars


def _members(path: Path) -> Iterator[Member]:
    """The members that belong to samples; raises `tarfile.ReadError`, and nothing else, where the tar is broken."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                problem = _refusal(path, info)
                # Below 0, tarfile would go back, and round for ever.
                if info.size < 0 or (not problem and info.offset_data + info.size > size):
                    raise tarfile.ReadError(f"{info.name!r} has {info.size} bytes, and the file ends before")
                key, ending = base_plus_ext(info.name)
                part = PARTS.get(f".{ending}".lower())
                content = b""
                if part and not problem:
                    file.seek(info.offset_data)
                    content = file.read(info.size)
                if problem or (key and not info.isdir()):
                    yield Member(info.name, key or info.name, part, content, problem)
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("the mark of its end is missing")
    except Exception as error:  # tarfile has no error of its own for many kinds of damage
        raise tarfile.ReadError(str(error)) from None


def _refusal(path: Path, info: tarfile.TarInfo) -> str | None:
    """Why a member is not to be opened."""
    if info.name.startswith("/") or ".." in PurePosixPath(info.name).parts:
        return f"{path} has a member {info.name!r} that leads out of it, which was not used: do not trust this tar."
    # A sparse file of some bytes may claim any size.
    if not (info.isreg() or info.isdir()) or info.issparse():
        return f"{path} has a member {info.name!r} that is no regular file, which was not used: do not trust this tar."
    return None


def _sample(path: Path, key: str, members: Sequence[Member]) -> TarSample:
    problems = [member.problem for member in members if member.problem]
    parts: dict[str, Member] = {}
    for member in members:
        if member.part and not member.problem and parts.setdefault(member.part, member) is not member:
            problems.append(
                f"{path} has a second {member.part} {member.name!r} for one sample: only the first was used."
            )
    pixels: Tensor | None = None
    metadata: dict[str, Any] = {}
    if "picture" in parts:
        picture = parts["picture"]
        try:
            pixels = read_image(io.BytesIO(picture.content), f"{picture.name} of {path}")
        except InputError as error:
            problems.append(str(error))
    else:
        problems.append(f"{path} has no picture for the key {key!r}: leave this sample out.")
    for part, read in (("json", _of_json), ("text", _of_text)):  # in this order: the text is the better caption
        if part in parts:
            try:
                metadata |= read(parts[part].content)
            except (ValueError, RecursionError) as error:
                problems.append(
                    f"{parts[part].name} of {path} cannot be read ({error}): the rest of the sample was used."
                )
    return TarSample(key, pixels, metadata, " ".join(problems) or None)


def _of_json(content: bytes) -> dict[str, str]:
    noted = json.loads(content)
    if not isinstance(noted, dict):
        raise ValueError("it is no JSON object")
    return {
        name: _storable(noted[name]) for name in CARRIED if isinstance(noted.get(name), str) and noted[name].strip()
    }


def _of_text(content: bytes) -> dict[str, str]:
    caption = content.decode().strip()
    return {"caption": caption} if caption else {}


def _storable(text: str) -> str:
    """Text stripped; raises `ValueError` for half a surrogate pair, which JSON can spell and no file can hold."""
    text.encode()
    return text.strip()
