"""The files to prepare, and which of them are held out."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpdit_lightning.data.manifest import Kind, Split
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import IMAGE_ENDINGS
from gpdit_lightning.media.video import VIDEO_ENDINGS
from gpdit_lightning.preparation.options import PrepareOptions

ENDINGS: dict[Kind, tuple[str, ...]] = {"video": VIDEO_ENDINGS, "image": IMAGE_ENDINGS}


@dataclass(frozen=True)
class Source:
    """One file to encode."""

    path: Path
    name: str
    """Path relative to the folder it was found in: what metadata and reports call it."""
    kind: Kind
    split: Split


def label_of(source: Source) -> str:
    """The name of the folder a source lies in."""
    return source.path.parent.name


def find_sources(options: PrepareOptions) -> list[Source]:
    """Every file to encode, in a fixed order, each with its split.

    Raises:
        InputError: for a place that does not exist or holds nothing, no place at all, or a file that is named twice.
    """
    places: list[tuple[Kind, Sequence[Path], Sequence[Path]]] = [
        ("video", options.videos, options.validation_videos),
        ("image", options.images, options.validation_images),
    ]
    if not options.videos and not options.images:
        raise InputError("There is nothing to prepare: give --videos or --images.")
    sources = []
    for kind, shared, held_out in places:
        files = [file for place in shared for file in _files(place, kind)]
        recordings = {name: _recording(name, options.source_pattern) for _, name in files}
        chosen = set() if held_out else _held_out(set(recordings.values()), options.validation_fraction)
        for path, name in files:
            sources.append(Source(path, name, kind, "validation" if recordings[name] in chosen else "train"))
        sources += [Source(path, name, kind, "validation") for place in held_out for path, name in _files(place, kind)]
    for path, count in Counter(source.path.resolve() for source in sources).items():
        if count > 1:
            raise InputError(f"{path} is given {count} times: give folders and lists that share no file.")
    return sources


def _files(place: Path, kind: Kind) -> list[tuple[Path, str]]:
    """Files of a kind at a place, each with its name: its path relative to that place."""
    if place.is_dir():
        files = sorted(path for path in place.rglob("*") if path.suffix.lower() in ENDINGS[kind] and path.is_file())
        if not files:
            raise InputError(f"{place} holds no {kind} files ({', '.join(ENDINGS[kind])}): give another folder.")
        return [(path, path.relative_to(place).as_posix()) for path in files]
    if not place.is_file():
        raise InputError(f"{place} does not exist: give a folder, a file or a .txt list of {kind}s.")
    if place.suffix.lower() != ".txt":
        return [(place, place.name)]
    lines = [line.strip() for line in place.read_text(encoding="utf-8").splitlines()]
    files = [place.parent / line for line in lines if line]
    if not files:
        raise InputError(f"The list {place} is empty: write one path a line.")
    for path in files:
        if not path.is_file():
            raise InputError(f"The list {place} names {path}, which does not exist: correct that line.")
    return [
        (path, path.relative_to(place.parent).as_posix() if path.is_relative_to(place.parent) else path.name)
        for path in files
    ]


def _recording(name: str, pattern: str | None) -> str:
    """The part of a source's name that names its recording; the whole name where the pattern does not occur."""
    match = re.search(pattern, name) if pattern else None
    return match.group() if match else name


def _held_out(recordings: set[str], fraction: float) -> set[str]:
    """The recordings to hold out: those whose hash falls below the fraction, so that new files move no old one.

    Where there are two or more and a fraction is asked for, each side gets at least one.
    """
    if fraction == 0 or len(recordings) < 2:
        return set()
    places = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64 for name in recordings}
    ordered = sorted(places, key=lambda name: places[name])
    chosen = sum(place < fraction for place in places.values())
    return set(ordered[: min(max(1, chosen), len(ordered) - 1)])
