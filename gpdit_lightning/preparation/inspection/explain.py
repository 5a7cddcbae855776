"""What became of an input file, and why: its split, its size, its frames, its samples, or why it was skipped."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from gpdit_lightning.data.manifest import SKIPPED_NAME, Kind, Manifest, Split
from gpdit_lightning.data.shards import ShardReader
from gpdit_lightning.errors import InputError
from gpdit_lightning.options.prepare import PrepareOptions
from gpdit_lightning.preparation.clips import Clip, ClipReader, SkippedInput
from gpdit_lightning.preparation.input_files import (
    EXTENSIONS,
    IN_HELD_OUT_FOLDER,
    IN_NO_HELD_OUT_FOLDER,
    SAME_RECORDING,
    InputFile,
    SplitChoice,
    choose_by_hash,
    hash_of_path,
    recording_of,
)
from gpdit_lightning.preparation.inspection.lookup import Match, look_up
from gpdit_lightning.preparation.inspection.reasons import Sample, reason_of_frames, reason_of_size
from gpdit_lightning.preparation.prepare import INPUT_OPTIONS
from gpdit_lightning.preparation.records import FOLDER_NAME, PartResult, RecordedFile, Records


class Subject(NamedTuple):
    """An input file, or an image of a tar, that is explained."""

    name: str
    """For an image of a tar TAR/KEY."""
    kind: Kind
    split: Split | None
    """None for a tar and its images."""
    reason: str
    """Of the split."""
    key: str
    """Of an image in its tar; else empty."""
    path: Path | None
    """None if it is unknown where the file is."""


def explain(manifest: Manifest, query: str) -> str:
    """What became of one input file, in lines.

    Args:
        manifest: of the folder.
        query: path of the file; or its name, as in metadata and records, or the end of that; for an image of a tar
            TAR/KEY.

    Returns:
        The part it is in; its split, size and frames, with the reasons; every sample that it gave; what was skipped.
        For a file that is not in the data: what the same options would make of it.

    Raises:
        InputError: the folder has no records of its input files, or `query` may mean several of them.
    """
    return "\n".join(Explainer(manifest).lines(query))


class Explainer:
    """Answers queries about the input files of one folder.

    Args:
        manifest: of the folder.

    Raises:
        InputError: the folder has no records of its input files.
    """

    def __init__(self, manifest: Manifest) -> None:
        assert isinstance(manifest.directory, Path)
        self.codec, self.folder = manifest.codec, manifest.directory
        self.records = Records(self.folder)
        if not self.records.parts:
            raise InputError(
                f"{self.folder} has no folder {FOLDER_NAME!r} with records of the input files (prepare-pairs makes "
                "none): copy it from where the data were prepared, or omit --why."
            )
        recorded = manifest.preparation
        names = ({field.name for field in fields(PrepareOptions)} - {*INPUT_OPTIONS}) & recorded.keys()
        self.options = PrepareOptions(out=self.folder, **{name: recorded[name] for name in names})
        # The last component of each path; the manifest has no more.
        self.inputs: dict[str, list[str]] = {name: recorded.get(name, []) for name in INPUT_OPTIONS}

    def lines(self, query: str) -> Iterator[str]:
        """The lines about what `query` means; raises InputError if it may be several files."""
        skipped = self._skipped()
        match = look_up(query, self.records, [entry["source"] for entry in skipped])
        if match is None:
            yield from self._about_new(Path(query))
        elif match.file is None:
            yield f"{match.name} is in no part"
            yield from (f"skipped: {entry['reason']}" for entry in skipped if entry["source"] == match.name)
        else:
            yield from self._about_recorded(match, match.file)

    def _skipped(self) -> list[dict[str, str]]:
        path = self.folder / SKIPPED_NAME
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def _about_recorded(self, match: Match, file: RecordedFile) -> Iterator[str]:
        given, key = match.interpretation
        kind = file.kind if file.split else "image in a tar" if key else "tar"
        yield f"{match.name}: {kind} of {file.bytes} bytes, in part {match.part}"
        if match.interpretation.size not in (None, file.bytes):
            yield f"the file has {match.interpretation.size} bytes now, so it is not the one that was encoded"
        if not self.records.is_finished(match.part):
            yield "its part is not finished: run the same `prepare` command again to finish it"
            return
        result = self.records.result(match.part)
        names = _Names(match.name, with_images=file.split is None and not key)
        samples, unreadable = self._samples_of(result, names, file.split)
        path = given if match.interpretation.size == file.bytes else self._find(file)
        yield from self._describe(Subject(match.name, file.kind, file.split, file.reason, key, path), samples)
        yield from dict.fromkeys(unreadable)  # a damaged index gives the same message for all its samples
        yield from (f"skipped: {entry['reason']}" for entry in result.skipped if entry["source"] in names)

    def _samples_of(self, result: PartResult, names: "_Names", split: Split | None) -> tuple[list[Sample], list[str]]:
        """The samples with these names in the shards of a part, and a message for each that cannot be read."""
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
                    unreadable.append(f"unknown whether there is one more sample: {error}")
                    continue
                if metadata["source"] in names:
                    location = f"{metadata['key']} of {entry.path}: "
                    frames = self.codec.pixel_frames(entry.shape[0])
                    size = metadata["pixel_size"]
                    samples.append(
                        Sample(location, metadata.get("first_frame"), frames, entry.split, size, entry.shape)
                    )
        return samples, unreadable

    def _about_new(self, path: Path) -> Iterator[str]:
        if not path.is_file():
            yield f"{path} is not in the data, and no such file exists here (for an image of a tar give TAR/KEY)"
            return
        file = self._as_input_file(path)
        if file is None:
            yield f"{path} is not in the data: files with the extension {path.suffix!r} are not prepared"
            return
        yield f"{path} is not in the data; with the same options, it would be there as {file.name}"
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
        yield from self._describe(Subject(file.name, file.kind, file.split, file.reason, "", path), samples)
        yield from reasons

    def _describe(self, subject: Subject, samples: Sequence[Sample]) -> Iterator[str]:
        """The lines that recorded and new files have in common."""
        fraction = self.options.validation_fraction
        if subject.split is None and not subject.key:
            counts = Counter((sample.split, "x".join(map(str, sample.pixel_size))) for sample in samples)
            yield f"split: each image is held out if the hash of its name is below the fraction {fraction:g}"
            yield f"samples: {len(samples)}"
            yield from (f"  {count} of {size} pixels for {split}" for (split, size), count in sorted(counts.items()))
            return
        split, reason = subject.split, subject.reason
        if split is None:
            split, reason = choose_by_hash(subject.name, fraction)
        yield f"split: {split}: {reason}"
        yield from self._describe_size(subject, samples)
        yield f"samples: {len(samples)}"
        for sample in samples:
            shape = "x".join(map(str, sample.shape))
            cut = f", {sample.frames} frames from {sample.first_frame} on" if subject.kind == "video" else ""
            yield f"  {sample.location}latents {shape}{cut}"

    def _describe_size(self, subject: Subject, samples: Sequence[Sample]) -> Iterator[str]:
        if subject.path is not None:
            with suppress(InputError):  # what cannot be read is reported as skipped
                yield f"size: {reason_of_size(subject.path, subject.kind, subject.key, self.options)}"
                if subject.kind == "video":
                    factor = self.codec.temporal_factor
                    yield f"frames: {reason_of_frames(subject.path, samples, self.options, factor)}"
        elif samples:
            height, width = samples[0].pixel_size
            yield f"size: {height}x{width} pixels were chosen; for the reason give the path of the file"

    def _find(self, file: RecordedFile) -> Path | None:
        """Where a recorded file is, if it did not move; None if it is not found."""
        for root in (Path.cwd(), *self.folder.absolute().parents):
            for folder in (name for names in self.inputs.values() for name in names):
                for path in (root / folder / file.name, root / file.name):
                    # The hash of the path shows that it is no other file of that name.
                    if hash_of_path(path) == file.path_hash and path.is_file() and path.stat().st_size == file.bytes:
                        return path
        return None

    def _as_input_file(self, path: Path) -> InputFile | None:
        """A file as `prepare` would take it from one of the recorded folders; None if it takes no such file."""
        size, extension = path.stat().st_size, path.suffix.lower()
        if extension == ".tar":
            return InputFile(path, _name_below(path, self.inputs["image_tars"]) or path.name, "image", None, size)
        kind = next((kind for kind, extensions in EXTENSIONS.items() if extension in extensions), None)
        if kind is None:
            return None
        held_out_name = _name_below(path, self.inputs[f"validation_{kind}s"], with_folder=True)
        name = held_out_name or _name_below(path, self.inputs[f"{kind}s"]) or path.name
        choice = IN_HELD_OUT_FOLDER if held_out_name else self._choose_split(name, kind)
        return InputFile(path, name, kind, choice.split, size, choice.reason)

    def _choose_split(self, name: str, kind: Kind) -> SplitChoice:
        """The split of a new file of this name that is in no held-out folder."""
        pattern = self.options.source_pattern
        recording = recording_of(name, pattern)
        for file in self.records.files:
            if file.split and recording_of(file.name, pattern) == recording:
                return SplitChoice(file.split, SAME_RECORDING)
        if self.inputs[f"validation_{kind}s"]:
            return IN_NO_HELD_OUT_FOLDER
        return choose_by_hash(recording, self.options.validation_fraction)


class _Names:
    """The sources of samples that belong to an input file: its own name; with images, those of a tar's images."""

    def __init__(self, name: str, with_images: bool) -> None:
        self.name, self.with_images = name, with_images

    def __contains__(self, source: str) -> bool:
        return source == self.name or (self.with_images and source.startswith(f"{self.name}/"))


def _name_below(path: Path, folders: Iterable[str], with_folder: bool = False) -> str | None:
    """The name of a file that is below one of these folders, relative to it or with its name; else None."""
    parts = path.absolute().parts
    for folder in folders:
        if folder in parts[:-1]:
            return "/".join(parts[parts.index(folder) + (0 if with_folder else 1) :])
    return None
