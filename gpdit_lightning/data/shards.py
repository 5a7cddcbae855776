"""Shards: WebDataset tars of latents with a byte index beside each, read sample by sample.

A sample is two files of the tar, `KEY.latent.npy` (float16, the codec's raw latents, (F, C, h, w)) and `KEY.json`. The
tars are plain WebDataset; the index is only there so that a sample can be reached without walking through its shard.
"""

import io
import json
import math
import os
import re
import tarfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from xxhash import xxh3_64_intdigest

from gpdit_lightning.data.cache import ShardCache
from gpdit_lightning.data.manifest import PREPARE_AGAIN, Folder, Kind, ShardEntry, Split
from gpdit_lightning.data.remote import RemoteFile
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import sha256_of

T = TypeVar("T")
Shape = tuple[int, int, int, int]

LATENT_ENDING = "latent.npy"
METADATA_ENDING = "json"
# Columns of a byte index; behind them stands a checksum for each latent frame, since a clip may be read in part.
INDEX_COLUMNS = ("latent_offset", "json_offset", "json_size", "json_checksum")
INFINITE = np.uint16(0x7C00)  # the exponent of float16 values that are not finite
MOST_METADATA = 2**24  # bytes that are read of a sample's metadata, whatever a damaged index says
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]+")


class DamagedSampleError(InputError):
    """One sample of a shard cannot be used; its neighbours may be whole."""


class ShardReader:
    """Reads the samples of one shard by number.

    It opens its files at the first sample. It may be forked and pickled.

    Args:
        directory: the manifest's folder, on this machine or elsewhere.
        entry: the shard's entry in the manifest.
        cache: where copies of shards that lie elsewhere are kept.

    Raises:
        InputError: the folder is not on this machine, and there is no cache.
    """

    def __init__(self, directory: Folder, entry: ShardEntry, cache: ShardCache | None = None) -> None:
        self.path, self.index_path, self.entry = directory / entry.path, directory / entry.index, entry
        self._tar = _source(self.path, entry.sha256, entry.bytes)
        self._index_source = _source(self.index_path, entry.index_sha256)
        self._cache = cache
        self._file: io.FileIO | None = None
        self._index: np.ndarray | None = None
        if cache is None and self.files:
            raise InputError(f"{self.path} is not on this machine: give data.cache.directory a folder for copies.")

    def __len__(self) -> int:
        return self.entry.count

    def __getstate__(self) -> dict[str, Any]:
        # A mapped array would travel as its full content, an open file not at all.
        return self.__dict__ | {"_file": None, "_index": None}

    @property
    def files(self) -> tuple[RemoteFile, ...]:
        """What `ShardCache.prefetch` can bring before samples are read; nothing where the shard is on this machine."""
        return tuple(source for source in (self._index_source, self._tar) if isinstance(source, RemoteFile))

    def read(self, number: int, frames: int | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """One sample.

        Args:
            number: 0 to `len(self) - 1`.
            frames: keep only this many latent frames, from the start: a causal codec makes these the latents of the
                shorter clip, which no other part of a clip is.

        Returns:
            The raw latents (F, C, h, w) in float16, and the metadata.

        Raises:
            DamagedSampleError: when the sample is not what was written.
            InputError: when the index is unusable, `frames` is more than the shard has, or a shard that lies elsewhere
                cannot be fetched.
        """
        if not 0 <= number < self.entry.count:
            raise IndexError(f"sample {number} of {self.entry.count}")
        if frames is not None and not 1 <= frames <= self.entry.shape[0]:
            raise InputError(
                f"{self.path} has {self.entry.shape[0]} latent frames and {frames} were asked for: ask for fewer."
            )
        try:
            return self._read(number, frames)
        except InputError:
            if not self._dropped_damaged_copies():
                raise
        return self._read(number, frames)  # from new copies

    def _read(self, number: int, frames: int | None) -> tuple[np.ndarray, dict[str, Any]]:
        latent_offset, json_offset, json_size, json_checksum, *checksums = self.index[number].tolist()
        checksums = checksums[:frames]
        header, shape = npy_header(self.entry.shape), (len(checksums), *self.entry.shape[1:])
        latent_size = len(header) + 2 * math.prod(shape)
        try:
            with self._opened() as file:
                # No seeking: a forked process shares the position in the file.
                latent_bytes = os.pread(file.fileno(), latent_size, latent_offset)
                text = os.pread(file.fileno(), min(json_size, MOST_METADATA), json_offset)
        except InputError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a size below 0
            raise self._damaged(number, str(error)) from None
        if len(latent_bytes) != latent_size:
            raise self._damaged(number, "the file ends before it does")
        # Compared instead of parsed: whatever else a header may say is refused.
        if not latent_bytes.startswith(header):
            raise self._damaged(number, f"no float16 array {self.entry.shape} stands there")
        latent = np.frombuffer(latent_bytes, np.float16, offset=len(header)).reshape(shape)
        if [checksum(frame.data) for frame in latent] != checksums or checksum(text) != json_checksum:
            raise self._damaged(number, "its checksum differs")
        if (latent.view(np.uint16) & INFINITE).max() == INFINITE:
            raise self._damaged(number, "it has values that are not finite")
        try:
            return latent, json.loads(text.decode())
        except ValueError as error:
            raise self._damaged(number, str(error)) from None

    @property
    def index(self) -> np.ndarray:
        """The byte index, int64 (samples, 4 + F), mapped from disk at first use; see `INDEX_COLUMNS`."""
        if self._index is None:
            shape = (self.entry.count, len(INDEX_COLUMNS) + self.entry.shape[0])
            try:
                self._index = self._use(self._index_source, partial(_mapped, shape=shape))
            except InputError:
                raise
            except (OSError, ValueError) as error:
                raise InputError(f"{self.index_path} is no readable index ({error}): {PREPARE_AGAIN}.") from None
        return self._index

    def _opened(self) -> AbstractContextManager[io.FileIO]:
        """The shard; one on this machine stays open, while the cache must learn of every use of a copy."""
        if isinstance(self._tar, RemoteFile):
            return self._use(self._tar, _open)
        self._file = self._file or _open(self._tar)
        return nullcontext(self._file)

    def _use(self, source: Path | RemoteFile, read: Callable[[Path], T]) -> T:
        if isinstance(source, Path):
            return read(source)
        assert self._cache is not None
        return self._cache.use(source, read)

    def _dropped_damaged_copies(self) -> bool:
        """Whether a copy in the cache is not what was written; then it is gone, to be fetched again."""
        dropped = [self._cache is not None and self._cache.drop_if_damaged(file) for file in self.files]
        if any(dropped):
            self._index = None
        return any(dropped)

    def _damaged(self, number: int, reason: str) -> DamagedSampleError:
        return DamagedSampleError(
            f"Sample {number} of {self.path} is damaged ({reason}): copy the shard again or {PREPARE_AGAIN}."
        )


def _source(path: Folder, sha256: str, size: int | None = None) -> Path | RemoteFile:
    """Where a file is read from: itself if it is on this machine, else a copy."""
    return path if isinstance(path, Path) else RemoteFile(str(path), sha256, size)


def _open(path: Path) -> io.FileIO:
    return path.open("rb", buffering=0)


def _mapped(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """The index at a path; a ValueError where it is another array, or none."""
    header = npy_header(shape, "<i8")
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            raise ValueError(f"no int64 array {shape} stands there")
    return np.memmap(path, np.int64, "r", len(header), shape)


def checksum(content: bytes | memoryview) -> int:
    """63 bits that change with the content: as many as an index, of signed numbers, has room for."""
    return xxh3_64_intdigest(content) >> 1


def index_path(shard: Path) -> Path:
    """Where the byte index of a shard lies."""
    return shard.with_suffix(".index.npy")


def described(path: Path, split: Split, kind: Kind, shape: Shape, count: int) -> ShardEntry:
    """The entry of a complete shard for the manifest."""
    index = index_path(path)
    return ShardEntry(
        path=path.name,
        index=index.name,
        split=split,
        kind=kind,
        shape=shape,
        count=count,
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
        index_sha256=sha256_of(index),
    )


@lru_cache(maxsize=64)
def npy_header(shape: tuple[int, ...], values: str = "<f2") -> bytes:
    """What an `.npy` file of such values (float16, or "<i8": int64) in this shape begins with."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": values, "fortran_order": False, "shape": shape})
    return file.getvalue()


def index_of(path: Path, shape: Shape) -> np.ndarray:
    """The byte index of a tar: int64 (samples, 4 + F), in the tar's order.

    Raises:
        InputError: the tar is broken, or has a member that no shard of this library has: another name or ending, a
            path, a link.
    """
    header, frame_size = npy_header(shape), 2 * math.prod(shape[1:])
    rows: dict[str, dict[str, list[int]]] = {}
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar, path.open("rb") as file:
            for member in tar:
                key, _, ending = member.name.partition(".")
                known = ending in (LATENT_ENDING, METADATA_ENDING) and KEY_PATTERN.fullmatch(key) and member.isreg()
                if not 0 <= member.size <= size - member.offset_data:  # below 0, tarfile would go back, round for ever
                    raise tarfile.ReadError(f"{member.name!r} has {member.size} bytes, and the file ends before")
                if not known or ending in rows.setdefault(key, {}):
                    raise InputError(
                        f"{path} holds {member.name!r}, which is no part of a shard of latents: do not use this file, "
                        f"and {PREPARE_AGAIN}."
                    )
                file.seek(member.offset_data)
                content = file.read(member.size)
                if ending == METADATA_ENDING:
                    rows[key][ending] = [member.offset_data, member.size, checksum(content)]
                else:
                    starts = range(len(header), len(header) + shape[0] * frame_size, frame_size)
                    checksums = [checksum(content[start : start + frame_size]) for start in starts]
                    rows[key][ending] = [member.offset_data, *checksums]
        table = [[row[LATENT_ENDING][0], *row[METADATA_ENDING], *row[LATENT_ENDING][1:]] for row in rows.values()]
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{path} has a sample without its {error}: copy it again or {PREPARE_AGAIN}.") from None
    except Exception as error:  # tarfile has no error of its own for many kinds of damage
        raise InputError(f"{path} is no readable tar ({error}): copy it again or {PREPARE_AGAIN}.") from None
    return np.array(table, dtype=np.int64).reshape(-1, len(INDEX_COLUMNS) + shape[0])
