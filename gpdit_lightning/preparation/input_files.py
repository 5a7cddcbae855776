"""The files to prepare: their names, which of them are held out, and what is known of each."""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gpdit_lightning.data.manifest import Kind, Split
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import IMAGE_EXTENSIONS
from gpdit_lightning.media.video import VIDEO_EXTENSIONS
from gpdit_lightning.preparation.annotations import Annotations, read_annotations
from gpdit_lightning.preparation.options import PrepareOptions
from gpdit_lightning.preparation.tars import expand

ENDINGS: dict[Kind, tuple[str, ...]] = {"video": VIDEO_EXTENSIONS, "image": IMAGE_EXTENSIONS}


@dataclass(frozen=True)
class InputFile:
    """One file to encode."""

    path: Path
    name: str
    """Path relative to the folder it was found in, behind that folder's own name if it is a held-out place: what
    metadata and reports call it, and what it is known by."""
    kind: Kind
    split: Split | None
    """None for a tar: each of its pictures is held out or not by its own name."""
    bytes: int
    """Size of the file, to notice that it changed."""
    reason: str = ""
    """Why it has this split."""
    captions: tuple[str, ...] = ()
    label: str | None = None

    @property
    def place(self) -> str:
        """16 hexadecimal digits that stand for where the file lies, whatever it is called."""
        return hashlib.sha256(os.path.abspath(self.path).encode()).hexdigest()[:16]


class Found(NamedTuple):
    """What was found at the places that the options name."""

    sources: list[InputFile]
    left_out: list[dict[str, str]]
    """`{"source", "reason"}` of every file that the annotations leave out."""
    annotations: Annotations


def find_sources(options: PrepareOptions, recorded: Mapping[str, Split | None] | None = None) -> Found:
    """Every file to encode, in a fixed order, each with its split.

    Args:
        options: the places, and how to hold out.
        recorded: splits of sources by name, as an earlier run chose them; they stay.

    Raises:
        InputError: for a place that does not exist or holds nothing, no place at all, or two files of one name.
    """
    if not options.videos and not options.images and not options.image_tars:
        raise InputError("There is nothing to prepare: give --videos, --images or --image_tars.")
    annotations, recorded = read_annotations(options.annotations), recorded or {}
    found = Found([], [], annotations)
    places: list[tuple[Kind, Sequence[Path], Sequence[Path]]] = [
        ("video", options.videos, options.validation_videos),
        ("image", options.images, options.validation_images),
    ]
    for kind, shared, held_out in places:
        files = [file for place in shared for file in _files(place, kind)]
        # With the name of their place, since both folders of a data set often number their files alike.
        prefixes = {place: f"{place.name}/" if place.is_dir() else "" for place in held_out}
        apart = [(path, prefixes[place] + name) for place in held_out for path, name in _files(place, kind)]
        fraction = None if held_out else options.validation_fraction
        splits = _splits([name for _, name in files], fraction, options.source_pattern, annotations, recorded)
        splits |= {name: ("validation", "it lies in a held-out place") for _, name in apart}
        for path, name in files + apart:
            split, reason = splits[name]
            if split is None:
                found.left_out.append({"source": name, "reason": reason})
                continue
            known = annotations.of(name)
            label = known.label or (path.parent.name if options.labels else None)
            size = path.stat().st_size
            found.sources.append(InputFile(path, name, kind, split, size, reason, known.captions, label))
    for path, name in (file for pattern in options.image_tars for file in _tars(pattern)):
        found.sources.append(InputFile(path, name, "image", None, path.stat().st_size))
    _refuse_doubles(found.sources)
    return found


def held_out(recording: str, fraction: float) -> bool:
    """Whether a recording is held out: by a hash of its name, so that new files move no old one."""
    return _hash(recording) < fraction


def reason_of_hash(recording: str, fraction: float) -> str:
    """Why a recording is held out or not, where its hash decides."""
    relation = "below" if held_out(recording, fraction) else "not below"
    return f"the hash of {recording} is {_hash(recording):.4f}, {relation} the fraction {fraction:g}"


def recording_of(name: str, pattern: str | None) -> str:
    """The part of a source's name that names its recording; the whole name where the pattern does not occur."""
    match = re.search(pattern, name) if pattern else None
    return match.group() if match else name


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


def _tars(pattern: str) -> list[tuple[Path, str]]:
    """The tars that a pattern names, each with its name: its path below the folder in which the pattern begins."""
    files = expand(pattern)
    root = Path(pattern) if Path(pattern).is_dir() else Path(pattern.partition("{")[0] + "*").parent
    return [(path, path.relative_to(root).as_posix()) for path in files]


def _splits(
    names: Sequence[str],
    fraction: float | None,
    pattern: str | None,
    annotations: Annotations,
    recorded: Mapping[str, Split | None],
) -> dict[str, tuple[Split | None, str]]:
    """Split and reason for each name, no split where it is left out: as annotated, or by a hash of its recording.

    What was recorded keeps its split, and so do new files of the same recording. No fraction: others are held out.
    """
    annotated = {name: annotations.of(name).split for name in names}
    if any(annotated.values()):
        rest: tuple[Split | None, str] = ("train", "no annotation file names it, and they name held-out ones alone")
        if "train" in annotated.values():
            rest = None, "no annotation file names it, and they name others for training"
        said = {name: (split, "the annotations say so") if split else rest for name, split in annotated.items()}
        return {name: (recorded.get(name) or split, reason) for name, (split, reason) in said.items()}
    recordings = {name: recording_of(name, pattern) for name in names}
    earlier = "files of the same recording were prepared before"
    chosen = {recording_of(name, pattern): (split, earlier) for name, split in recorded.items() if split}
    new = sorted(set(recordings.values()) - chosen.keys(), key=_hash)
    if fraction is None:
        chosen |= dict.fromkeys(new, ("train", "it lies in no held-out place"))
        return {name: chosen[recordings[name]] for name in names}
    count = sum(held_out(recording, fraction) for recording in new)
    if fraction > 0 and not recorded and len(new) > 1:  # where there are two or more, each side gets at least one
        count = min(max(1, count), len(new) - 1)
    for i, recording in enumerate(new):
        is_held_out, reason = i < count, reason_of_hash(recording, fraction)
        if is_held_out != held_out(recording, fraction):
            reason += ", but each side gets at least one source"
        chosen[recording] = "validation" if is_held_out else "train", reason
    return {name: chosen[recordings[name]] for name in names}


def _hash(name: str) -> float:
    """A number in [0, 1) that belongs to a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64


def _refuse_doubles(sources: Sequence[InputFile]) -> None:
    names: dict[str, Path] = {}
    places: set[str] = set()
    for source in sources:
        if source.place in places:
            raise InputError(f"{source.path} is given twice: give folders and lists that share no file.")
        places.add(source.place)
        if (other := names.setdefault(source.name, source.path)) is not source.path:
            raise InputError(
                f"{other} and {source.path} would both be known as {source.name}: give a folder above both, so that "
                "their names differ."
            )
