"""Videos and pictures to latent shards and their manifest (GPDiT, section 5.1).

The sources are cut into parts (`records.py`); whichever process holds a part encodes it (`encode.py`); whichever ends
the last one writes the manifest. So any number of processes on any number of machines may run the same command, be
killed, and run it again.
"""

import errno
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby, islice
from pathlib import Path
from typing import Any, get_args

from gpdit_lightning.codecs import Codec
from gpdit_lightning.data.manifest import FILE_NAME, SKIPPED_NAME, Manifest, Split
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import written_whole
from gpdit_lightning.preparation import shots
from gpdit_lightning.preparation.input_files import Found, InputFile, find_sources
from gpdit_lightning.preparation.options import PrepareOptions, check_options
from gpdit_lightning.preparation.parts import checked_codec, encode_parts
from gpdit_lightning.preparation.records import Records

# Options that do not decide what a sample holds.
PLACES = ("videos", "images", "image_tars", "validation_videos", "validation_images", "annotations")
SPEED_OPTIONS = ("out", "codec_source", "device", "batch_size", "workers", "ray", "retry_skipped")
PICTURES_FOR_A_VIDEO, VIDEOS_FOR_A_TAR = 16, 64  # how `part_size` counts
# What a folder that takes no more files says.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_ENTRY = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


def prepare(options: PrepareOptions) -> Manifest | None:
    """Encode every source that is not encoded yet, then write the manifest.

    Run again after an interruption it goes on, with complete shards kept; with new sources it extends what is there.
    Under `torchrun` or SLURM each rank takes parts of the work. Files that cannot be read and videos too short for a
    clip are left out, and named in `skipped.jsonl`.

    Returns:
        The manifest; None where other processes are still at work, of which the last will write it.

    Raises:
        InputError: for an option without sense, no sources, none that can be used, a folder that holds other data, that
            is full or that cannot be written to, a source that changed since it was encoded.
    """
    check_options(options)
    if options.avoid_cuts:
        shots.check_available()
    records = Records(options.out)
    try:
        found = _found(options, records)
    except OSError as error:
        raise InputError(
            f"{error.filename} cannot be read ({error.strerror}): look at your right to read it."
        ) from None
    try:
        return _prepare(options, records, found)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise InputError(
                f"{options.out} has no room left ({error.strerror}): free some and run the same command again; the "
                "shards that are complete are kept."
            ) from None
        if error.errno in NO_ENTRY:
            raise InputError(
                f"{error.filename or options.out} cannot be written to ({error.strerror}): give another --out, or the "
                "right to write there; what is there already is whole."
            ) from None
        raise


def list_input_files(options: PrepareOptions) -> list[InputFile]:
    """The sources that the options name, with the splits that their samples have."""
    return _found(options, Records(options.out)).sources


def _found(options: PrepareOptions, records: Records) -> Found:
    return find_sources(options, {source.name: source.split for source in records.recorded()})


def _prepare(options: PrepareOptions, records: Records, found: Found) -> Manifest | None:
    if (manifest := _already_there(options, records, found)) is not None:
        return manifest
    codec = checked_codec(options)
    with records.alone():
        records.begin(described(options), codec.spec())
        plan_parts(options, records, found)
    if options.ray:
        from gpdit_lightning.preparation.ray_data import encode_parts_by_ray  # an optional extra

        encode_parts_by_ray(options, records, found.sources)
    else:
        encode_parts(options, records, found.sources, codec)
    with records.alone():
        if records.unfinished():
            return None
        return merge(options, records, found, codec)


def _already_there(options: PrepareOptions, records: Records, found: Found) -> Manifest | None:
    """The manifest, where it holds every source already."""
    if not (options.out / FILE_NAME).exists() or not records.parts:
        return None
    records.check(described(options))
    if records.unfinished() or new_sources(options, records, found):
        return None
    manifest = Manifest.load(options.out)
    print(f"{manifest.path} already holds what these options make: nothing to do.")
    return manifest


def described(options: PrepareOptions) -> dict[str, Any]:
    """The options that decide what the shards hold, as JSON values."""
    values = {name: value for name, value in asdict(options).items() if name not in (*PLACES, *SPEED_OPTIONS)}
    resolved = {"least_clip_frames": options.shortest_clip, "clip_step": options.step}
    return values | resolved | {name: list(values[name]) for name in ("video_sizes", "image_sizes")}


def new_sources(options: PrepareOptions, records: Records, found: Found) -> list[InputFile]:
    """The sources that no part has, and those that gave nothing and shall be tried again.

    Raises:
        InputError: a source that was encoded is another file now, or goes by another name.
    """
    lost = {name for result in records.results().values() for name in result.lost}
    recorded = {source.name: source for source in records.recorded()}
    names = {source.place: source.name for source in recorded.values()}
    new = []
    for source in found.sources:
        before = recorded.get(source.name)
        changed = before is not None and before.bytes != source.bytes
        if before is None and source.place in names:
            raise InputError(
                f"{source.path} is in {options.out} already, as {names[source.place]}: give the folder that it was "
                "given by, or a list beside it."
            )
        if before is None or (source.name in lost and (changed or options.retry_skipped)):
            new.append(source)
        elif changed:
            raise InputError(
                f"{source.path} has {source.bytes} bytes and had {before.bytes} when it was encoded for {options.out}: "
                "give it another name, or prepare another --out."
            )
    return new


def plan_parts(options: PrepareOptions, records: Records, found: Found) -> None:
    """Cut the new sources into parts, each of one sort."""

    def sort(source: InputFile) -> int:
        return 2 if source.split is None else ("video", "image").index(source.kind)

    sizes = (
        options.part_size,
        options.part_size * PICTURES_FOR_A_VIDEO,
        max(1, options.part_size // VIDEOS_FOR_A_TAR),
    )
    for number, sources in groupby(sorted(new_sources(options, records, found), key=sort), key=sort):
        records.add(list(sources), sizes[number])


def merge(options: PrepareOptions, records: Records, found: Found, codec: Codec) -> Manifest:
    """Write the manifest of all parts; one that is there is kept under the name of its fingerprint."""
    results = records.results().values()
    skipped = [*found.left_out, *left_out_for_good(records)]
    if not any(result.shards for result in results):
        shutil.rmtree(records.folder)  # nothing to keep: mended files are new ones
        raise InputError(f"None of the {len(found.sources)} sources could be used; the first: {skipped[0]['reason']}")
    used = {split: sum(result.used[split] for result in results) for split in get_args(Split)}
    before = Manifest.load(options.out) if (options.out / FILE_NAME).exists() else None
    # A label is its place in the list: those that were there stay where they are.
    labels = list(dict.fromkeys([*(before.labels if before else ()), *found.annotations.labels]))
    new = {label for result in results for label in result.labels}.difference(labels)
    manifest = Manifest(
        directory=options.out,
        codec=codec.spec(),
        shards=tuple(sorted((shard for result in results for shard in result.shards), key=lambda shard: shard.path)),
        preparation=described(options)
        | {name: [Path(place).name for place in getattr(options, name)] for name in PLACES},
        validation={
            "held_out_by": "source",
            "fraction": options.validation_fraction,
            "source_pattern": options.source_pattern,
            "train_sources": used["train"],
            "validation_sources": used["validation"],
        },
        labels=(*labels, *sorted(new)) if new or any(result.labels for result in results) else (),
        skipped=len(skipped),
    )
    if before is not None and before.shards != manifest.shards:
        shutil.copyfile(options.out / FILE_NAME, options.out / f"manifest-{before.fingerprint()[:16]}.json")
    with written_whole(options.out / SKIPPED_NAME) as temporary:
        temporary.write_text(
            "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped), encoding="utf-8"
        )
    manifest.save()
    return manifest


def left_out_for_good(records: Records) -> Iterator[dict[str, str]]:
    """What the parts left out, but for the sources that a later part took up again."""
    latest = {source.name: part for part in records.parts for source in records.of_part(part)}
    for part, result in records.results().items():
        again = {name for name in result.lost if latest[name] != part}
        for entry in result.skipped:
            if entry["source"] not in again and entry["source"].rpartition("/")[0] not in again:
                yield entry


def summary(manifest: Manifest) -> str:
    """A table of what a manifest holds, by bucket, and what was left out."""
    totals: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for shard in manifest.shards:
        row = totals[shard.kind, "x".join(map(str, shard.shape)), shard.split]
        for column, amount in enumerate((1, shard.count, shard.bytes)):
            row[column] += amount
    lines = [f"{'kind':<6} {'latents FxCxhxw':<16} {'split':<11} {'shards':>6} {'samples':>8} {'MB':>9}"]
    for (kind, shape, split), (shards, count, size) in sorted(totals.items()):
        lines.append(f"{kind:<6} {shape:<16} {split:<11} {shards:>6} {count:>8} {size / 1e6:>9.1f}")
    lines.append(
        f"sources: {manifest.validation['train_sources']} for training, "
        f"{manifest.validation['validation_sources']} held out for validation"
    )
    if manifest.skipped:
        report = manifest.directory / SKIPPED_NAME
        lines.append(f"left out: {manifest.skipped} (all in {report})")
        if report.exists():  # not everyone copies it along
            with report.open(encoding="utf-8") as file:
                lines += [f"  {entry['source']}: {entry['reason']}" for entry in map(json.loads, islice(file, 10))]
    return "\n".join(lines)
