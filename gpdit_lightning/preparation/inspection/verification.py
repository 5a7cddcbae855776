"""Verification of every byte and every sample of the shards."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from gpdit_lightning.data.manifest import FILE_NAME, NOTES_NAME, SKIPPED_NAME, Manifest
from gpdit_lightning.data.shard_entry import PREPARE_AGAIN, SHARD_NAME, ShardEntry
from gpdit_lightning.data.shards import MAX_INDEX_BYTES, ShardReader, build_index
from gpdit_lightning.devices import available_cores
from gpdit_lightning.errors import InputError
from gpdit_lightning.preparation.records import FOLDER_NAME, Records
from gpdit_lightning.progress import progress_bar
from gpdit_lightning.regular_files import read_bounded, sha256_of
from gpdit_lightning.schema import MAX_JSON_BYTES, parse_json, shown

CURE = f"copy it again or {PREPARE_AGAIN}."
MAX_SAMPLES_SHOWN = 10  # damaged samples per shard that are reported one by one


def verify(manifest: Manifest, workers: int | None = None) -> Iterator[str]:
    """Read every byte of every shard, with a progress bar.

    Checks size and sha256 of the tar, sha256 of the index, the index against the tar, and that every sample can be
    read, is finite, and has the key of its position and a label of the manifest.

    Args:
        manifest: manifest of the folder.
        workers: number of processes; None: one per core.

    Yields:
        A message for each fault, with the file, the sample if applicable, and the remedy.
    """
    assert isinstance(manifest.directory, Path)
    total = sum(entry.bytes for entry in manifest.shards)
    with ProcessPoolExecutor(workers or available_cores()) as pool:
        check = partial(verify_shard, manifest.directory, labels=manifest.labels)
        results = pool.map(check, manifest.shards)
        with progress_bar(total=total, desc="verifying", unit="B", unit_scale=True, disable=None) as bar:
            for entry, faults in zip(manifest.shards, results, strict=True):
                yield from faults
                bar.update(entry.bytes)


def verify_shard(directory: Path, entry: ShardEntry, labels: Sequence[str] | None = None) -> list[str]:
    """Return a message for each fault of one shard.

    Args:
        directory: folder of the manifest.
        entry: entry of the shard in the manifest.
        labels: labels of the manifest; None: labels are not compared.
    """
    path, index = directory / entry.path, directory / entry.index
    faults = list(_verify_file(path, entry.sha256, entry.bytes))
    index_faults = list(_verify_file(index, entry.index_sha256, most=MAX_INDEX_BYTES))
    faults += index_faults
    if not path.is_file():
        return faults
    tar_index: np.ndarray | None = None
    try:
        tar_index = build_index(path, entry.stored_shape)
    except InputError as error:
        faults.append(str(error))
    if index_faults:  # the positions of the samples cannot be trusted
        return faults
    reader = ShardReader(directory, entry)
    sample_faults = _verify_samples(reader, labels)
    faults += islice(sample_faults, MAX_SAMPLES_SHOWN)
    if more := sum(1 for _ in sample_faults):
        faults.append(f"{path} has {more} more samples with faults: {CURE}")
    if not faults and tar_index is not None and not np.array_equal(tar_index, reader.index):
        faults.append(f"{path} contains other samples than its index {index}: {CURE}")
    return faults


def _verify_file(path: Path, sha256: str, size: int | None = None, most: int | None = None) -> Iterator[str]:
    """Yield a message if a file differs from the manifest; one of more than `most` bytes is not read."""
    try:
        actual_size = path.stat().st_size
        if size is not None and actual_size != size:
            yield f"{path} has {actual_size} bytes, but {size} in the manifest (truncated or changed): {CURE}"
        elif most is not None and actual_size > most:
            yield f"{path} has {actual_size} bytes, more than the {most} that such a file may have: {CURE}"
        elif sha256_of(path) != sha256:
            yield f"{path} has another sha256 than in the manifest (damaged or changed): {CURE}"
    except FileNotFoundError:
        yield f"{path} is missing, but the manifest lists it: {CURE}"
    except OSError as error:
        yield f"{path} cannot be read ({error.strerror}): check the disk, or {CURE}"
    except InputError as error:
        yield str(error)


def _verify_samples(reader: ShardReader, labels: Sequence[str] | None) -> Iterator[str]:
    for number in range(len(reader)):
        try:
            _, metadata = reader.read(number)
        except InputError as error:
            yield str(error)
            continue
        key = f"{reader.path.stem}-{number:06d}"
        if metadata.get("key") != key:
            yield f"sample {number} of {reader.path} has the key {metadata.get('key')!r} instead of {key!r}: {CURE}"
        if (label := metadata.get("label")) is not None and labels is not None and label not in labels:
            yield f"sample {number} of {reader.path} has the label {shown(label)}, which the manifest lacks: {CURE}"


def unlisted_files(manifest: Manifest) -> list[str]:
    """Return the sorted names in the folder that are in none of its manifests and belong to no unfinished part."""
    directory = manifest.directory
    assert isinstance(directory, Path)
    records = Records(directory)
    listed = {FILE_NAME, SKIPPED_NAME, NOTES_NAME, FOLDER_NAME}
    for path in directory.glob("manifest-*.json"):
        if shards := _listed_files(path):
            listed |= {path.name, *shards}
    entries = [*manifest.shards, *(entry for result in records.results.values() for entry in result.shards)]
    listed |= {name for entry in entries for name in (entry.path, entry.index)}
    unfinished = set(records.unfinished_parts)

    def is_unfinished(name: str) -> bool:
        shard = SHARD_NAME.fullmatch(name.partition(".")[0])
        return shard is not None and shard["part"] is not None and int(shard["part"]) in unfinished

    names = (path.name for path in directory.iterdir())
    return sorted(name for name in names if name not in listed and not is_unfinished(name))


def _listed_files(manifest: Path) -> set[str]:
    """Return the files that a manifest lists; none if the file is not a manifest."""
    try:
        content: Any = parse_json(read_bounded(manifest, MAX_JSON_BYTES), str(manifest), CURE)
        return {entry[name] for entry in content["shards"] for name in ("path", "index")}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
