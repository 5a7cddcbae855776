"""Writing of shards and their indices; each appears under its name only when it is complete."""

import io
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from gpdit_lightning.data.shard_entry import LATENT_ONLY, ArrayName, Kind, ShardEntry, Split
from gpdit_lightning.data.shards import (
    KEY_PATTERN,
    LATENT_ENDING,
    METADATA_ENDING,
    Shape,
    build_index,
    index_path,
    shard_entry,
)
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write, partial_path, publish


def do_nothing(_: object) -> None:
    """Record nothing."""


class ShardWriter:
    """Writes one shard and its index, which are renamed to their final names when both are complete.

    The same samples in the same order give the same bytes.

    Args:
        directory: folder of the manifest; created if it does not exist.
        name: file name of the shard, without an ending.
        split: "train" or "validation".
        kind: "image", "video" or "sequence".
        shape: (F, C, h, w) of every latent.
        arrays: what is stored of each latent, A arrays, as in `ShardEntry.arrays`.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        split: Split,
        kind: Kind,
        shape: Shape,
        arrays: tuple[ArrayName, ...] = LATENT_ONLY,
    ) -> None:
        from webdataset import TarWriter  # only writers need it

        self.name, self.split, self.kind, self.shape, self.arrays = name, split, kind, shape, arrays
        self._stored_shape = shape[0], len(arrays) * shape[1], *shape[2:]
        self.path = directory / f"{name}.tar"
        self.count = 0
        directory.mkdir(parents=True, exist_ok=True)
        self._file = partial_path(self.path).open("wb")
        # A fixed time and owner, so that the bytes depend on the samples only.
        self._tar = TarWriter(self._file, encoder=False, mtime=0.0)

    def write(self, key: str, latent: np.ndarray, metadata: dict[str, Any]) -> None:
        """Append one sample.

        Args:
            key: letters, digits, `_` and `-`, since WebDataset ends a key at the first dot.
            latent: (F, A C, h, w), the arrays of the codec's raw latents; stored as float16.
            metadata: JSON values, stored together with the key and the kind.

        Raises:
            InputError: the key is invalid, the shape differs from the shard's, or a value is not finite in float16.
        """
        if not KEY_PATTERN.fullmatch(key):
            raise InputError(f"the sample key {key!r} may contain only letters, digits, '_' and '-': rename it.")
        if latent.shape != self._stored_shape:
            raise InputError(
                f"sample {key} has shape {latent.shape} where its shard has {self._stored_shape}: write it to another "
                "shard."
            )
        with np.errstate(over="ignore"):
            half = np.ascontiguousarray(latent, dtype=np.float16)
        if not np.isfinite(half).all():
            raise InputError(
                f"the latents of {metadata.get('source', key)} are not finite in float16 (largest magnitude "
                f"{np.abs(latent).max():.3g}): check the source and the codec's weights."
            )
        array = io.BytesIO()
        np.save(array, half, allow_pickle=False)
        text = json.dumps({"key": key, "kind": self.kind, **metadata}, ensure_ascii=False)
        self._tar.write({"__key__": key, LATENT_ENDING: array.getvalue(), METADATA_ENDING: text.encode()})
        self.count += 1

    def close(self, record: Callable[[ShardEntry], object] = do_nothing) -> ShardEntry:
        """Complete the shard and its index, and return the entry for the manifest.

        Args:
            record: called with the entry before the shard has its final name.
        """
        self._tar.close()
        self._file.close()
        tar = partial_path(self.path)
        with atomic_write(index_path(self.path)) as temporary, temporary.open("wb") as file:
            np.save(file, build_index(tar, self._stored_shape), allow_pickle=False)
        entry = shard_entry(self.path, self.split, self.kind, self.shape, self.count, self.arrays, tar=tar)
        record(entry)
        publish(self.path)  # after its index and its record, so that a shard with its final name is complete
        return entry

    def discard(self) -> None:
        """Remove the files of the shard if it is incomplete; a signal may arrive just after it has its final name."""
        with suppress(OSError):  # closing a tar writes its end, which fails on a full disk
            self._tar.close()
            self._file.close()
        partial_path(self.path).unlink(missing_ok=True)
        if not self.path.exists():
            index_path(self.path).unlink(missing_ok=True)


class ShardSetWriter:
    """Writes samples of several splits, kinds and shapes, with one open shard for each, `shard_size` samples per shard.

    A context manager: after an exception inside the block incomplete shards are removed; complete ones stay.

    Args:
        directory: folder of the manifest.
        shard_size: most samples in one shard.
        part: number of this part of the data, if several writers share a folder.
        complete: existing shards of this part; new shards have higher numbers.
        record: called with all complete shards, the new one last, before a shard has its final name.
    """

    def __init__(
        self,
        directory: Path,
        shard_size: int = 1000,
        part: int | None = None,
        complete: Sequence[ShardEntry] = (),
        record: Callable[[Sequence[ShardEntry]], object] = do_nothing,
    ) -> None:
        if shard_size < 1:
            raise InputError(f"shard_size is {shard_size}: give at least 1 sample.")
        self.directory, self.shard_size, self._record = directory, shard_size, record
        self._part = "" if part is None else f"-{part:05d}"
        self._open: dict[str, ShardWriter] = {}
        self._complete = list(complete)
        self._next_number: dict[str, int] = {}  # of the next shard, by name prefix
        for entry in complete:
            prefix, number = _name_prefix(entry.split, entry.kind, entry.shape), int(Path(entry.path).stem[-5:])
            self._next_number[prefix] = max(self._next_number.get(prefix, 0), number + 1)

    def __enter__(self) -> "ShardSetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._open.values():
            writer.discard()

    def remaining(self, split: Split, kind: Kind, shape: Shape) -> int:
        """Return the samples that still fit into the open shard of a split, kind and shape."""
        writer = self._open.get(_name_prefix(split, kind, shape))
        return self.shard_size - (writer.count if writer else 0)

    def write(
        self,
        split: Split,
        kind: Kind,
        latent: np.ndarray,
        metadata: dict[str, Any],
        arrays: tuple[ArrayName, ...] = LATENT_ONLY,
    ) -> None:
        """Append one sample (F, A C, h, w) to the shard of its split, kind and shape; raises as `ShardWriter.write`.

        All samples of a split, kind and shape have the same arrays.
        """
        F, channels, h, w = latent.shape
        C = channels // len(arrays)
        prefix = _name_prefix(split, kind, (F, C, h, w))
        if prefix not in self._open:
            number = self._next_number.setdefault(prefix, 0)
            name = f"{prefix}{self._part}-{number:05d}"
            self._open[prefix] = ShardWriter(self.directory, name, split, kind, (F, C, h, w), arrays)
            self._next_number[prefix] = number + 1
        writer = self._open[prefix]
        writer.write(f"{writer.name}-{writer.count:06d}", latent, metadata)
        if writer.count == self.shard_size:
            self._close(prefix)

    def close(self) -> tuple[ShardEntry, ...]:
        """Complete every open shard and return the entries of all shards, sorted by name."""
        for prefix, writer in list(self._open.items()):
            if writer.count:
                self._close(prefix)
            else:  # its only sample was invalid
                writer.discard()
                del self._open[prefix]
        return tuple(sorted(self._complete, key=lambda entry: entry.path))

    def _close(self, prefix: str) -> None:
        entry = self._open[prefix].close(lambda entry: self._record([*self._complete, entry]))
        self._complete.append(entry)
        del self._open[prefix]


def _name_prefix(split: Split, kind: Kind, shape: Shape) -> str:
    return f"{split}-{kind}-{shape[0]}x{shape[2]}x{shape[3]}"
