"""Checkpoints in parts, as the ranks of a sharded training write them, without any ranks."""

import math
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import Tensor

from gpdit_lightning.checkpoints.content import read_content
from gpdit_lightning.checkpoints.distributed import as_bytes
from gpdit_lightning.checkpoints.files import publish_checkpoint
from gpdit_lightning.checkpoints.parts import TensorSlice, part_name, places, take_slices, write_part
from gpdit_lightning.files import partial_path


def content_of_rank(content: dict[str, Any], ends: Sequence[float], rank: int) -> dict[str, Any]:
    """Return the content of a checkpoint as a rank has it: a slice of each tensor of more than one element.

    Args:
        content: that of a checkpoint, with whole tensors.
        ends: for each rank, the end of its slices as a fraction of the elements of a tensor; the last one is 1.
        rank: number of the rank.
    """
    mine = deepcopy(content)
    for place in places(mine):
        values = place.value
        if isinstance(values, Tensor) and values.numel() > 1:
            low, high = (math.floor(values.numel() * end) for end in ([0.0, *ends][rank], ends[rank]))
            place.container[place.key] = TensorSlice(values.flatten()[low:high], low, tuple(values.shape))
    return mine


def write_parts(folder: Path, content: dict[str, Any], ends: Sequence[float]) -> Path:
    """Write the files of all ranks to a new folder, which is returned; arguments as of `content_of_rank`."""
    folder.mkdir(parents=True)
    for rank in range(len(ends)):
        mine = content_of_rank(content, ends, rank)
        slices = {name: part for name, part in take_slices(mine).items() if part.values.numel()}
        write_part(folder / part_name(rank, len(ends)), slices)
        if rank == 0:
            (folder / "training.ckpt").write_bytes(as_bytes(mine))
    return folder


def publish_in_parts(source: Path, path: Path, ends: Sequence[float]) -> None:
    """Write the checkpoint at `source` again at `path`, in parts and with its mark."""
    write_parts(partial_path(path), read_content(source), ends)
    publish_checkpoint(path)
