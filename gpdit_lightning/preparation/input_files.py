"""The files to prepare: their names, their splits, their captions and labels."""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gpdit_lightning.data.manifest import Kind, Split
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import IMAGE_EXTENSIONS
from gpdit_lightning.media.video import VIDEO_EXTENSIONS
from gpdit_lightning.options.prepare import PrepareOptions
from gpdit_lightning.preparation.annotations import Annotations, read_annotations
from gpdit_lightning.preparation.tars import expand_pattern

EXTENSIONS: dict[Kind, tuple[str, ...]] = {"video": VIDEO_EXTENSIONS, "image": IMAGE_EXTENSIONS}


@dataclass(frozen=True)
class InputFile:
    """A video, an image or a tar of images."""

    path: Path
    name: str
    """Identifies the file in metadata, records and reports: its path relative to the folder in which it was found; for
    a file of --validation_videos or --validation_images the folder's own name comes before it."""
    kind: Kind
    """Of a tar "image"."""
    split: Split | None
    """None for a tar: the name of each of its images decides."""
    bytes: int
    """Size of the file, from which a change is noticed."""
    reason: str = ""
    """Why it has this split."""
    captions: tuple[str, ...] = ()
    label: str | None = None

    @property
    def path_hash(self) -> str:
        """16 hexadecimal digits that identify the absolute path."""
        return hash_of_path(self.path)

    @property
    def annotation(self) -> dict[str, Any]:
        """Label and captions as the metadata of a sample."""
        values: dict[str, Any] = {"label": self.label} if self.label is not None else {}
        if self.captions:
            values["caption"] = self.captions[0]
        if len(self.captions) > 1:
            values["captions"] = list(self.captions)
        return values


class Inputs(NamedTuple):
    """The files that the options name."""

    files: list[InputFile]
    excluded: list[dict[str, str]]
    """`{"source", "reason"}` of every file that the annotations exclude."""
    annotations: Annotations


class SplitChoice(NamedTuple):
    """The split of a file, None if it is excluded, and the reason."""

    split: Split | None
    reason: str


IN_HELD_OUT_FOLDER = SplitChoice("validation", "it is in a held-out folder")
IN_NO_HELD_OUT_FOLDER = SplitChoice("train", "it is in no held-out folder")
SAME_RECORDING = "files of the same recording were prepared before"


def find_inputs(options: PrepareOptions, recorded: Mapping[str, Split | None] | None = None) -> Inputs:
    """Every file to encode, in a fixed order, each with its split.

    Args:
        options: where the files are, and how to hold out.
        recorded: splits by file name that an earlier run chose; they stay.

    Raises:
        InputError: no files, a path that does not exist, or two files of one name.
    """
    if not options.videos and not options.images and not options.image_tars:
        raise InputError("There are no input files: give --videos, --images or --image_tars.")
    annotations, recorded = read_annotations(options.annotations), recorded or {}
    inputs = Inputs([], [], annotations)
    by_kind: list[tuple[Kind, Sequence[Path], Sequence[Path]]] = [
        ("video", options.videos, options.validation_videos),
        ("image", options.images, options.validation_images),
    ]
    for kind, paths, held_out_paths in by_kind:
        files = [file for path in paths for file in _files_at(path, kind)]
        held_out = [file for path in held_out_paths for file in _held_out_files_at(path, kind)]
        fraction = None if held_out_paths else options.validation_fraction
        splits = _choose_splits([name for _, name in files], fraction, options.source_pattern, annotations, recorded)
        splits |= {name: IN_HELD_OUT_FOLDER for _, name in held_out}
        for path, name in files + held_out:
            split, reason = splits[name]
            if split is None:
                inputs.excluded.append({"source": name, "reason": reason})
                continue
            annotation = annotations.of(name)
            label = annotation.label or (path.parent.name if options.labels else None)
            size = path.stat().st_size
            inputs.files.append(InputFile(path, name, kind, split, size, reason, annotation.captions, label))
    for path, name in (file for pattern in options.image_tars for file in _tars_of(pattern)):
        inputs.files.append(InputFile(path, name, "image", None, path.stat().st_size))
    _refuse_duplicates(inputs.files)
    return inputs


def hash_of_path(path: Path) -> str:
    """16 hexadecimal digits that identify the absolute path."""
    return hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:16]


def is_held_out(recording: str, fraction: float) -> bool:
    """Whether a recording is held out: by a hash of its name, so that new files change no earlier choice."""
    return _unit_hash(recording) < fraction


def choose_by_hash(recording: str, fraction: float) -> SplitChoice:
    """The split of a recording by its hash."""
    held_out = is_held_out(recording, fraction)
    relation = "below" if held_out else "not below"
    reason = f"the hash of {recording} is {_unit_hash(recording):.4f}, {relation} the fraction {fraction:g}"
    return SplitChoice("validation" if held_out else "train", reason)


def recording_of(name: str, pattern: str | None) -> str:
    """The part of a file's name that names its recording; the whole name if the pattern does not occur in it."""
    match = re.search(pattern, name) if pattern else None
    return match.group() if match else name


def _files_at(place: Path, kind: Kind) -> list[tuple[Path, str]]:
    """The files of a kind in a folder or list, or a single file; each with its path relative to that place."""
    if place.is_dir():
        extensions = EXTENSIONS[kind]
        files = sorted(path for path in place.rglob("*") if path.suffix.lower() in extensions and path.is_file())
        if not files:
            raise InputError(f"{place} has no {kind} files ({', '.join(extensions)}): give another folder.")
        return [(path, path.relative_to(place).as_posix()) for path in files]
    if not place.is_file():
        raise InputError(f"{place} does not exist: give a folder, a file or a .txt list of {kind}s.")
    if place.suffix.lower() != ".txt":
        return [(place, place.name)]
    return _files_of_list(place)


def _held_out_files_at(place: Path, kind: Kind) -> list[tuple[Path, str]]:
    """As `_files_at`, with the folder's own name first: both folders of a data set often number their files alike."""
    prefix = f"{place.name}/" if place.is_dir() else ""
    return [(path, prefix + name) for path, name in _files_at(place, kind)]


def _files_of_list(path: Path) -> list[tuple[Path, str]]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    files = [path.parent / line for line in lines if line]
    if not files:
        raise InputError(f"The list {path} is empty: write one path per line.")
    for file in files:
        if not file.is_file():
            raise InputError(f"The list {path} names {file}, which does not exist: correct that line.")
    return [
        (file, file.relative_to(path.parent).as_posix() if file.is_relative_to(path.parent) else file.name)
        for file in files
    ]


def _tars_of(pattern: str) -> list[tuple[Path, str]]:
    """The tars that a pattern names, each with its path relative to the folder in which the pattern begins."""
    files = expand_pattern(pattern)
    root = Path(pattern) if Path(pattern).is_dir() else Path(pattern.partition("{")[0] + "*").parent
    return [(path, path.relative_to(root).as_posix()) for path in files]


def _choose_splits(
    names: Sequence[str],
    fraction: float | None,
    pattern: str | None,
    annotations: Annotations,
    recorded: Mapping[str, Split | None],
) -> dict[str, SplitChoice]:
    """The split of each file: by the annotations if they name any of the files, else by a hash of its recording.

    Recorded files keep their split, and so do new files of their recordings. Without a fraction, none is held out.
    """
    annotated = {name: annotations.of(name).split for name in names}
    if any(annotated.values()):
        return _choose_by_annotations(annotated, recorded)
    recordings = {name: recording_of(name, pattern) for name in names}
    chosen = {
        recording_of(name, pattern): SplitChoice(split, SAME_RECORDING) for name, split in recorded.items() if split
    }
    new = sorted(set(recordings.values()) - chosen.keys(), key=_unit_hash)
    if fraction is None:
        chosen |= dict.fromkeys(new, IN_NO_HELD_OUT_FOLDER)
    else:
        chosen |= _choose_new(new, fraction, each_side=not recorded)
    return {name: chosen[recordings[name]] for name in names}


def _choose_by_annotations(
    annotated: Mapping[str, Split | None], recorded: Mapping[str, Split | None]
) -> dict[str, SplitChoice]:
    unnamed = SplitChoice("train", "no annotation file names it, and they name held-out files only")
    if "train" in annotated.values():
        unnamed = SplitChoice(None, "no annotation file names it, and they name other files for training")
    chosen = {
        name: SplitChoice(split, "the annotations say so") if split else unnamed for name, split in annotated.items()
    }
    return {name: choice._replace(split=recorded.get(name) or choice.split) for name, choice in chosen.items()}


def _choose_new(recordings: Sequence[str], fraction: float, each_side: bool) -> dict[str, SplitChoice]:
    """Splits of recordings, sorted by hash; with `each_side`, two or more recordings give at least one to each."""
    count = sum(is_held_out(recording, fraction) for recording in recordings)
    if fraction > 0 and each_side and len(recordings) > 1:
        count = min(max(1, count), len(recordings) - 1)
    chosen = {}
    for i, recording in enumerate(recordings):
        choice = choose_by_hash(recording, fraction)
        split: Split = "validation" if i < count else "train"
        if split != choice.split:
            choice = SplitChoice(split, f"{choice.reason}, but each split gets at least one input file")
        chosen[recording] = choice
    return chosen


def _unit_hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64


def _refuse_duplicates(files: Sequence[InputFile]) -> None:
    by_name: dict[str, Path] = {}
    path_hashes: set[str] = set()
    for file in files:
        if file.path_hash in path_hashes:
            raise InputError(f"{file.path} is given twice: give folders and lists that share no file.")
        path_hashes.add(file.path_hash)
        if (other := by_name.setdefault(file.name, file.path)) is not file.path:
            raise InputError(
                f"{other} and {file.path} would both be named {file.name}: give a folder above both, so that their "
                "names differ."
            )
