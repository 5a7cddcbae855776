"""From videos and images to latent shards and their manifest (GPDiT, section 5.1).

The input files are divided into parts (`records.py`). Each part is encoded (`encode.py`) by a process that has locked
it (`parts.py`), and the process that finishes the last part writes the manifest. So any number of processes on any
number of machines may run the same command, be killed, and run it again.
"""

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

from gpdit_lightning.codecs import Codec
from gpdit_lightning.data.manifest import FILE_NAME, SKIPPED_NAME, Manifest, Split
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write
from gpdit_lightning.media.images import parse_size
from gpdit_lightning.options.prepare import PrepareOptions
from gpdit_lightning.preparation import shots
from gpdit_lightning.preparation.input_files import InputFile, Inputs, find_inputs
from gpdit_lightning.preparation.parts import encode_parts, load_checked_codec
from gpdit_lightning.preparation.records import PartResult, Records

# Options that do not determine the content of a sample.
INPUT_OPTIONS = ("videos", "images", "image_tars", "validation_videos", "validation_images", "annotations")
RUN_OPTIONS = ("out", "codec_source", "device", "batch_size", "workers", "ray", "retry_skipped")
IMAGES_PER_VIDEO, VIDEOS_PER_TAR = 16, 64  # how `part_size` counts
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


def prepare(options: PrepareOptions) -> Manifest | None:
    """Encode every input file that is not encoded yet, then write the manifest.

    After an interruption the same call resumes and keeps complete shards; new input files are added to existing shards.
    Under `torchrun` or SLURM each rank encodes a share of the parts. Files that cannot be read and videos that are too
    short for a clip are skipped, and listed in `skipped.jsonl`.

    Returns:
        The manifest; None if other processes are still encoding, of which the last will write it.

    Raises:
        InputError: options that cannot be used, no input files, none that can be used, an input file that changed since
            it was encoded, or an output folder that holds other data, is full or cannot be written to.
    """
    check_options(options)
    records = Records(options.out)
    with _readable_inputs():
        inputs = _find_inputs(options, records)
    with _writable_output(options.out):
        return _prepare(options, records, inputs)


def list_input_files(options: PrepareOptions) -> list[InputFile]:
    """The input files that the options name, with the splits that their samples have."""
    return _find_inputs(options, Records(options.out)).files


def check_options(options: PrepareOptions) -> None:
    """Raise InputError for sizes that cannot be parsed, or if PySceneDetect is needed and missing."""
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
        _add_parts(options, records, _new_files(options, records, inputs))
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
    """The manifest, if it holds every input file already."""
    if not (options.out / FILE_NAME).exists() or not records.parts:
        return None
    records.check_options(sample_options(options))
    if records.unfinished_parts or _new_files(options, records, inputs):
        return None
    manifest = Manifest.load(options.out)
    print(f"{manifest.path} holds all of these input files already.")
    return manifest


def sample_options(options: PrepareOptions) -> dict[str, Any]:
    """The options that determine the content of the samples, as JSON values."""
    values = {name: value for name, value in asdict(options).items() if name not in (*INPUT_OPTIONS, *RUN_OPTIONS)}
    defaults = {"least_clip_frames": options.shortest_clip, "clip_step": options.frames_between_starts}
    return values | defaults | {name: list(values[name]) for name in ("video_sizes", "image_sizes")}


def _new_files(options: PrepareOptions, records: Records, inputs: Inputs) -> list[InputFile]:
    """The files that are in no part, and those without samples that are to be tried again.

    Raises:
        InputError: a file that was encoded has changed, or has another name now.
    """
    without_samples = {name for result in records.results.values() for name in result.without_samples}
    recorded = {file.name: file for file in records.files}
    names = {file.path_hash: file.name for file in recorded.values()}
    new = []
    for file in inputs.files:
        before = recorded.get(file.name)
        changed = before is not None and before.bytes != file.bytes
        if before is None and file.path_hash in names:
            raise InputError(
                f"{file.path} is in {options.out} already, as {names[file.path_hash]}: give the folder by which it was "
                "given before, or a list in that folder."
            )
        if before is None or (file.name in without_samples and (changed or options.retry_skipped)):
            new.append(file)
        elif changed:
            raise InputError(
                f"{file.path} has {file.bytes} bytes and had {before.bytes} when it was encoded for {options.out}: "
                "rename it, or give another --out."
            )
    return new


def _add_parts(options: PrepareOptions, records: Records, files: list[InputFile]) -> None:
    """Divide files into parts of videos, parts of images and parts of tars."""
    sizes = {
        "video": options.part_size,
        "image": options.part_size * IMAGES_PER_VIDEO,
        "tar": max(1, options.part_size // VIDEOS_PER_TAR),
    }

    def format_of(file: InputFile) -> int:
        return list(sizes).index("tar" if file.split is None else file.kind)

    for number, group in groupby(sorted(files, key=format_of), key=format_of):
        records.add_parts(list(group), list(sizes.values())[number])


def _write_manifest(options: PrepareOptions, records: Records, inputs: Inputs, codec: Codec) -> Manifest:
    """Write the manifest of all parts, and keep the one before under the name of its fingerprint."""
    results = list(records.results.values())
    skipped = [*inputs.excluded, *_finally_skipped(records)]
    if not any(result.shards for result in results):
        shutil.rmtree(records.folder)  # so that the files are tried again
        raise InputError(
            f"None of the {len(inputs.files)} input files could be used; the first: {skipped[0]['reason']}"
        )
    previous = Manifest.load(options.out) if (options.out / FILE_NAME).exists() else None
    used = {split: sum(result.used[split] for result in results) for split in get_args(Split)}
    input_options = {name: [Path(place).name for place in getattr(options, name)] for name in INPUT_OPTIONS}
    manifest = Manifest(
        directory=options.out,
        codec=codec.spec(),
        shards=tuple(sorted((shard for result in results for shard in result.shards), key=lambda shard: shard.path)),
        preparation=sample_options(options) | input_options,
        validation={
            "held_out_by": "source",
            "fraction": options.validation_fraction,
            "source_pattern": options.source_pattern,
            "train_sources": used["train"],
            "validation_sources": used["validation"],
        },
        labels=_all_labels(previous, inputs, results),
        skipped=len(skipped),
    )
    if previous is not None and previous.shards != manifest.shards:
        shutil.copyfile(options.out / FILE_NAME, options.out / f"manifest-{previous.fingerprint()[:16]}.json")
    with atomic_write(options.out / SKIPPED_NAME) as temporary:
        lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped)
        temporary.write_text("".join(lines), encoding="utf-8")
    manifest.save()
    return manifest


def _all_labels(previous: Manifest | None, inputs: Inputs, results: list[PartResult]) -> tuple[str, ...]:
    """The label names. A label is its position in the list, so earlier ones keep theirs, and new ones follow."""
    labels = list(dict.fromkeys([*(previous.labels if previous else ()), *inputs.annotations.labels]))
    of_samples = {label for result in results for label in result.labels}
    return (*labels, *sorted(of_samples.difference(labels))) if of_samples else ()


def _finally_skipped(records: Records) -> Iterator[dict[str, str]]:
    """What the parts skipped, except for files that a later part tried again."""
    latest = {file.name: part for part in records.parts for file in records.files_of_part(part)}
    for part, result in records.results.items():
        tried_again = {name for name in result.without_samples if latest[name] != part}
        for entry in result.skipped:
            file, _, _ = entry["source"].rpartition("/")  # the tar of an image
            if entry["source"] not in tried_again and file not in tried_again:
                yield entry


@contextmanager
def _readable_inputs() -> Iterator[None]:
    """Turn errors of the file system in the block into InputErrors about the input files."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}): check its permissions.") from None


@contextmanager
def _writable_output(out: Path) -> Iterator[None]:
    """Turn the errors of a full or read-only file system in the block into InputErrors about the output folder."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise InputError(
                f"{out} has no space left ({error.strerror}): free some and run the same command again; complete "
                "shards are kept."
            ) from None
        if error.errno in NOT_WRITABLE:
            raise InputError(
                f"{error.filename or out} cannot be written to ({error.strerror}): give another --out, or permission "
                "to write there; complete shards are kept."
            ) from None
        raise
