"""Explanation of how an input file was prepared: its split, size, frames and samples, or why it was skipped."""

import os
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from gpdit_lightning.data.manifest import FILE_NAME, NOTES_NAME, SKIPPED_NAME, Manifest
from gpdit_lightning.data.shard_entry import Split
from gpdit_lightning.data.shards import ShardReader
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.finding import LeftOut, medium_of
from gpdit_lightning.names import as_text, from_text, printable
from gpdit_lightning.options.prepare import PrepareOptions
from gpdit_lightning.preparation.annotations import Annotations
from gpdit_lightning.preparation.clips import Clip, ClipReader, Note, SkippedInput
from gpdit_lightning.preparation.input_files import FileFormat, HashedValue, InputFile, hash_path
from gpdit_lightning.preparation.inspection.lookup import Match, look_up
from gpdit_lightning.preparation.inspection.reasons import Sample, explain_frames, explain_size
from gpdit_lightning.preparation.prepare import INPUT_OPTIONS
from gpdit_lightning.preparation.record_formats import TEXTS, PartResult, RecordedFile
from gpdit_lightning.preparation.records import FOLDER_NAME, Records
from gpdit_lightning.preparation.splits import IN_HELD_OUT_FOLDER, SplitChoice, choose_split_by_hash, choose_splits
from gpdit_lightning.preparation.summary import read_left_out
from gpdit_lightning.preparation.tars import containing_file, iterate_samples
from gpdit_lightning.schema import check

HASHED_IN_WORDS: dict[HashedValue, str] = {"name": "its name", "bytes": "its bytes"}


class Subject(NamedTuple):
    """An input file, or an image in a tar, that is explained."""

    name: str
    """Name of the input file; TAR/KEY for an image in a tar."""
    format: FileFormat
    split: Split | None
    """None for a tar and its images."""
    reason: str
    """Reason for the split."""
    key: str
    """Key of an image in its tar; else empty."""
    path: Path | None
    """None if the location of the file is unknown."""
    hashed: HashedValue
    """What is hashed to hold out the images of a tar."""


def explain(manifest: Manifest, query: str) -> str:
    """Explain how one input file was prepared.

    Args:
        manifest: manifest of the folder.
        query: path of the file; or its name, as in metadata and records, or the end of its name; TAR/KEY for an image
            in a tar.

    Returns:
        Lines with the part of the file, its split, size and frames with the reasons, its samples, and what was skipped.
        For a file that is not in the data: how the same options would prepare it.

    Raises:
        InputError: the folder has no records of its input files, or `query` matches several of them.
    """
    return "\n".join(map(printable, Explainer(manifest).lines(query)))


class Explainer:
    """Explanations of the input files of one folder.

    Args:
        manifest: manifest of the folder.

    Raises:
        InputError: the folder has no records of its input files.
    """

    def __init__(self, manifest: Manifest) -> None:
        assert isinstance(manifest.directory, Path)
        self.codec, self.folder = manifest.codec, manifest.directory
        self.records = Records(self.folder)
        if not self.records.parts:
            raise InputError(
                f"{self.folder} has no folder {FOLDER_NAME!r} with records of the input files (prepare-pairs writes "
                "none): copy it from the machine where the data were prepared, or omit --why."
            )
        recorded = manifest.preparation
        names = ({field.name for field in fields(PrepareOptions)} - {*INPUT_OPTIONS}) & recorded.keys()
        path, cure = self.folder / FILE_NAME, "copy it again, or omit --why"
        # The manifest has only the last component of each path.
        self.inputs: dict[str, list[str]] = {
            name: check(recorded.get(name, []), TEXTS, f"preparation.{name}", str(path), cure) for name in INPUT_OPTIONS
        }
        try:
            self.options = PrepareOptions(out=self.folder, **{name: recorded[name] for name in names})
        except InputError as error:
            raise InputError(f"{path} records an option that `prepare` refuses ({error}): {cure}.") from None

    def lines(self, query: str) -> Iterator[str]:
        """Yield the lines about the file that matches `query`; raises InputError if several files match."""
        skipped, notes = (list(read_left_out(self.folder / name)) for name in (SKIPPED_NAME, NOTES_NAME))
        match = look_up(query, self.records, [entry.source for entry in (*skipped, *notes)])
        if match is None:
            yield from self._describe_new(Path(query if os.path.exists(query) else from_text(query)))
        elif match.file is None:
            yield f"{match.name} is in no part"
            yield from _remarks(skipped, notes, (match.name,))
        else:
            yield from self._describe_recorded(match, match.file)

    def _describe_recorded(self, match: Match, file: RecordedFile) -> Iterator[str]:
        query_path, key = match.interpretation
        description = "image in a tar" if key else file.format
        yield f"{match.name}: {description} of {file.bytes} bytes, in part {match.part}"
        if match.interpretation.size not in (None, file.bytes):
            yield f"the file now has {match.interpretation.size} bytes, so it is not the file that was encoded"
        if not self.records.is_finished(match.part):
            yield "its part is not finished: run the same `prepare` command again to finish it"
            return
        result = self.records.result(match.part)
        sources = _SampleSources(match.name, with_images=file.format == "tar" and not key)
        samples, unreadable = self._samples_of(result, sources, file.split)
        path = query_path if match.interpretation.size == file.bytes else self._find(file)
        subject = Subject(match.name, file.format, file.split, file.reason, key, path, file.hashed)
        yield from self._describe_preparation(subject, samples)
        yield from dict.fromkeys(unreadable)  # a damaged index gives the same message for all its samples
        yield from _remarks(result.skipped, result.notes, sources)

    def _samples_of(
        self, result: PartResult, sources: "_SampleSources", split: Split | None
    ) -> tuple[list[Sample], list[str]]:
        """Find the samples of these sources in the shards of a part.

        Returns:
            The samples, and a message for each sample that cannot be read.
        """
        samples: list[Sample] = []
        unreadable: list[str] = []
        for entry in result.shards:
            if split not in (None, entry.split):
                continue
            reader = ShardReader(self.folder, entry)
            for number in range(len(reader)):
                try:
                    _, metadata = reader.read(number, frames=1)  # only the metadata are needed
                except InputError as error:
                    unreadable.append(f"there may be another sample: {error}")
                    continue
                if metadata["source"] in sources:
                    location = f"{metadata['key']} of {entry.path}: "
                    frames = self.codec.pixel_frames(entry.shape[0])
                    size = metadata["pixel_size"]
                    samples.append(
                        Sample(location, metadata.get("first_frame"), frames, entry.split, size, entry.shape)
                    )
        return samples, unreadable

    def _describe_new(self, path: Path) -> Iterator[str]:
        if not path.is_file():
            yield f"{path} is not in the data and does not exist (for an image in a tar give TAR/KEY)"
            return
        file = self._as_input_file(path)
        if file is None:
            yield f"{path} is not in the data: files with the extension {path.suffix!r} are not prepared"
            return
        yield f"{path} is not in the data; the same options would prepare it as {file.name}"
        samples: list[Sample] = []
        reasons: list[str] = []
        for item in ClipReader(self.options, self.codec.temporal_factor).items(0, file):
            if isinstance(item, Clip):
                first, size = item.metadata.get("first_frame"), item.metadata["pixel_size"]
                samples.append(
                    Sample("", first, len(item.pixels), item.split, size, self.codec.latent_shape(item.pixels.shape))
                )
            elif isinstance(item, SkippedInput):
                reasons.append(f"skipped: {item.reason}")
            elif isinstance(item, Note):
                reasons.append(f"note: {item.reason}")
        yield from self._describe_preparation(
            Subject(file.name, file.format, file.split, file.reason, "", path, file.hashed), samples
        )
        yield from reasons

    def _describe_preparation(self, subject: Subject, samples: Sequence[Sample]) -> Iterator[str]:
        """Yield the lines that recorded and new files have in common."""
        fraction = self.options.validation_fraction
        if subject.format == "tar" and not subject.key:
            counts = Counter((sample.split, "x".join(map(str, sample.pixel_size))) for sample in samples)
            hashed = HASHED_IN_WORDS[subject.hashed]
            by_hash = f"each image is held out if the hash of {hashed} is below the fraction {fraction:g}"
            yield f"split: {f'{subject.split}, since {subject.reason}' if subject.split else by_hash}"
            yield f"samples: {len(samples)}"
            yield from (f"  {count} of {size} pixels for {split}" for (split, size), count in sorted(counts.items()))
            return
        split, reason = subject.split, subject.reason
        if split is None:
            split, reason = self._choose_split_of_image(subject, samples)
        if split is not None:
            yield f"split: {split}, since {reason}"
        yield from self._describe_size(subject, samples)
        yield f"samples: {len(samples)}"
        for sample in samples:
            shape = "x".join(map(str, sample.shape))
            frames = f", {sample.frames} frames from frame {sample.first_frame}" if subject.format == "video" else ""
            yield f"  {sample.location}latents {shape}{frames}"

    def _choose_split_of_image(self, subject: Subject, samples: Sequence[Sample]) -> SplitChoice:
        """Return the split of an image in a tar, None if it is unknown, since the image was skipped or moved."""
        fraction = self.options.validation_fraction
        if subject.hashed == "name":
            return choose_split_by_hash(subject.name, fraction)
        if subject.path is not None:
            hashes = (image.sha256 for image in iterate_samples(subject.path) if image.key == subject.key)
            if sha256 := next(hashes, ""):
                return choose_split_by_hash(sha256, fraction, "its bytes")
        split = samples[0].split if samples else None
        return SplitChoice(split, "a hash of its bytes decides")

    def _describe_size(self, subject: Subject, samples: Sequence[Sample]) -> Iterator[str]:
        if subject.path is not None:
            with suppress(InputError):  # an unreadable file is reported as skipped
                yield f"size: {explain_size(subject.path, subject.format, subject.key, self.options)}"
                if subject.format == "video":
                    factor = self.codec.temporal_factor
                    yield f"frames: {explain_frames(subject.path, samples, self.options, factor)}"
        elif samples:
            height, width = samples[0].pixel_size
            yield f"size: {height}x{width} pixels; to see the reason, give the path of the file"

    def _find(self, file: RecordedFile) -> Path | None:
        """Return the path of a recorded file, if it was not moved; None if it is not found."""
        for root in (Path.cwd(), *self.folder.absolute().parents):
            for folder in (name for names in self.inputs.values() for name in names):
                for path in (root / folder / file.name, root / file.name):
                    # The hash of the path excludes other files of the same name.
                    if hash_path(path) == file.path_hash and (found := containing_file(path)) is not None:
                        return path if found.stat().st_size == file.bytes else None
        return None

    def _as_input_file(self, path: Path) -> InputFile | None:
        """Return the input file that `prepare` would find at this path; None for a file of an unsupported format."""
        size = path.stat().st_size
        if path.suffix.lower() == ".tar":
            name = _name_below(path, self.inputs["image_tars"]) or as_text(path.name)
            return InputFile(path, name, "tar", None, size)
        medium = medium_of(path)
        if medium is None:
            return None
        held_out_name = _name_below(path, self.inputs[f"validation_{medium}s"], with_folder=True)
        name = held_out_name or _name_below(path, self.inputs[f"{medium}s"]) or as_text(path.name)
        choice = IN_HELD_OUT_FOLDER if held_out_name else self._choose_split(name, medium)
        return InputFile(path, name, medium, choice.split, size, choice.reason)

    def _choose_split(self, name: str, file_format: FileFormat) -> SplitChoice:
        """Choose the split of a new file of this name that is in no held-out folder."""
        recorded = {file.name: file.split for file in self.records.files if file.format == file_format}
        fraction = None if self.inputs[f"validation_{file_format}s"] else self.options.validation_fraction
        return choose_splits([*recorded, name], fraction, self.options.source_pattern, Annotations(), recorded)[name]


class _SampleSources:
    """Sources of the samples of an input file: its name; with images, the names of the images in a tar."""

    def __init__(self, name: str, with_images: bool) -> None:
        self.name, self.with_images = name, with_images

    def __contains__(self, source: object) -> bool:
        assert isinstance(source, str)
        return source == self.name or (self.with_images and source.startswith(f"{self.name}/"))


def _remarks(skipped: Iterable[LeftOut], notes: Iterable[LeftOut], sources: Container[str]) -> Iterator[str]:
    """Yield the reasons and notes about some sources."""
    yield from (f"skipped: {entry.reason}" for entry in skipped if entry.source in sources)
    yield from (f"note: {entry.reason}" for entry in notes if entry.source in sources)


def _name_below(path: Path, folders: Iterable[str], with_folder: bool = False) -> str | None:
    """Return the path of a file relative to the first of these folders that contains it; None if none does.

    Args:
        path: path of the file.
        folders: names of folders.
        with_folder: whether the result begins with the name of the folder.
    """
    parts = tuple(map(as_text, path.absolute().parts))
    for folder in folders:
        if folder in parts[:-1]:
            return "/".join(parts[parts.index(folder) + (0 if with_folder else 1) :])
    return None
