"""Preparation: encode videos and images as latent shards with a manifest (GPDiT, section 5.1).

The input files are divided into parts (`records.py`). A process locks a part (`parts.py`) and encodes it
(`encode.py`). The process that finishes the last part writes the manifest. Therefore any number of processes, on any
number of machines, can run the same command at once, and a killed process can be restarted.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from gpdit_lightning.codecs import Codec, find_codec
from gpdit_lightning.data.manifest import FILE_NAME, NOTES_NAME, SKIPPED_NAME, Manifest
from gpdit_lightning.data.shard_entry import Split
from gpdit_lightning.data.shards import ShardReader
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write
from gpdit_lightning.media.finding import LeftOut
from gpdit_lightning.media.images import parse_size
from gpdit_lightning.names import as_text, number_in
from gpdit_lightning.options.prepare import (
    HeldOutInputOptions,
    InputOptions,
    OutputOptions,
    PrepareOptions,
    ProcessOptions,
)
from gpdit_lightning.options.shared import MAX_COUNT, names_of
from gpdit_lightning.preparation import shots
from gpdit_lightning.preparation.encode import advise_deletion
from gpdit_lightning.preparation.input_files import FileFormat, InputFile, Inputs, find_inputs
from gpdit_lightning.preparation.parts import encode_parts, load_checked_codec
from gpdit_lightning.preparation.record_formats import PartResult
from gpdit_lightning.preparation.records import Records
from gpdit_lightning.retries import explain_write_errors

# Options that do not determine the content of a sample; the weights of the codec may be moved.
INPUT_OPTIONS = names_of(InputOptions, HeldOutInputOptions)
RUN_OPTIONS = (*names_of(OutputOptions, ProcessOptions), "codec_source")
IMAGES_PER_VIDEO, VIDEOS_PER_TAR = 16, 64  # `part_size` is a number of videos: part sizes of the other formats
KEPT = "Complete shards are kept."


def prepare(options: PrepareOptions) -> Manifest | None:
    """Encode every input file that is not encoded yet, then write the manifest.

    After an interruption the same call resumes and keeps complete shards. New input files are encoded into additional
    shards. Under `torchrun` or SLURM each rank encodes a share of the parts. Files that cannot be read and videos that
    are too short for a clip are skipped and listed in `skipped.jsonl`.

    Returns:
        The manifest; None if other processes are still encoding. The last of them writes the manifest.

    Raises:
        InputError: an option is invalid; no input file is found or usable; an input file, or its label or captions,
            changed after it was encoded; or the output folder contains other data, is full or is not writable.
    """
    check_options(options)
    records = Records(options.out)
    with explain_write_errors(options.out, KEPT):
        records.check_parts()
    with _explain_read_errors():
        inputs = _find_inputs(options, records)
    with explain_write_errors(options.out, KEPT):
        return _prepare(options, records, inputs)


def list_input_files(options: PrepareOptions) -> list[InputFile]:
    """Return the input files that the options specify, with their splits."""
    return _find_inputs(options, Records(options.out)).files


def check_options(options: PrepareOptions) -> None:
    """Raise InputError if a size cannot be parsed, or if PySceneDetect is needed and not installed."""
    for text in (*options.video_sizes, *options.image_sizes):
        parse_size(text)
    if options.avoid_cuts:
        shots.check_available()


def _find_inputs(options: PrepareOptions, records: Records) -> Inputs:
    return find_inputs(options, {file.name: file.split for file in records.files})


def _prepare(options: PrepareOptions, records: Records, inputs: Inputs) -> Manifest | None:
    if (manifest := _existing_manifest(options, records, inputs)) is not None:
        return manifest
    codec = load_checked_codec(options)
    with records.lock_all():
        records.record_settings(sample_options(options), codec.spec())
        _add_parts(options, records, _files_to_encode(options, records, inputs))
    if options.ray:
        from gpdit_lightning.preparation.ray_data import encode_parts_by_ray  # an optional extra

        encode_parts_by_ray(options, records, inputs.files)
    else:
        encode_parts(options, records, inputs.files, codec)
    with records.lock_all():
        if records.unfinished_parts:
            return None
        return _write_manifest(options, records, inputs, codec)


def _existing_manifest(options: PrepareOptions, records: Records, inputs: Inputs) -> Manifest | None:
    """Return the manifest if it already covers every input file, else None."""
    if not (options.out / FILE_NAME).exists() or not records.parts:
        return None
    records.check_options(sample_options(options))
    if records.unfinished_parts or _files_to_encode(options, records, inputs):
        return None
    manifest = Manifest.load(options.out)
    source = options.codec_source or find_codec(options.codec).default_source
    if source != manifest.codec.source:  # the same weights may lie elsewhere now
        records.check_codec(load_checked_codec(options).spec())
    if not manifest.has_content_hash:  # of an earlier version
        manifest.save()
    print(f"{manifest.path} already covers all of these input files.")
    return manifest


def sample_options(options: PrepareOptions) -> dict[str, Any]:
    """Return the options that determine the content of the samples, as JSON values."""
    values = {name: value for name, value in asdict(options).items() if name not in (*INPUT_OPTIONS, *RUN_OPTIONS)}
    defaults = {"least_clip_frames": options.shortest_clip, "clip_step": options.frames_between_starts}
    return values | defaults | {name: list(values[name]) for name in ("video_sizes", "image_sizes")}


def _files_to_encode(options: PrepareOptions, records: Records, inputs: Inputs) -> list[InputFile]:
    """Return the files that are in no part, and the files without samples that are to be retried.

    Raises:
        InputError: an encoded file has changed, or has another name, label or captions now.
    """
    latest, without_samples, to_retry = records.latest_parts, set(), set()
    for part, result in records.results.items():
        without_samples |= {name for name in result.without_samples if latest[name] == part}
        to_retry |= {entry.source for entry in result.skipped if entry.retry}
    recorded = {file.name: file for file in records.files}
    names = {file.path_hash: file.name for file in recorded.values()}
    new = []
    for file in inputs.files:
        before = recorded.get(file.name)
        changed = before is not None and before.bytes != file.bytes
        if before is None and file.path_hash in names:
            raise InputError(
                f"{file.path} is already in {options.out}, as {names[file.path_hash]}: specify the same folder as "
                "before, or a list in that folder."
            )
        retry = options.retry_skipped or file.name in to_retry
        if before is None or (file.name in without_samples and (changed or retry)):
            new.append(file)
        elif changed:
            raise InputError(
                f"{file.path} has {file.bytes} bytes but had {before.bytes} when it was encoded for {options.out}: "
                "rename it, or give another --out."
            )
        elif file.name not in without_samples and before.annotation not in (None, file.annotation_hash):
            raise InputError(
                f"{file.path} has another label or other captions than when it was encoded for {options.out}: give the "
                "same --annotations as before, or another --out."
            )
    return new


def _add_parts(options: PrepareOptions, records: Records, files: list[InputFile]) -> None:
    """Divide files into parts, each with files of one format: videos, images or tars."""
    sizes: dict[FileFormat, int] = {
        "video": options.part_size,
        "image": options.part_size * IMAGES_PER_VIDEO,
        "tar": max(1, options.part_size // VIDEOS_PER_TAR),
    }
    for file_format, size in sizes.items():
        records.add_parts([file for file in files if file.format == file_format], size)


def _write_manifest(options: PrepareOptions, records: Records, inputs: Inputs, codec: Codec) -> Manifest:
    """Write the manifest of all parts, and keep the previous one under the name of its fingerprint."""
    results = list(records.results.values())
    skipped = [*inputs.excluded, *_of_latest_attempts(records, "skipped")]
    notes = [*inputs.notes, *_of_latest_attempts(records, "notes")]
    if not any(result.shards for result in results):
        shutil.rmtree(records.folder)  # so that the next run retries the files
        raise InputError(
            f"none of the {len(inputs.files)} input files could be used. The first reason: {skipped[0].reason}"
        )
    previous = Manifest.load(options.out) if (options.out / FILE_NAME).exists() else None
    used = {split: sum(result.used[split] for result in results) for split in get_args(Split)}
    input_options = {name: [as_text(Path(path).name) for path in getattr(options, name)] for name in INPUT_OPTIONS}
    manifest = Manifest(
        directory=options.out,
        codec=codec.spec(),
        shards=tuple(sorted((shard for result in results for shard in result.shards), key=lambda shard: shard.path)),
        preparation=sample_options(options) | input_options,
        validation={
            "held_out_by": "source",
            "fraction": options.validation_fraction,
            "source_pattern": options.source_pattern,
            "hashed": _hashed_values(records),
            "train_sources": used["train"],
            "validation_sources": used["validation"],
        },
        labels=_label_names(previous, inputs, results),
        skipped=len(skipped),
    )
    _check_new_shards(manifest, previous)
    if previous is not None and previous.shards != manifest.shards:
        with atomic_write(options.out / f"manifest-{previous.fingerprint()[:16]}.json") as temporary:
            shutil.copyfile(options.out / FILE_NAME, temporary)
    for name, entries in ((SKIPPED_NAME, skipped), (NOTES_NAME, notes)):
        with atomic_write(options.out / name) as temporary:
            lines = (json.dumps(entry.to_json(), ensure_ascii=False) + "\n" for entry in entries)
            temporary.write_text("".join(lines), encoding="utf-8")
    manifest.save()
    return manifest


def _check_new_shards(manifest: Manifest, previous: Manifest | None) -> None:
    """Raise InputError if a shard that is not in the previous manifest is missing, or is not that of its result.

    The index has the hash that the result records, and the first and last samples agree with it and with their places.
    """
    known = set(previous.shards) if previous else set()
    for entry in manifest.shards:
        if entry not in known:
            reader = ShardReader(manifest.directory, entry)
            with advise_deletion(entry.path):
                for number in {0, entry.count - 1}:
                    reader.read(number)


def _label_names(previous: Manifest | None, inputs: Inputs, results: list[PartResult]) -> tuple[str, ...]:
    """Return the label names. The class number of a label is its position, so new labels follow the previous ones."""
    labels = list(dict.fromkeys([*(previous.labels if previous else ()), *inputs.annotations.labels]))
    sample_labels = {label for result in results for label in result.labels}
    if not sample_labels:
        return ()
    # Also those of files that could not be used, so that an index does not depend on that.
    of_files = {file.label for file in inputs.files if file.format != "tar" and file.label is not None}
    indices = [number_in(label) for label in sample_labels | {*labels}]
    if not of_files and all(index is not None and index < MAX_COUNT for index in indices):  # of .cls in tars
        of_indices = map(str, range(max(map(int, sample_labels)) + 1))
        return (*labels, *(label for label in of_indices if label not in labels))
    return (*labels, *sorted((sample_labels | of_files).difference(labels)))


def _hashed_values(records: Records) -> dict[str, str]:
    """Return what is hashed for the choice of held-out files and images, by kind of input."""
    description = {"files": "name, or the match of source_pattern in it"}
    tars = sorted({file.hashed for file in records.files if file.format == "tar" and file.split is None})
    if tars:
        names = {"bytes": "bytes of the image file", "name": "TAR/KEY (tars of an older version)"}
        description["images in tars"] = ", ".join(names[value] for value in tars)
    return description


def _of_latest_attempts(records: Records, name: Literal["skipped", "notes"]) -> Iterator[LeftOut]:
    """Yield the skipped inputs, or the notes, of all parts, except for files that a later part retried."""
    latest = records.latest_parts
    for part, result in records.results.items():
        retried = {file for file in result.without_samples if latest[file] != part}
        for entry in getattr(result, name):
            parents = map(str, PurePosixPath(entry.source).parents)  # one is the tar if the source is an image in a tar
            if retried.isdisjoint((entry.source, *parents)):
                yield entry


@contextmanager
def _explain_read_errors() -> Iterator[None]:
    """Convert file system errors in the block to InputErrors about the input files."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}): check its permissions.") from None
