"""Tensors in files: the header of safetensors, tensors that are read when they are needed, and checks of their values.

A tensor is in one file (`StoredTensor`), or in several ones that have slices of it (`SlicedTensor`).

Bytes are read by ordinary calls of the system. An error of the disk, or a file that is truncated meanwhile, is then an
exception; in memory-mapped files it is SIGBUS, which ends the process without a message.
"""

import logging
import math
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.regular_files import Identity, identity_of, open_regular
from gpdit_lightning.retries import retried, transient_error
from gpdit_lightning.schema import parse_json, shown

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_HEADER_BYTES = 2**22  # some 30,000 tensors
MAX_AXES = 64
CHUNK = 2**26  # bytes of one call of the system

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


class TensorOnDisk(ABC):
    """A tensor that is read when it is needed.

    Attributes:
        dtype, shape: of the tensor.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @abstractmethod
    def read(self) -> Tensor:
        """Read the tensor into host memory.

        Raises:
            InputError: a file has changed, or does not exist any more.
            TransientError: three attempts to read a file failed for a reason other than its content.
        """

    def read_range(self, start: int, size: int) -> Tensor:
        """Read the elements (size,) of the flattened tensor from `start` on, and no others; errors as of `read`."""
        values = torch.empty(size, dtype=self.dtype)
        self.fill(values, start)
        return values

    @abstractmethod
    def fill(self, values: Tensor, start: int) -> None:
        """Read the elements from `start` on into a contiguous tensor (size,) of this type; errors as of `read`."""


@dataclass(frozen=True)
class StoredTensor(TensorOnDisk):
    """A tensor in a file, which `read` reads.

    The header of a file is checked, and its hash compared, before its tensors are read. So a file that was replaced
    since, or is being written, is refused: its tensors would be those of another model, or of two.

    Attributes:
        path: the file.
        identity: that of the file whose header was read.
        offset: of the first byte of its storage in the file.
        bytes: of its storage.
        dtype, shape, strides, first: data type, shape, strides, and the first element within the storage.
    """

    path: Path
    identity: Identity
    offset: int
    bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    first: int = 0

    def check_bounds(self) -> None:
        """Raise `InputError` if it has more elements than its storage, by strides of 0, or elements outside of it."""
        steps = ((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        elements, stored = math.prod(self.shape), self.bytes // self.dtype.itemsize
        if elements and (elements > stored or self.first + sum(steps) >= stored):
            raise InputError(
                f"{self.path} has a tensor of shape {self.shape} with {self.bytes} bytes: restore the file."
            )

    def read(self) -> Tensor:
        """Read the tensor, as the base class states."""
        storage = torch.empty(self.bytes, dtype=torch.uint8)
        self._read_bytes(storage, self.offset)
        elements = storage[: self.bytes - self.bytes % self.dtype.itemsize].view(self.dtype)
        return elements.as_strided(self.shape, self.strides, self.first)

    def fill(self, values: Tensor, start: int) -> None:
        """Read elements, as the base class states; all of a tensor that is not contiguous in its file."""
        if self.strides == row_major_strides(self.shape):
            self._read_bytes(values.view(torch.uint8), self.offset + (self.first + start) * self.dtype.itemsize)
        else:
            values.copy_(self.read().flatten()[start : start + len(values)])

    @retried
    def _read_bytes(self, storage: Tensor, offset: int) -> None:
        try:
            with open_regular(self.path) as file:
                read_into(storage.numpy().data, file.fileno(), offset)
                identity = identity_of(os.fstat(file.fileno()))
        except (OSError, RuntimeError, MemoryError) as error:
            known = transient_error(error, f"{self.path} ({size_text(self.path)})")
            raise known or _unreadable(self.path, error) from None
        except EOFError:
            identity = ()
        if identity != self.identity:
            raise InputError(
                f"{self.path} changed while it was read: wait until the program that writes it has finished, and run "
                "the same command again."
            )


@dataclass(frozen=True)
class SlicedTensor(TensorOnDisk):
    """A tensor whose elements are in several files, each of which has a range of the flattened tensor.

    Attributes:
        dtype, shape: of the tensor.
        slices: first element of a range, and the range (size,); in order.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    slices: tuple[tuple[int, StoredTensor], ...]

    def gap(self) -> str:
        """Return in words which elements no slice, or more than one has, or which slice has another type; or ""."""
        end = 0
        for start, stored in self.slices:
            if stored.dtype != self.dtype or len(stored.shape) != 1:
                return f"{stored.path.name} has a slice of {stored.dtype} {stored.shape} of a tensor of {self.dtype}"
            if start != end:
                return f"{stored.path.name} has a slice from element {start} on, not from {end} on"
            end += stored.shape[0]
        elements = math.prod(self.shape)
        return "" if end == elements else f"its slices have {end} of {elements} elements"

    def read(self) -> Tensor:
        """Read the tensor, as the base class states."""
        return self.read_range(0, math.prod(self.shape)).view(self.shape)

    def fill(self, values: Tensor, start: int) -> None:
        """Read elements, as the base class states."""
        end = start + len(values)
        for first, stored in self.slices:
            low, high = max(start, first), min(end, first + stored.shape[0])
            if low < high:
                stored.fill(values[low - start : high - start], low - first)


def row_major_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def read_into(buffer: memoryview, descriptor: int, offset: int) -> None:
    """Fill a buffer with the bytes of an open file from an offset on; raises `EOFError` if the file is shorter."""
    position = 0
    while position < len(buffer):
        count = os.preadv(descriptor, [buffer[position : position + CHUNK]], offset + position)
        if count == 0:
            raise EOFError
        position += count


def size_text(path: Path) -> str:
    """Return the size of a file in words, for messages."""
    try:
        size = path.stat().st_size
    except OSError:
        return "of unknown size"
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(f"{path} could not be read ({reason}): check that it exists and can be read.")


def safetensors_header(path: Path, cure: str) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read the header of a safetensors file; everything is checked against the size of the file.

    Args:
        path: the file.
        cure: what the user should do about a damaged file, for messages.

    Returns:
        the tensors by name, and the metadata.

    Raises:
        InputError: the file is missing, truncated or of another type, or tensors overlap, leave gaps, or have shapes
            that differ from their bytes.
        TransientError: it could not be read for a reason other than its content.
    """
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            size = status.st_size
            prefix = bytearray(8)
            read_into(memoryview(prefix), file.fileno(), 0)
            length = struct.unpack("<Q", prefix)[0]
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise _damaged(path, f"its header has {length} bytes and the file {size}", cure)
            text = bytearray(length)
            read_into(memoryview(text), file.fileno(), 8)
    except EOFError:
        raise _damaged(path, "it is too short", cure) from None
    except OSError as error:
        unreadable = InputError(f"{path} cannot be read ({error.strerror or error}): {cure}.")
        raise transient_error(error, path) or unreadable from None
    try:
        content = parse_json(bytes(text), f"the header of {path}", cure)
    except InputError as error:
        raise _damaged(path, str(error).partition(": ")[0], cure) from None
    if not isinstance(content, dict):
        raise _damaged(path, "its header is not an object", cure)
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its metadata are not text", cure)
    identity = identity_of(status)
    tensors = {name: _stored_tensor(path, identity, name, entry, 8 + length, cure) for name, entry in content.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].bytes)):
        if tensor.offset != end:
            raise _damaged(path, f"{shown(name)} begins at byte {tensor.offset}, not at {end}", cure)
        end += tensor.bytes
    if end != size:
        raise _damaged(path, f"its tensors end at byte {end} and the file at {size}", cure)
    return tensors, metadata


def _stored_tensor(path: Path, identity: Identity, name: str, entry: Any, start: int, cure: str) -> StoredTensor:
    """Return a tensor of a header, whose bytes are counted from `start`."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"its header has {shown(entry)} as {shown(name)}", cure)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _damaged(path, f"{shown(name)} has the data type {shown(dtype)}", cure)
    if not _are_counts(shape) or len(shape) > MAX_AXES:
        raise _damaged(path, f"{shown(name)} has the shape {shown(shape)}", cure)
    if not _are_counts(offsets) or len(offsets) != 2:
        raise _damaged(path, f"{shown(name)} has the offsets {shown(offsets)}", cure)
    first, end = offsets
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if end - first != size:
        raise _damaged(path, f"{shown(name)} of {dtype} {shown(shape)} has {shown(end - first)} bytes", cure)
    return StoredTensor(path, identity, start + first, size, DTYPES[dtype], tuple(shape), row_major_strides(shape))


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _damaged(path: Path, reason: str, cure: str) -> InputError:
    return InputError(f"{path} is not a complete safetensors file ({reason}): {cure}.")


def npy_layout(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Read the header of an array in the format .npy; raises `ValueError` for another format.

    Returns:
        shape and data type, and the offset of the first element.
    """
    formats = np.lib.format
    is_first = formats.read_magic(file) == (1, 0)
    read = formats.read_array_header_1_0 if is_first else formats.read_array_header_2_0
    try:
        shape, _, dtype = read(file)
    except (OSError, ValueError):
        raise
    except Exception as error:  # of the parsers that NumPy calls: TokenError, IndexError, RecursionError
        raise ValueError(f"its header cannot be read: {error}") from None
    return shape, dtype, file.tell()


def check_finite(tensors: Mapping[str, Any], owner: str, cure: str) -> None:
    """Check that floating-point tensors in host memory are finite; values of other types are ignored.

    Args:
        tensors: by name.
        owner: the file, for the message.
        cure: what the user should do, for the message.

    Raises:
        InputError: a tensor has NaN or infinity.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not is_finite(tensor):
            raise InputError(f"{owner} has numbers in {name} that are not finite (NaN or infinity): {cure}.")


def is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers of a floating-point tensor in host memory are finite."""
    if tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:  # float8, for which torch has no minimum
        tensor = tensor.float()
    # Both are NaN if any number is. This reads the tensor once and makes no copy.
    least, greatest = torch.aminmax(tensor)
    return math.isfinite(least) and math.isfinite(greatest)
