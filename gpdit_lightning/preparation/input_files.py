"""Input files of a preparation: their names, captions and labels."""

import hashlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gpdit_lightning.data.shard_entry import Kind, Split
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.finding import FoundFile, LeftOut, find_media, identity_of, is_link
from gpdit_lightning.names import as_text
from gpdit_lightning.options.prepare import PrepareOptions
from gpdit_lightning.path_kinds import Medium
from gpdit_lightning.preparation.annotations import Annotation, Annotations, read_annotations
from gpdit_lightning.preparation.splits import (
    IN_HELD_OUT_FOLDER,
    IN_HELD_OUT_TAR,
    IN_NO_HELD_OUT_FOLDER,
    SplitChoice,
    choose_splits,
)
from gpdit_lightning.preparation.tars import find_tars, inner_tars

log = logging.getLogger(__name__)

FileFormat = Literal["video", "image", "tar"]
HashedValue = Literal["name", "bytes"]
"""What is hashed to hold out the images of a tar: TAR/KEY, or the bytes of the image file."""

NO_ANNOTATIONS = Annotations()


@dataclass(frozen=True)
class InputFile:
    """A video, an image or a tar of images."""

    path: Path
    name: str
    """Name of the file in metadata, records and reports: its path relative to the folder in which it was found. For a
    file of --validation_videos or --validation_images it begins with the name of that folder."""
    format: FileFormat
    split: Split | None
    """None for a tar whose images have a split each."""
    bytes: int
    """Size of the file, by which a change is detected."""
    reason: str = ""
    """Reason for the split."""
    captions: tuple[str, ...] = ()
    label: str | None = None
    """For a tar: the label of images that have no other one."""
    images: Annotations = NO_ANNOTATIONS
    """For a tar: annotations of its images."""
    hashed: HashedValue = "bytes"
    """For a tar: what is hashed to hold out its images. Data sets of older versions use the names."""

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
        return annotation_metadata(self.label, self.captions)

    @property
    def annotation_hash(self) -> str:
        """16 hexadecimal digits that change with label and captions."""
        return hashlib.sha256(json.dumps(self.annotation, sort_keys=True).encode()).hexdigest()[:16]


def annotation_metadata(label: str | None, captions: Sequence[str]) -> dict[str, Any]:
    """Return a label and captions as metadata of a sample."""
    values: dict[str, Any] = {"label": label} if label is not None else {}
    if captions:
        values["caption"] = captions[0]
    if len(captions) > 1:
        values["captions"] = list(captions)
    return values


class Inputs(NamedTuple):
    """Input files and their annotations."""

    files: list[InputFile]
    excluded: list[LeftOut]
    """Files that cannot be used, and files that the annotations exclude."""
    notes: list[LeftOut]
    """Files that are used under another name, and summaries of the files that are neither videos nor images."""
    annotations: Annotations


class Candidate(NamedTuple):
    """A file that was found."""

    path: Path
    name: str
    format: FileFormat
    held_out: bool
    """Whether it is in a held-out folder."""
    status: os.stat_result


def find_inputs(options: PrepareOptions, recorded: Mapping[str, Split | None] | None = None) -> Inputs:
    """Find every file to encode, in a fixed order, and choose its split.

    A file, links to it, and the same file found by several options are one recording, which is encoded once.

    Args:
        options: options that specify the files and the validation split.
        recorded: splits by file name that an earlier run chose; they are kept.

    Raises:
        InputError: there are no files, a path does not exist, or two files have the same name.
    """
    if not any((options.videos, options.images, options.image_tars)):
        raise InputError("there are no input files: give --videos, --images or --image_tars.")
    inputs, recorded = Inputs([], [], [], read_annotations(options.annotations)), recorded or {}
    candidates = _without_repeated(_find_candidates(options, inputs), inputs, recorded)
    _check_names(candidates)
    for medium in ("video", "image"):
        of_medium = [candidate for candidate in candidates if candidate.format == medium]
        held_out = {candidate.name for candidate in of_medium if candidate.held_out}
        has_folders = bool(options.validation_videos) if medium == "video" else _holds_out_images(options)
        names = [candidate.name for candidate in of_medium if not candidate.held_out]
        fraction = None if has_folders else options.validation_fraction
        splits = choose_splits(names, fraction, options.source_pattern, inputs.annotations, recorded)
        splits |= dict.fromkeys(held_out, IN_HELD_OUT_FOLDER)
        for candidate in of_medium:
            _add_file(candidate, splits[candidate.name], inputs, options.labels)
    if not any(candidate.format == "tar" for candidate in candidates):  # the names in a tar are read later
        for path in inputs.annotations.unused([candidate.name for candidate in candidates]):
            log.warning(
                "warning: %s lists none of the input files, so it has no effect: compare its names with the paths in "
                "the folders",
                path,
            )
    if options.labels:
        _check_labels_of_held_out_folders(options.validation_images, inputs.files)
    _add_tars([candidate for candidate in candidates if candidate.format == "tar"], options, inputs)
    return inputs


def _holds_out_images(options: PrepareOptions) -> bool:
    """Return whether options name the images to hold out, so that all others are for training."""
    return bool(options.validation_images or options.validation_image_tars)


def _check_labels_of_held_out_folders(folders: Sequence[Path], files: Sequence[InputFile]) -> None:
    """Raise InputError if held-out images have the name of the whole folder as label, which is no class of training."""
    classes = {file.label for file in files if file.split == "train"}
    for file in files if classes else ():
        folder = next((folder for folder in folders if file.path.parent == folder), None)
        if folder and file.label == as_text(folder.absolute().name) and file.label not in classes:
            raise InputError(
                f"the label of {file.path} is the name of its folder, {file.label}, which is no class of the training "
                "images: give --annotations with the classes of the held-out images (for ImageNet "
                "LOC_val_solution.csv, or ILSVRC2012_validation_ground_truth.txt and meta.mat), or sort them into "
                "folders."
            )


def _add_tars(candidates: Sequence[Candidate], options: PrepareOptions, inputs: Inputs) -> None:
    """Add tars of images to the inputs; a tar of tars as the tars in it."""
    found: list[tuple[Candidate, Path, str]] = []
    for candidate in candidates:
        inner, problems = inner_tars(candidate.path)
        inputs.excluded.extend(LeftOut(candidate.name, f"it {problem}") for problem in problems)
        found += [(candidate, candidate.path / tar.name, f"{candidate.name}/{tar.name}") for tar in inner]
        if not inner:
            found.append((candidate, candidate.path, candidate.name))
    classes = {path.stem for candidate, path, _ in found if not candidate.held_out}
    for candidate, path, name in found:
        split, reason = None, ""
        if candidate.held_out:
            split, reason = IN_HELD_OUT_TAR
        elif _holds_out_images(options):
            split, reason = IN_NO_HELD_OUT_FOLDER
        label = as_text(path.stem) if options.labels and path.stem in classes else None
        size = candidate.status.st_size
        inputs.files.append(InputFile(path, name, "tar", split, size, reason, label=label, images=inputs.annotations))


def _find_candidates(options: PrepareOptions, inputs: Inputs) -> list[Candidate]:
    """Return the files that the options specify, and add everything else in the folders to `inputs`."""
    groups: tuple[tuple[Medium, Sequence[Path], bool], ...] = (
        ("video", options.videos, False),
        ("video", options.validation_videos, True),
        ("image", options.images, False),
        ("image", options.validation_images, True),
    )
    found: list[tuple[FoundFile, FileFormat, bool]] = []
    for medium, paths, held_out in groups:
        for path in paths:
            findings = find_media(path, medium)
            folder = as_text(path.name or os.path.basename(os.path.abspath(path)))
            # File names often occur in both the training and the validation folder of a data set.
            prefix = f"{folder}/" if held_out and path.is_dir() else ""
            found += [(FoundFile(file, prefix + name), medium, held_out) for file, name in findings.files]
            inputs.excluded.extend(LeftOut(prefix + name, f"it {reason}") for name, reason, _ in findings.unusable)
            inputs.notes.extend(LeftOut(prefix + name, f"it {reason}") for name, reason, _ in findings.repeated)
            other: Medium = "image" if medium == "video" else "video"
            if any(path in searched for kind, searched, _ in groups if kind == other):
                findings.forget_others(other)
            if others := findings.describe_others():
                advice = f"; to use the {other}s too, give --{other}s {path}" if findings.has_others(other) else ""
                inputs.notes.append(LeftOut(folder, others + as_text(advice)))
    for pattern in (*options.image_tars, *options.validation_image_tars):
        tars, unusable = find_tars(pattern)
        found += [(file, "tar", pattern in options.validation_image_tars) for file in tars]
        inputs.excluded.extend(LeftOut(name, f"it {reason}") for name, reason, _ in unusable)
    candidates = []
    for (path, name), file_format, held_out in found:
        try:
            candidates.append(Candidate(path, name, file_format, held_out, path.stat()))
        except OSError as error:  # removed since it was found
            inputs.excluded.append(LeftOut(name, f"it cannot be read ({error.strerror})"))
    return candidates


def _without_repeated(
    candidates: Sequence[Candidate], inputs: Inputs, recorded: Mapping[str, Split | None]
) -> list[Candidate]:
    """Return each file once, though links to it or several options may give it several names; note the other names.

    Names that an earlier run recorded are kept. Otherwise the name is that in a held-out folder, if there is one, else
    one that the annotations contain, preferably for validation, else that of the file instead of a link, else the
    first. So neither a held-out file nor a link to it is trained on.
    """
    by_file: dict[tuple[int, int | Path], list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        by_file[identity_of(candidate.path, candidate.status)].append(candidate)
    kept: set[int] = set()
    for same in by_file.values():
        before = {candidate.name: candidate for candidate in same if candidate.name in recorded}
        chosen = list(before.values()) or [same[0]]
        if len(same) > 1 and not before:
            chosen = [min(same, key=lambda candidate: _rank_of_name(candidate, inputs.annotations))]
        kept |= set(map(id, chosen))
        for candidate in same:
            if candidate.name not in {choice.name for choice in chosen}:
                reason = f"it is the same file as {chosen[0].name} and is used under that name"
                inputs.notes.append(LeftOut(candidate.name, reason))
    return [candidate for candidate in candidates if id(candidate) in kept]


def _rank_of_name(candidate: Candidate, annotations: Annotations) -> tuple[bool, ...]:
    """Return a key that sorts the names of one file by preference; see `_without_repeated`."""
    annotation = annotations.get(candidate.name)
    is_unlisted = annotation == Annotation()
    return not candidate.held_out, annotation.split != "validation", is_unlisted, is_link(candidate.path)


def _add_file(candidate: Candidate, choice: SplitChoice, inputs: Inputs, label_by_folder: bool) -> None:
    """Add a video or an image to the inputs, with its annotation."""
    path, name, file_format, _, status = candidate
    if choice.split is None:
        inputs.excluded.append(LeftOut(name, choice.reason))
        return
    annotation = inputs.annotations.get(name)
    label = annotation.label or (as_text(path.absolute().parent.name) if label_by_folder else None)
    inputs.files.append(
        InputFile(path, name, file_format, choice.split, status.st_size, choice.reason, annotation.captions, label)
    )


def hash_path(path: Path) -> str:
    """Return 16 hexadecimal digits that identify the absolute path."""
    return hashlib.sha256(as_text(os.path.abspath(path)).encode()).hexdigest()[:16]


def _check_names(candidates: Sequence[Candidate]) -> None:
    """Raise InputError if two files have the same name."""
    by_name: dict[str, Path] = {}
    for candidate in candidates:
        if (other := by_name.setdefault(candidate.name, candidate.path)) is not candidate.path:
            raise InputError(
                f"{other} and {candidate.path} would both have the name {candidate.name}: give a folder that contains "
                "both, so that their names differ."
            )
