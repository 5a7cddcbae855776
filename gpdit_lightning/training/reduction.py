"""Reductions over ranks in every optimizer step, for which the host does not wait; Lightning's begin with a barrier.

`of_all_ranks`, for which the host waits, is for what is rare.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def of_all_ranks(item: T) -> list[T]:
    """Return the item of every rank, in the order of the ranks; tensors must be on the CPU."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [item]
    items: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(items, item)
    return items


def reduce_over_ranks(tensor: Tensor, operation: Literal["sum", "max"]) -> Tensor:
    """Reduce a tensor in place over all ranks and return it; with one process, return it unchanged."""
    if distributed.is_available() and distributed.is_initialized():
        operations = {"sum": distributed.ReduceOp.SUM, "max": distributed.ReduceOp.MAX}
        distributed.all_reduce(tensor, op=operations[operation])
    return tensor


class DelayedMaximum:
    """Maxima of numbers over all ranks, each of which is returned by the call after it was requested.

    By then the device has usually copied it to host memory, so that the host does not wait. On a CPU, where the host
    computes it, it is returned at once.
    """

    def __init__(self) -> None:
        self._requested: tuple[Tensor, torch.Event] | None = None

    def exchange(self, values: Sequence[int], device: torch.device) -> list[int]:
        """Request the maxima of `values`, and return those that the previous call requested; at first zeros.

        Args:
            values: the numbers of this rank.
            device: on which ranks communicate.
        """
        mine = torch.stack([torch.full((), value, device=device) for value in values])
        maxima = reduce_over_ranks(mine, "max")
        if device.type == "cpu":
            return maxima.tolist()
        copy, copied = maxima.to("cpu", non_blocking=True), torch.Event(device)
        copied.record()
        previous, self._requested = self._requested, (copy, copied)
        if previous is None:
            return [0] * len(values)
        copy, copied = previous
        copied.synchronize()
        return copy.tolist()
