"""Whether the shards are, byte by byte and sample by sample, what was prepared."""

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gpdit_lightning.data.manifest import FILE_NAME, PREPARE_AGAIN, SKIPPED_NAME, Manifest, ShardEntry
from gpdit_lightning.data.shards import ShardReader, index_of
from gpdit_lightning.devices import available_cores
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import sha256_of
from gpdit_lightning.preparation.encode import SHARD_NAME
from gpdit_lightning.preparation.records import FOLDER_NAME, Records

CURE = f"copy it again or {PREPARE_AGAIN}."
NAMED = 10  # damaged samples of a shard that are named one by one


def verify(manifest: Manifest, workers: int | None = None) -> Iterator[str]:
    """Read every byte of every shard, with a progress bar.

    Checked are size and sha256 of the tar, sha256 of the index, the index against the tar, and that every sample can be
    read, is finite and has the key of its place.

    Args:
        manifest: of the folder.
        workers: processes; None for one on each core.

    Yields:
        A sentence for each fault: the file, the sample if it is one, and what to do.

    Raises:
        InputError: `workers` is below 1.
    """
    if workers is not None and workers < 1:
        raise InputError(f"--workers is {workers}: give at least 1.")
    assert isinstance(manifest.directory, Path)
    total = sum(entry.bytes for entry in manifest.shards)
    with ProcessPoolExecutor(workers or available_cores()) as pool:
        found = pool.map(partial(faults_of, manifest.directory), manifest.shards)
        with tqdm(total=total, desc="verifying", unit="B", unit_scale=True, disable=None) as bar:
            for entry, faults in zip(manifest.shards, found, strict=True):
                yield from faults
                bar.update(entry.bytes)


def faults_of(directory: Path, entry: ShardEntry) -> list[str]:
    """What is wrong with one shard: a sentence each."""
    path, index = directory / entry.path, directory / entry.index
    faults = list(_faults_of_file(path, entry.sha256, entry.bytes))
    faults_of_index = list(_faults_of_file(index, entry.index_sha256))
    faults += faults_of_index
    if not path.is_file():
        return faults
    tar_index: np.ndarray | None = None
    try:
        tar_index = index_of(path, entry.shape)
    except InputError as error:
        faults.append(str(error))
    if faults_of_index:  # which may lead anywhere
        return faults
    reader = ShardReader(directory, entry)
    faults_of_samples = _faults_of_samples(reader)
    faults += islice(faults_of_samples, NAMED)
    if more := sum(1 for _ in faults_of_samples):
        faults.append(f"{path} has {more} more samples with faults: {CURE}")
    if not faults and tar_index is not None and not np.array_equal(tar_index, reader.index):
        faults.append(f"{path} holds other samples than {index} says: {CURE}")
    return faults


def _faults_of_file(path: Path, sha256: str, size: int | None = None) -> Iterator[str]:
    try:
        found_size = path.stat().st_size
        if size is not None and found_size != size:
            yield f"{path} has {found_size} bytes where the manifest says {size}, so it was cut off or changed: {CURE}"
        elif sha256_of(path) != sha256:
            yield f"{path} has another sha256 than the manifest says, so it was damaged or changed: {CURE}"
    except FileNotFoundError:
        yield f"{path} is missing though the manifest lists it: {CURE}"
    except OSError as error:
        yield f"{path} cannot be read ({error.strerror}): look at the disk, or {CURE}"


def _faults_of_samples(reader: ShardReader) -> Iterator[str]:
    for number in range(len(reader)):
        try:
            _, metadata = reader.read(number)
        except InputError as error:
            yield str(error)
            continue
        key = f"{reader.path.stem}-{number:06d}"
        if metadata.get("key") != key:
            yield f"Sample {number} of {reader.path} has the key {metadata.get('key')!r} where {key!r} belongs: {CURE}"


def strays(manifest: Manifest) -> list[str]:
    """The names in the folder that belong to no manifest there and to no preparation under way, sorted."""
    directory = manifest.directory
    assert isinstance(directory, Path)
    records = Records(directory)
    named = {FILE_NAME, SKIPPED_NAME, FOLDER_NAME}
    for path in directory.glob("manifest-*.json"):
        if shards := _shards_named_by(path):
            named |= {path.name, *shards}
    entries = [*manifest.shards, *(entry for result in records.results().values() for entry in result.shards)]
    named |= {name for entry in entries for name in (entry.path, entry.index)}
    under_way = set(records.unfinished())

    def is_under_way(name: str) -> bool:
        shard = SHARD_NAME.fullmatch(name.partition(".")[0])
        return shard is not None and int(shard.group(6)) in under_way

    found = (path.name for path in directory.iterdir())
    return sorted(name for name in found if name not in named and not is_under_way(name))


def _shards_named_by(manifest: Path) -> set[str]:
    """The files that another manifest lists; none where it is no manifest."""
    try:
        content: Any = json.loads(manifest.read_bytes())
        return {entry[name] for entry in content["shards"] for name in ("path", "index")}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
