"""Shards: WebDataset tars of latents with a byte index beside each, written whole and read sample by sample.

A sample is two files of the tar, `KEY.latent.npy` (float16, the codec's raw latents, (F, C, h, w)) and `KEY.json`. The
tars are plain WebDataset; the index is only there so that a sample can be reached without walking through its shard.
"""

import io
import json
import re
import tarfile
import zlib
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from gpdit_lightning.data.manifest import PREPARE_AGAIN, Kind, ShardEntry, Split
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import partial_path, publish, sha256_of, written_whole

Shape = tuple[int, int, int, int]

LATENT_ENDING = "latent.npy"
METADATA_ENDING = "json"
INDEX_COLUMNS = ("latent_offset", "latent_size", "json_offset", "json_size", "latent_crc32")
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]+")


class DamagedSampleError(InputError):
    """One sample of a shard cannot be used; its neighbours may be whole."""


class ShardWriter:
    """Writes one shard and its index, which take their names when both are complete.

    The same samples in the same order give the same bytes.

    Args:
        directory: the manifest's folder; made when it is not there.
        name: file name of the shard, without an ending.
        split: "train" or "validation".
        kind: "image", "video" or "sequence".
        shape: (F, C, h, w) of every sample.
    """

    def __init__(self, directory: Path, name: str, split: Split, kind: Kind, shape: Shape) -> None:
        from webdataset import TarWriter  # readers need none of it

        self.name, self.split, self.kind, self.shape = name, split, kind, shape
        self.path = directory / f"{name}.tar"
        self.count = 0
        directory.mkdir(parents=True, exist_ok=True)
        self._file = partial_path(self.path).open("wb")
        # One fixed time and owner: the bytes depend on the samples alone.
        self._tar = TarWriter(self._file, encoder=False, mtime=0.0)

    def write(self, key: str, latent: np.ndarray, metadata: dict[str, Any]) -> None:
        """Append one sample.

        Args:
            key: letters, digits, `_` and `-`, since WebDataset ends a key at the first dot.
            latent: (F, C, h, w), the codec's raw latents; stored as float16.
            metadata: JSON values, stored with the key and the kind.

        Raises:
            InputError: when key or shape do not fit, or when a value is not finite in float16.
        """
        if not KEY_PATTERN.fullmatch(key):
            raise InputError(f"The sample key {key!r} may hold letters, digits, '_' and '-' only: rename it.")
        if latent.shape != self.shape:
            raise InputError(f"Sample {key} has shape {latent.shape} where its shard has {self.shape}: start another.")
        with np.errstate(over="ignore"):
            half = np.ascontiguousarray(latent, dtype=np.float16)
        if not np.isfinite(half).all():
            raise InputError(
                f"The latents of {metadata.get('source', key)} are not finite in float16 (largest magnitude "
                f"{np.abs(latent).max():.3g}): look at the source and at the codec's weights."
            )
        array = io.BytesIO()
        np.save(array, half, allow_pickle=False)
        text = json.dumps({"key": key, "kind": self.kind, **metadata}, ensure_ascii=False)
        self._tar.write({"__key__": key, LATENT_ENDING: array.getvalue(), METADATA_ENDING: text.encode()})
        self.count += 1

    def close(self) -> ShardEntry:
        """Complete the shard and its index, and describe them for the manifest."""
        self._tar.close()
        self._file.close()
        index = self.path.with_suffix(".index.npy")
        with written_whole(index) as temporary, temporary.open("wb") as file:
            np.save(file, _index_of(partial_path(self.path)), allow_pickle=False)
        publish(self.path)
        return ShardEntry(
            path=self.path.name,
            index=index.name,
            split=self.split,
            kind=self.kind,
            shape=self.shape,
            count=self.count,
            bytes=self.path.stat().st_size,
            sha256=sha256_of(self.path),
        )

    def abandon(self) -> None:
        """Leave nothing of the shard behind."""
        self._tar.close()
        self._file.close()
        partial_path(self.path).unlink(missing_ok=True)


class ShardSetWriter:
    """Writes samples of several splits, kinds and shapes, one open shard for each, in shards of `shard_size` samples.

    A context manager: an exception inside the block removes the unfinished shards.

    Args:
        directory: the manifest's folder.
        shard_size: most samples in one shard.
    """

    def __init__(self, directory: Path, shard_size: int = 1000) -> None:
        if shard_size < 1:
            raise InputError(f"shard_size is {shard_size}: give at least 1 sample.")
        self.directory, self.shard_size = directory, shard_size
        self._open: dict[str, ShardWriter] = {}
        self._begun: Counter[str] = Counter()
        self._complete: list[ShardEntry] = []

    def __enter__(self) -> "ShardSetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._open.values():
            writer.abandon()

    def write(self, split: Split, kind: Kind, latent: np.ndarray, metadata: dict[str, Any]) -> None:
        """Append one sample (F, C, h, w) to the shard of its split, kind and shape; raises as `ShardWriter.write`."""
        F, C, h, w = latent.shape
        bucket = f"{split}-{kind}-{F}x{h}x{w}"
        if bucket not in self._open:
            name = f"{bucket}-{self._begun[bucket]:05d}"
            self._open[bucket] = ShardWriter(self.directory, name, split, kind, (F, C, h, w))
            self._begun[bucket] += 1
        writer = self._open[bucket]
        writer.write(f"{writer.name}-{writer.count:06d}", latent, metadata)
        if writer.count == self.shard_size:
            self._complete.append(self._open.pop(bucket).close())

    def close(self) -> tuple[ShardEntry, ...]:
        """Complete every shard; returns all of them, sorted by name."""
        for bucket in list(self._open):
            writer = self._open.pop(bucket)
            if writer.count:
                self._complete.append(writer.close())
            else:  # its only sample was refused
                writer.abandon()
        return tuple(sorted(self._complete, key=lambda entry: entry.path))


class ShardReader:
    """Reads the samples of one shard by number.

    It holds no open file, only the mapped index, so it may be forked, pickled and kept by the hundred thousand.

    Args:
        directory: the manifest's folder.
        entry: the shard's entry in the manifest.
    """

    def __init__(self, directory: Path, entry: ShardEntry) -> None:
        self.path, self.index_path, self.entry = directory / entry.path, directory / entry.index, entry
        self._index: np.ndarray | None = None

    def __len__(self) -> int:
        return self.entry.count

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_index": None}  # a mapped array would travel as its full content

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
            InputError: when the index is unusable, or `frames` is more than the shard has.
        """
        if not 0 <= number < self.entry.count:
            raise IndexError(f"sample {number} of {self.entry.count}")
        if frames is not None and not 1 <= frames <= self.entry.shape[0]:
            raise InputError(
                f"{self.path} has {self.entry.shape[0]} latent frames and {frames} were asked for: ask for fewer."
            )
        latent_offset, latent_size, json_offset, json_size, checksum = (int(value) for value in self.index[number])
        try:
            with self.path.open("rb") as file:
                file.seek(latent_offset)
                latent_bytes = file.read(latent_size)
                file.seek(json_offset)
                metadata = json.loads(file.read(json_size))
        except (OSError, ValueError) as error:
            raise self._damaged(number, str(error)) from None
        if zlib.crc32(latent_bytes) != checksum:
            raise self._damaged(number, "the checksum of its latents differs")
        try:
            latent = np.load(io.BytesIO(latent_bytes), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise self._damaged(number, str(error)) from None
        if latent.dtype != np.float16 or latent.shape != self.entry.shape:
            raise self._damaged(
                number, f"{latent.dtype} {latent.shape} stands where float16 {self.entry.shape} belongs"
            )
        if not np.isfinite(latent).all():
            raise self._damaged(number, "it has values that are not finite")
        return latent[:frames], metadata

    @property
    def index(self) -> np.ndarray:
        """The byte index, int64 (samples, 5), mapped from disk at first use; the columns are `INDEX_COLUMNS`."""
        if self._index is None:
            try:
                index = np.load(self.index_path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise InputError(f"{self.index_path} is no readable index ({error}): {PREPARE_AGAIN}.") from None
            if index.dtype != np.int64 or index.shape != (self.entry.count, len(INDEX_COLUMNS)):
                raise InputError(
                    f"{self.index_path} holds {index.dtype} {index.shape} where int64 "
                    f"{(self.entry.count, len(INDEX_COLUMNS))} belongs: {PREPARE_AGAIN}."
                )
            self._index = index
        return self._index

    def _damaged(self, number: int, reason: str) -> DamagedSampleError:
        return DamagedSampleError(
            f"Sample {number} of {self.path} is damaged ({reason}): copy the shard again or {PREPARE_AGAIN}."
        )


def _index_of(path: Path) -> np.ndarray:
    """The byte index of a tar: int64 (samples, 5), in the tar's order."""
    rows: dict[str, dict[str, int]] = {}
    with tarfile.open(path) as tar, path.open("rb") as file:
        for member in tar:
            key, _, ending = member.name.partition(".")
            row = rows.setdefault(key, {})
            if ending == LATENT_ENDING:
                file.seek(member.offset_data)
                row["latent_crc32"] = zlib.crc32(file.read(member.size))
            prefix = "latent" if ending == LATENT_ENDING else "json"
            row[f"{prefix}_offset"], row[f"{prefix}_size"] = member.offset_data, member.size
    table = [[row[column] for column in INDEX_COLUMNS] for row in rows.values()]
    return np.array(table, dtype=np.int64).reshape(-1, len(INDEX_COLUMNS))
