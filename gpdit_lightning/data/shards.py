"""Reading of shards: WebDataset tars of latents, each with a byte index, so that any sample is read directly.

A sample is two members of the tar, `KEY.latent.npy` (float16, the codec's raw latents, (F, C, h, w), or several such
arrays along the channels, as `ShardEntry.arrays` lists them) and `KEY.json`. A key is the name of the shard, a dash,
and the number of the sample in six digits.
The tars are plain WebDataset; the index avoids walking through a tar to find a sample, and binds the samples to the
manifest: it has the hash that the manifest records, and contains the checksums of all bytes that are read.
"""

import errno
import hashlib
import io
import math
import os
import re
import tarfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from xxhash import xxh3_64_intdigest

from gpdit_lightning.data.cache import ShardCache
from gpdit_lightning.data.manifest import Folder
from gpdit_lightning.data.remote import RemoteFile, WrongContentError
from gpdit_lightning.data.shard_entry import LATENT_ONLY, PREPARE_AGAIN, SHARD_NAME, ArrayName, Kind, ShardEntry, Split
from gpdit_lightning.errors import InputError
from gpdit_lightning.regular_files import BoundedReader, open_regular, read_bounded, sha256_of
from gpdit_lightning.retries import retried, transient_error
from gpdit_lightning.schema import COUNT, POSITIVE_NUMBER, SIZE, TEXT, Constraint, check, parse_json, shown

T = TypeVar("T")
Shape = tuple[int, int, int, int]

LATENT_ENDING = "latent.npy"
METADATA_ENDING = "json"
# First columns of a byte index; a checksum of each latent frame follows, since clips may be read in part.
INDEX_COLUMNS = ("latent_offset", "json_offset", "json_size", "json_checksum")
EXPONENT_MASK = np.uint16(0x7C00)  # all exponent bits of a float16: set if the value is not finite
MAX_METADATA_BYTES = 2**24  # of a sample
MAX_INDEX_BYTES = 2**30
COPY_AGAIN = f"copy the shard again or {PREPARE_AGAIN}"
TWO_SIZES = Constraint(
    "a list of two positive integers",
    lambda value: isinstance(value, list) and len(value) == 2 and all(map(SIZE.accepts, value)),
)
METADATA_SCHEMA = {"key": TEXT, "kind": TEXT}
OPTIONAL_METADATA: dict[str, Constraint] = {
    **{"source": TEXT, "label": TEXT, "caption": TEXT, "task": TEXT, "stride": SIZE, "fps": POSITIVE_NUMBER},
    **{"first_frame": COUNT, "pixel_size": TWO_SIZES},
}
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]+")


class DamagedSampleError(InputError):
    """A sample of a shard is damaged; other samples of the shard may be intact."""


class DamagedShardError(DamagedSampleError):
    """A shard is missing, or its index is not that of its manifest, so that no sample of it can be read."""


class ShardReader:
    """Reads the samples of one shard by number.

    It opens its files when the first sample is read. It may be forked and pickled.

    Args:
        directory: folder of the manifest, local or remote.
        entry: entry of the shard in the manifest.
        cache: cache for copies of remote shards.

    Raises:
        InputError: the folder is remote, and there is no cache.
    """

    def __init__(self, directory: Folder, entry: ShardEntry, cache: ShardCache | None = None) -> None:
        self.path, self.index_path, self.entry = directory / entry.path, directory / entry.index, entry
        self._tar = _path_or_remote_file(self.path, entry.sha256, entry.bytes)
        self._name = self.path.stem
        self._index_shape = entry.count, len(INDEX_COLUMNS) + entry.shape[0]
        index_bytes = len(npy_header(self._index_shape, "<i8")) + 8 * math.prod(self._index_shape)
        self._index_file = _path_or_remote_file(self.index_path, entry.index_sha256, index_bytes)
        self._cache = cache
        self._tar_file: io.FileIO | None = None
        self._index: np.ndarray | None = None
        self._unusable: str | None = None  # why no sample can be read, found at an earlier attempt to fetch it
        if cache is None and self.files:
            raise InputError(f"{self.path} is not on this machine: set data.cache.directory to a folder for copies.")

    def __len__(self) -> int:
        return self.entry.count

    def __del__(self) -> None:
        # Python warns of a file that it has to close itself. The attribute is missing if the constructor has failed.
        if file := self.__dict__.get("_tar_file"):
            file.close()

    def __getstate__(self) -> dict[str, Any]:
        # An open file cannot be pickled, and the index would take time.
        return self.__dict__ | {"_tar_file": None, "_index": None}

    @property
    def files(self) -> tuple[RemoteFile, ...]:
        """The remote files of the shard, for `ShardCache.prefetch`; empty for a local shard."""
        return tuple(file for file in (self._index_file, self._tar) if isinstance(file, RemoteFile))

    def read(self, number: int, frames: int | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Read and verify one sample; arguments and errors as for `read_arrays`.

        Returns:
            The raw latents (F, C, h, w) in float16, and the metadata.
        """
        arrays, metadata = self.read_arrays(number, frames)
        return arrays["mean"], metadata

    def read_arrays(self, number: int, frames: int | None = None) -> tuple[dict[ArrayName, np.ndarray], dict[str, Any]]:
        """Read and verify all that is stored of one sample.

        Args:
            number: 0 to `len(self) - 1`.
            frames: number of latent frames to read, from the start; None for all. Since the codec is causal, they are
                the latents of the shorter clip.

        Returns:
            The arrays (F, C, h, w) of `ShardEntry.arrays` by name, in float16, and the metadata.

        Raises:
            DamagedSampleError: the sample differs from what was written.
            DamagedShardError: a file of the shard is missing or is not that of the manifest.
            InputError: the shard has fewer frames, or a remote shard cannot be fetched.
            TransientError: three attempts to read a file failed for a reason other than its content.
        """
        if not 0 <= number < self.entry.count:
            raise IndexError(f"sample {number} of {self.entry.count}")
        if frames is not None and not 1 <= frames <= self.entry.shape[0]:
            raise InputError(
                f"{self.path} has {self.entry.shape[0]} latent frames and {frames} were requested: request 1 to "
                f"{self.entry.shape[0]}."
            )
        if self._unusable:
            raise DamagedShardError(self._unusable)
        try:
            try:
                return self._read(number, frames)
            except InputError:
                if not self._remove_damaged_copies():
                    raise
            return self._read(number, frames)  # from new copies
        except WrongContentError as error:
            self._unusable = str(error)
            raise DamagedShardError(self._unusable) from None

    @retried
    def _read(self, number: int, frames: int | None) -> tuple[dict[ArrayName, np.ndarray], dict[str, Any]]:
        latent_offset, json_offset, json_size, json_checksum, *checksums = self.index[number].tolist()
        checksums = checksums[:frames]
        stored_shape = self.entry.stored_shape
        header, shape = npy_header(stored_shape), (len(checksums), *stored_shape[1:])
        latent_size = len(header) + 2 * math.prod(shape)
        try:
            with self._open_tar() as file:
                latent_bytes = _read_at(file, latent_size, latent_offset)
                text = _read_at(file, min(json_size, MAX_METADATA_BYTES), json_offset)
        except InputError:
            raise
        except (OSError, OverflowError) as error:  # an offset that is negative, or too large for the system
            self._tar_file = None  # the handle may be stale
            missing = self._file_error(error, self.path) if isinstance(error, FileNotFoundError) else None
            raise transient_error(error, self.path) or missing or self._damaged(number, str(error)) from None
        if len(latent_bytes) != latent_size:
            raise self._damaged(number, "the file ends inside it")
        # The header is compared and never parsed, so that any other header is rejected.
        if not latent_bytes.startswith(header):
            raise self._damaged(number, f"it is not a float16 array {stored_shape}")
        latent = np.frombuffer(latent_bytes, np.float16, offset=len(header)).reshape(shape)
        if [checksum(frame.data) for frame in latent] != checksums or checksum(text) != json_checksum:
            raise self._damaged(number, "its checksum differs")
        if (latent.view(np.uint16) & EXPONENT_MASK).max() == EXPONENT_MASK:
            raise self._damaged(number, "it has values that are not finite")
        names = self.entry.arrays
        arrays = dict(zip(names, np.split(latent, len(names), axis=1), strict=True))
        return arrays, self._parse_metadata(text, number)

    def _parse_metadata(self, text: bytes, number: int) -> dict[str, Any]:
        """Parse the metadata of a sample; raise DamagedSampleError if they are invalid, or those of another sample."""
        name = f"the metadata of sample {number} of {self.path}"
        try:
            content = check(parse_json(text, name, COPY_AGAIN), METADATA_SCHEMA, "", name, COPY_AGAIN)
            for field, value in content.items():
                schema = OPTIONAL_METADATA.get(field)
                if schema is not None and value is not None and not schema.accepts(value):
                    check(value, schema, field, name, COPY_AGAIN)
        except InputError as error:
            raise DamagedSampleError(str(error)) from None
        key = f"{self._name}-{number:06d}"
        # A key that is not made of the name of a shard was chosen by a program that wrote the shard in another way.
        if content["key"] != key and SHARD_NAME.fullmatch(content["key"].rpartition("-")[0]):
            raise DamagedSampleError(
                f"sample {number} of {self.path} has the key {shown(content['key'])} instead of {key!r}, so it belongs "
                f"to another place: {COPY_AGAIN}."
            )
        if content["kind"] != self.entry.kind:
            raise DamagedSampleError(
                f"sample {number} of {self.path} has the kind {shown(content['kind'])} instead of "
                f"{self.entry.kind!r}: {COPY_AGAIN}."
            )
        return content

    @property
    def index(self) -> np.ndarray:
        """The byte index, int64 (samples, 4 + F), verified and read into memory at first use; see `INDEX_COLUMNS`."""
        if self._index is None:
            try:
                self._index = self._with_local_path(self._index_file, self._read_index)
            except InputError:
                raise
            except OSError as error:
                raise transient_error(error, self.index_path) or self._file_error(error, self.index_path) from None
        return self._index

    def _read_index(self, path: Path) -> np.ndarray:
        """Read an index from `path`; raise DamagedShardError if it is not that of the manifest."""
        content = read_bounded(path, MAX_INDEX_BYTES)
        if (actual := hashlib.sha256(content).hexdigest()) != self.entry.index_sha256:
            raise DamagedShardError(
                f"{self.index_path} has the sha256 {actual}, but its manifest records {self.entry.index_sha256}, so it "
                f"was damaged or belongs to another shard: copy the folder again or {PREPARE_AGAIN}."
            )
        header = npy_header(self._index_shape, "<i8")
        if not content.startswith(header) or len(content) != len(header) + 8 * math.prod(self._index_shape):
            raise DamagedShardError(
                f"{self.index_path} is not an int64 array {self._index_shape}, as its manifest states: {PREPARE_AGAIN}."
            )
        return np.frombuffer(content, np.int64, offset=len(header)).reshape(self._index_shape)

    @staticmethod
    def _file_error(error: OSError, path: Folder) -> DamagedShardError:
        return DamagedShardError(f"{path} cannot be read ({error.strerror}): copy the folder again or {PREPARE_AGAIN}.")

    def _open_tar(self) -> AbstractContextManager[io.FileIO]:
        """Open the tar. A local tar stays open; a cached copy is opened at each read, which updates its time of use."""
        if isinstance(self._tar, RemoteFile):
            return self._with_local_path(self._tar, open_regular)
        self._tar_file = self._tar_file or open_regular(self._tar)
        return nullcontext(self._tar_file)

    def _with_local_path(self, file: Path | RemoteFile, read: Callable[[Path], T]) -> T:
        """Return `read(path)` of a local file, or of the cached copy of a remote one."""
        if isinstance(file, Path):
            return read(file)
        assert self._cache is not None
        return self._cache.use(file, read)

    def _remove_damaged_copies(self) -> bool:
        """Remove damaged copies from the cache, so that they are fetched again; return whether there were any."""
        removed = [self._cache is not None and self._cache.remove_if_damaged(file) for file in self.files]
        if any(removed):
            self._index = None
        return any(removed)

    def _damaged(self, number: int, reason: str) -> DamagedSampleError:
        return DamagedSampleError(f"sample {number} of {self.path} is damaged ({reason}): {COPY_AGAIN}.")


def _path_or_remote_file(path: Folder, sha256: str, size: int | None = None) -> Path | RemoteFile:
    return path if isinstance(path, Path) else RemoteFile(str(path), sha256, size)


def _read_at(file: io.FileIO, size: int, offset: int) -> bytes:
    """Read bytes at an offset; fewer at the end of the file."""
    size = max(0, min(size, os.fstat(file.fileno()).st_size - offset))  # memory is taken for all bytes at once
    content = b""
    # pread instead of seek and read: forked processes share the position in the file. It may return fewer bytes.
    while len(content) < size and (more := os.pread(file.fileno(), size - len(content), offset + len(content))):
        content += more
    if len(content) < size and os.fstat(file.fileno()).st_size >= offset + size:
        raise OSError(errno.EIO, "a read ended before the end of the file")
    return content


def checksum(content: bytes | memoryview) -> int:
    """Return 63 bits of an xxh3 hash, which fit into the signed integers of an index."""
    return xxh3_64_intdigest(content) >> 1


def index_path(shard: Path) -> Path:
    """Return the path of the byte index of a shard."""
    return shard.with_suffix(".index.npy")


def shard_entry(
    path: Path,
    split: Split,
    kind: Kind,
    shape: Shape,
    count: int,
    arrays: tuple[ArrayName, ...] = LATENT_ONLY,
    *,
    tar: Path | None = None,
) -> ShardEntry:
    """Return the manifest's entry of a complete shard; reads and hashes its files.

    Args:
        path: the shard.
        split, kind, shape, count, arrays: as in the entry.
        tar: the file that is going to be renamed to `path`; None if it was renamed.
    """
    index, tar = index_path(path), tar or path
    return ShardEntry(
        path=path.name,
        index=index.name,
        split=split,
        kind=kind,
        shape=shape,
        count=count,
        bytes=tar.stat().st_size,
        sha256=sha256_of(tar),
        index_sha256=sha256_of(index),
        arrays=arrays,
    )


@lru_cache(maxsize=64)
def npy_header(shape: tuple[int, ...], dtype: str = "<f2") -> bytes:
    """Return the header of an `.npy` file of float16 (or, with "<i8", int64) values in a shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def build_index(path: Path, shape: Shape) -> np.ndarray:
    """Build the byte index of a tar.

    Args:
        path: the tar.
        shape: shape of the arrays of its samples, `ShardEntry.stored_shape`.

    Returns:
        int64 (samples, 4 + F), in the order of the tar.

    Raises:
        InputError: the tar is broken, or has a member that does not belong to a shard: another name or ending, a path,
            a link, or a repeated name.
    """
    samples: dict[str, dict[str, list[int]]] = {}  # key -> ending -> offset and further columns
    try:
        with BoundedReader(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            size = file.size
            for member in tar:
                if not 0 <= member.size <= size - member.offset_data:  # tarfile would loop forever at a negative size
                    raise tarfile.ReadError(f"{member.name!r} has {member.size} bytes, beyond the end of the file")
                key, ending = _key_and_ending(member)
                if not key or ending in samples.setdefault(key, {}):
                    raise InputError(
                        f"{path} contains {member.name!r}, which does not belong to a shard of latents: do not use "
                        f"this file, and {PREPARE_AGAIN}."
                    )
                file.seek(member.offset_data)
                content = file.read(member.size)
                if ending == METADATA_ENDING:
                    columns = [member.size, checksum(content)]
                else:
                    columns = _frame_checksums(content, shape)
                samples[key][ending] = [member.offset_data, *columns]
        rows = []
        for members in samples.values():
            latent_offset, *frame_checksums = members[LATENT_ENDING]
            rows.append([latent_offset, *members[METADATA_ENDING], *frame_checksums])
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{path} has a sample without its {error}: copy it again or {PREPARE_AGAIN}.") from None
    except Exception as error:  # tarfile raises unrelated exceptions for many kinds of damage
        damaged = InputError(f"{path} is not a readable tar ({error}): copy it again or {PREPARE_AGAIN}.")
        raise transient_error(error, path) or damaged from None
    return np.array(rows, dtype=np.int64).reshape(-1, len(INDEX_COLUMNS) + shape[0])


def _key_and_ending(member: tarfile.TarInfo) -> tuple[str, str]:
    """Return the sample key and ending of a member's name; the key is empty if the member is not part of a shard."""
    key, _, ending = member.name.partition(".")
    valid = ending in (LATENT_ENDING, METADATA_ENDING) and KEY_PATTERN.fullmatch(key) and member.isreg()
    return key if valid else "", ending


def _frame_checksums(content: bytes, shape: Shape) -> list[int]:
    """Return the checksum of each latent frame in the bytes of an `.npy` file."""
    start, frame_bytes = len(npy_header(shape)), 2 * math.prod(shape[1:])
    offsets = range(start, start + shape[0] * frame_bytes, frame_bytes)
    return [checksum(content[offset : offset + frame_bytes]) for offset in offsets]
