"""Input files of a preparation: their names, splits, captions and labels."""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gpdit_lightning.data.manifest import Kind, Split
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import IMAGE_EXTENSIONS
from gpdit_lightning.media.video import VIDEO_EXTENSIONS
from gpdit_lightning.options.prepare import PrepareOptions
from gpdit_lightning.preparation.annotations import Annotations, read_annotations
from gpdit_lightning.preparation.tars import expand_pattern

FileFormat = Literal["video", "image", "tar"]

EXTENSIONS: dict[FileFormat, tuple[str, ...]] = {"video": VIDEO_EXTENSIONS, "image": IMAGE_EXTENSIONS}


@dataclass(frozen=True)
class InputFile:
    """A video, an image or a tar of images."""

    path: Path
    name: str
    """Name of the file in metadata, records and reports: its path relative to the folder in which it was found. For a
    file of --validation_videos or --validation_images it begins with the name of that folder."""
    format: FileFormat
    split: Split | None
    """None for a tar, whose images have a split each."""
    bytes: int
    """Size of the file, by which a change is detected."""
    reason: str = ""
    """Reason for the split."""
    captions: tuple[str, ...] = ()
    label: str | None = None

    @property
    def kind(self) -> Kind:
        """Kind of the samples."""
        return "video" if self.format == "video" else "image"

    @property
    def path_hash(self) -> str:
        """16 hexadecimal digits that identify the absolute path."""
        return hash_path(self.path)

    @property
    def annotation(self) -> dict[str, Any]:
        """Label and captions as metadata of a sample."""
        values: dict[str, Any] = {"label": self.label} if self.label is not None else {}
        if self.captions:
            values["caption"] = self.captions[0]
        if len(self.captions) > 1:
            values["captions"] = list(self.captions)
        return values


class Inputs(NamedTuple):
    """Input files and their annotations."""

    files: list[InputFile]
    excluded: list[dict[str, str]]
    """`{"source", "reason"}` of every file that the annotations exclude."""
    annotations: Annotations


class SplitChoice(NamedTuple):
    """Split of a file, None if it is excluded, and the reason."""

    split: Split | None
    reason: str


IN_HELD_OUT_FOLDER = SplitChoice("validation", "it is in a held-out folder")
IN_NO_HELD_OUT_FOLDER = SplitChoice("train", "it is in no held-out folder")
SAME_RECORDING = "files of the same recording were prepared before"


def find_inputs(options: PrepareOptions, recorded: Mapping[str, Split | None] | None = None) -> Inputs:
    """Find every file to encode, in a fixed order, and choose its split.

    Args:
        options: options that specify the files and the validation split.
        recorded: splits by file name that an earlier run chose; they are kept.

    Raises:
        InputError: there are no files, a path does not exist, or two files have the same name.
    """
    if not options.videos and not options.images and not options.image_tars:
        raise InputError("there are no input files: give --videos, --images or --image_tars.")
    inputs = Inputs([], [], read_annotations(options.annotations))
    _add_files(inputs, "video", options.videos, options.validation_videos, options, recorded or {})
    _add_files(inputs, "image", options.images, options.validation_images, options, recorded or {})
    for path, name in (file for pattern in options.image_tars for file in _find_tars(pattern)):
        inputs.files.append(InputFile(path, name, "tar", None, path.stat().st_size))
    _check_unique(inputs.files)
    return inputs


def _add_files(
    inputs: Inputs,
    file_format: FileFormat,
    paths: Sequence[Path],
    held_out_paths: Sequence[Path],
    options: PrepareOptions,
    recorded: Mapping[str, Split | None],
) -> None:
    """Add the videos, or the images, to the inputs."""
    files = [file for path in paths for file in _find_files(path, file_format)]
    held_out = [file for path in held_out_paths for file in _find_held_out_files(path, file_format)]
    fraction = None if held_out_paths else options.validation_fraction
    names = [name for _, name in files]
    splits = _choose_splits(names, fraction, options.source_pattern, inputs.annotations, recorded)
    splits |= {name: IN_HELD_OUT_FOLDER for _, name in held_out}
    for path, name in files + held_out:
        split, reason = splits[name]
        if split is None:
            inputs.excluded.append({"source": name, "reason": reason})
            continue
        annotation = inputs.annotations.get(name)
        label = annotation.label or (path.parent.name if options.labels else None)
        size = path.stat().st_size
        inputs.files.append(InputFile(path, name, file_format, split, size, reason, annotation.captions, label))


def hash_path(path: Path) -> str:
    """Return 16 hexadecimal digits that identify the absolute path."""
    return hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:16]


def is_held_out(recording: str, fraction: float) -> bool:
    """Return whether a recording is held out, by a hash of its name, so that new files change no earlier choice."""
    return _unit_hash(recording) < fraction


def choose_split_by_hash(recording: str, fraction: float) -> SplitChoice:
    """Choose the split of a recording by a hash of its name."""
    held_out = is_held_out(recording, fraction)
    relation = "below" if held_out else "not below"
    reason = f"the hash of {recording} is {_unit_hash(recording):.4f}, {relation} the fraction {fraction:g}"
    return SplitChoice("validation" if held_out else "train", reason)


def recording_of(name: str, pattern: str | None) -> str:
    """Return the first match of the pattern in a file name; the whole name if there is none."""
    match = re.search(pattern, name) if pattern else None
    return match.group() if match else name


def _find_files(path: Path, file_format: FileFormat) -> list[tuple[Path, str]]:
    """Find the files of a format in a folder or list, or a single file.

    Returns:
        The path of each file, and its path relative to the folder.

    Raises:
        InputError: the path does not exist, or the folder or list contains no files.
    """
    if path.is_dir():
        extensions = EXTENSIONS[file_format]
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in extensions and file.is_file())
        if not files:
            raise InputError(f"{path} has no {file_format} files ({', '.join(extensions)}): give another folder.")
        return [(file, file.relative_to(path).as_posix()) for file in files]
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a folder, a file or a .txt list of {file_format}s.")
    if path.suffix.lower() != ".txt":
        return [(path, path.name)]
    return _read_file_list(path)


def _find_held_out_files(path: Path, file_format: FileFormat) -> list[tuple[Path, str]]:
    """Find files as `_find_files` does; their names begin with that of the folder.

    (File names often occur in both the training and the validation folder of a data set.)
    """
    prefix = f"{path.name}/" if path.is_dir() else ""
    return [(file, prefix + name) for file, name in _find_files(path, file_format)]


def _read_file_list(path: Path) -> list[tuple[Path, str]]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    files = [path.parent / line for line in lines if line]
    if not files:
        raise InputError(f"the list {path} is empty: write one path per line.")
    for file in files:
        if not file.is_file():
            raise InputError(f"the list {path} contains {file}, which does not exist: correct that line.")
    return [
        (file, file.relative_to(path.parent).as_posix() if file.is_relative_to(path.parent) else file.name)
        for file in files
    ]


def _find_tars(pattern: str) -> list[tuple[Path, str]]:
    """Return the tars that match a pattern, and the path of each relative to the fixed part of the pattern."""
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
    """Choose the split of each file: by the annotations if they contain any of the files, else by a hash.

    Recorded files keep their split, and new files of the same recording get that split.

    Args:
        names: names of the files.
        fraction: fraction of recordings to hold out; None if there are held-out folders, so that all files are for
            training.
        pattern: regular expression for the recording in a name.
        annotations: annotations of the files.
        recorded: splits by file name that an earlier run chose.
    """
    annotated = {name: annotations.get(name).split for name in names}
    if any(annotated.values()):
        return _split_by_annotations(annotated, recorded)
    recordings = {name: recording_of(name, pattern) for name in names}
    chosen = {
        recording_of(name, pattern): SplitChoice(split, SAME_RECORDING) for name, split in recorded.items() if split
    }
    new = sorted(set(recordings.values()) - chosen.keys(), key=_unit_hash)
    if fraction is None:
        chosen |= dict.fromkeys(new, IN_NO_HELD_OUT_FOLDER)
    else:
        chosen |= _split_recordings(new, fraction, each_split=not recorded)
    return {name: chosen[recordings[name]] for name in names}


def _split_by_annotations(
    annotated: Mapping[str, Split | None], recorded: Mapping[str, Split | None]
) -> dict[str, SplitChoice]:
    unlisted = SplitChoice("train", "the annotation files list held-out files only, and not this one")
    if "train" in annotated.values():
        unlisted = SplitChoice(None, "the annotation files list other files for training, and not this one")
    chosen = {
        name: SplitChoice(split, "an annotation file assigns it to this split") if split else unlisted
        for name, split in annotated.items()
    }
    return {name: choice._replace(split=recorded.get(name) or choice.split) for name, choice in chosen.items()}


def _split_recordings(recordings: Sequence[str], fraction: float, each_split: bool) -> dict[str, SplitChoice]:
    """Choose the splits of recordings, sorted by hash; with `each_split`, each split gets one if there are two."""
    count = sum(is_held_out(recording, fraction) for recording in recordings)
    if fraction > 0 and each_split and len(recordings) > 1:
        count = min(max(1, count), len(recordings) - 1)
    chosen = {}
    for i, recording in enumerate(recordings):
        choice = choose_split_by_hash(recording, fraction)
        split: Split = "validation" if i < count else "train"
        if split != choice.split:
            choice = SplitChoice(split, f"{choice.reason}, but each split gets at least one input file")
        chosen[recording] = choice
    return chosen


def _unit_hash(name: str) -> float:
    """Return a number in [0, 1) that depends on the name only."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64


def _check_unique(files: Sequence[InputFile]) -> None:
    """Raise InputError if a file occurs twice, or if two files have the same name."""
    by_name: dict[str, Path] = {}
    path_hashes: set[str] = set()
    for file in files:
        if file.path_hash in path_hashes:
            raise InputError(f"{file.path} is given twice: give folders and lists without common files.")
        path_hashes.add(file.path_hash)
        if (other := by_name.setdefault(file.name, file.path)) is not file.path:
            raise InputError(
                f"{other} and {file.path} would both have the name {file.name}: give a folder that contains both, so "
                "that their names differ."
            )
