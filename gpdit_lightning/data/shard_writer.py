"""Writing shards: each whole or absent, with its index, one open for each split, kind and shape."""

import io
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from gpdit_lightning.data.manifest import Kind, ShardEntry, Split
from gpdit_lightning.data.shards import (
    KEY_PATTERN,
    LATENT_ENDING,
    METADATA_ENDING,
    Shape,
    described,
    index_of,
    index_path,
)
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write, partial_path, publish


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
        with atomic_write(index_path(self.path)) as temporary, temporary.open("wb") as file:
            np.save(file, index_of(partial_path(self.path), self.shape), allow_pickle=False)
        publish(self.path)  # after its index: a shard that has its name is complete
        return described(self.path, self.split, self.kind, self.shape, self.count)

    def abandon(self) -> None:
        """Leave nothing of the shard behind."""
        with suppress(OSError):  # a full disk takes no end of a tar either
            self._tar.close()
            self._file.close()
        for path in (partial_path(self.path), index_path(self.path)):
            path.unlink(missing_ok=True)


class ShardSetWriter:
    """Writes samples of several splits, kinds and shapes, one open shard for each, in shards of `shard_size` samples.

    A context manager: an exception inside the block removes the unfinished shards; complete ones stay.

    Args:
        directory: the manifest's folder.
        shard_size: most samples in one shard.
        part: number of the part of the data that is written here, where several write into one folder.
        complete: shards of this part that are there already: others take the numbers behind theirs.
    """

    def __init__(
        self, directory: Path, shard_size: int = 1000, part: int | None = None, complete: Sequence[ShardEntry] = ()
    ) -> None:
        if shard_size < 1:
            raise InputError(f"shard_size is {shard_size}: give at least 1 sample.")
        self.directory, self.shard_size = directory, shard_size
        self._part = "" if part is None else f"-{part:05d}"
        self._open: dict[str, ShardWriter] = {}
        self._complete = list(complete)
        self._next: dict[str, int] = {}  # number of a bucket's next shard
        for entry in complete:
            bucket, number = _bucket(entry.split, entry.kind, entry.shape), int(Path(entry.path).stem[-5:])
            self._next[bucket] = max(self._next.get(bucket, 0), number + 1)

    def __enter__(self) -> "ShardSetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._open.values():
            writer.abandon()

    def room(self, split: Split, kind: Kind, shape: Shape) -> int:
        """Samples until the open shard of a split, kind and shape is full."""
        writer = self._open.get(_bucket(split, kind, shape))
        return self.shard_size - (writer.count if writer else 0)

    def write(self, split: Split, kind: Kind, latent: np.ndarray, metadata: dict[str, Any]) -> None:
        """Append one sample (F, C, h, w) to the shard of its split, kind and shape; raises as `ShardWriter.write`."""
        F, C, h, w = latent.shape
        bucket = _bucket(split, kind, (F, C, h, w))
        if bucket not in self._open:
            number = self._next.setdefault(bucket, 0)
            name = f"{bucket}{self._part}-{number:05d}"
            self._open[bucket] = ShardWriter(self.directory, name, split, kind, (F, C, h, w))
            self._next[bucket] = number + 1
        writer = self._open[bucket]
        writer.write(f"{writer.name}-{writer.count:06d}", latent, metadata)
        if writer.count == self.shard_size:
            self._complete.append(writer.close())
            del self._open[bucket]

    def close(self) -> tuple[ShardEntry, ...]:
        """Complete every shard; returns all of them, sorted by name."""
        for bucket, writer in list(self._open.items()):
            if writer.count:
                self._complete.append(writer.close())
            else:  # its only sample was refused
                writer.abandon()
            del self._open[bucket]
        return tuple(sorted(self._complete, key=lambda entry: entry.path))


def _bucket(split: Split, kind: Kind, shape: Shape) -> str:
    return f"{split}-{kind}-{shape[0]}x{shape[2]}x{shape[3]}"
