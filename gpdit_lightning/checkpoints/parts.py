"""Parts of a checkpoint: the tensors of a sharded training, of which each rank writes its slices to a file.

    part-00001-of-00004.safetensors     slices of the tensors: consecutive elements of each flattened tensor
    training.ckpt                       all other values; in place of each tensor its shape and data type

A slice has the name of its tensor, such as `state_dict.backbone.output.weight` or `optimizer_states.0.state.3.exp_avg`,
and the header of the file has the index of its first element. This is the format in which
torch.distributed.checkpoint writes safetensors: its `HuggingFaceStorageReader` opens the parts, too. Nothing depends on
how many ranks wrote a checkpoint, or which elements each of them had.
"""

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpdit_lightning.checkpoints.marks import FileMark
from gpdit_lightning.errors import InputError
from gpdit_lightning.schema import parse_json, shown
from gpdit_lightning.tensor_files import CHUNK, DTYPES, StoredTensor, safetensors_header

NAME = re.compile(r"part-(\d{5})-of-(\d{5})\.safetensors")
OFFSETS = "DCP_SHARDING_INFO"  # the names of torch.distributed.checkpoint
OFFSETS_OF_SLICE = "saved_offsets"
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSlice:
    """The elements of a tensor that a rank keeps.

    Attributes:
        values: the elements (size,), consecutive in the flattened tensor; may be empty.
        start: index of the first one.
        shape: shape of the whole tensor.
    """

    values: Tensor
    start: int
    shape: tuple[int, ...]


class Place(NamedTuple):
    """The place of a tensor in the content of a checkpoint.

    Attributes:
        name: its name in the parts.
        container, key: the dict that contains it, and its key there.
    """

    name: str
    container: MutableMapping[Any, Any]
    key: Any

    @property
    def value(self) -> Any:
        """What is at the place."""
        return self.container[self.key]


def places(content: Mapping[str, Any]) -> Iterator[Place]:
    """Yield the places of weights, average and optimizer state in the content of a checkpoint, valid or not."""
    average, optimizers = content.get("ema"), content.get("optimizer_states")
    groups: dict[str, Any] = {"state_dict": content.get("state_dict")}
    if isinstance(average, dict):
        groups["ema.weights"] = average.get("weights")
    for number, optimizer in enumerate(optimizers if isinstance(optimizers, list) else ()):
        state = optimizer.get("state") if isinstance(optimizer, dict) else None
        for parameter, values in state.items() if isinstance(state, dict) else ():
            groups[f"optimizer_states.{number}.state.{parameter}"] = values
    for group, values in groups.items():
        for key in list(values) if isinstance(values, dict) else ():
            yield Place(f"{group}.{key}", values, key)


def take_slices(content: dict[str, Any]) -> dict[str, TensorSlice]:
    """Remove the slices from the content of a checkpoint; each leaves a tensor without data, of shape and type.

    Returns:
        the slices by name.
    """
    taken = {}
    for place in places(content):
        if isinstance(part := place.value, TensorSlice):
            taken[place.name] = part
            place.container[place.key] = torch.empty(part.shape, dtype=part.values.dtype, device="meta")
    return taken


def part_name(rank: int, ranks: int) -> str:
    """Return the name of the file of a rank."""
    return f"part-{rank + 1:05}-of-{ranks:05}.safetensors"


def write_part(path: Path, slices: Mapping[str, TensorSlice]) -> FileMark:
    """Write slices in host memory to a file and wait until it is on disk; return its size and sha256.

    The file is not read again for its hash, and no copy is made of the slices.

    Raises:
        OSError: it cannot be written.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, part in slices.items():
        start, end = end, end + part.values.nbytes
        dtype = DTYPE_NAMES[part.values.dtype]
        header[name] = {"dtype": dtype, "shape": list(part.values.shape), "data_offsets": [start, end]}
    offsets = {name: {OFFSETS_OF_SLICE: [part.start]} for name, part in slices.items()}
    header["__metadata__"] = {OFFSETS: json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the tensors
    tensors = (part.values.contiguous().view(torch.uint8).numpy().data for part in slices.values())
    return write_hashed(path, struct.pack("<Q", len(text)), text, *tensors)


def write_hashed(path: Path, *blocks: bytes | memoryview) -> FileMark:
    """Write blocks to a file and wait until they are on disk; return its size and sha256.

    Raises:
        OSError: it cannot be written.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for block in blocks:
            view = memoryview(block)
            while view:
                count = file.write(view[:CHUNK])
                digest.update(view[:count])
                size, view = size + count, view[count:]
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def read_parts(folder: Path, cure: str) -> dict[str, list[tuple[int, StoredTensor]]]:
    """Return the slices in the parts of a checkpoint by the names of their tensors, in order; {} if it has no parts.

    Each slice comes with the index of its first element in the flattened tensor.

    Args:
        folder: of the checkpoint.
        cure: what the user should do about a damaged file, for messages.

    Raises:
        InputError: a part is missing or damaged, or parts are of different numbers of ranks.
        TransientError: one could not be read for a reason other than its content.
    """
    paths = sorted(path for path in folder.glob("part-*.safetensors") if NAME.fullmatch(path.name))
    ranks = max((int(NAME.fullmatch(path.name)[2]) for path in paths), default=0)  # type: ignore[index]
    names = [path.name for path in paths]
    for rank in range(ranks):
        if rank >= len(names) or names[rank] != part_name(rank, ranks):
            raise InputError(f"{folder} lacks {part_name(rank, ranks)}, or has parts of another checkpoint: {cure}.")
    slices: dict[str, list[tuple[int, StoredTensor]]] = {}
    for path in paths:
        tensors, metadata = safetensors_header(path, cure)
        starts = parse_json(metadata.get(OFFSETS, "").encode(), f"the offsets of {path}", cure)
        for name, stored in tensors.items():
            entry = starts.get(name) if isinstance(starts, dict) else None
            offsets = entry.get(OFFSETS_OF_SLICE) if isinstance(entry, dict) else None
            if not isinstance(offsets, list) or len(offsets) != 1 or type(offsets[0]) is not int:
                raise InputError(f"{path} has the offsets {shown(offsets)} of {shown(name)}: {cure}.")
            slices.setdefault(name, []).append((offsets[0], stored))
    for of_tensor in slices.values():
        of_tensor.sort(key=lambda entry: entry[0])
    return slices
