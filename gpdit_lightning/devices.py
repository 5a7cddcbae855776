"""Rank, device and CPU cores of this process, and the devices of tensors."""

import os
from typing import TYPE_CHECKING

from gpdit_lightning.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def rank_of_process() -> tuple[int, int, int]:
    """Return rank, number of ranks and rank on this machine, as set by torchrun, srun or Lightning's launcher."""
    for rank, ranks, local_rank in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
        ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_RANK"),  # Lightning, on one machine
    ):
        if rank in os.environ and ranks in os.environ:
            return int(os.environ[rank]), int(os.environ[ranks]), int(os.environ.get(local_rank, 0))
    return 0, 1, 0


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux: a container or a scheduler may restrict a process to some cores
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_device(name: str) -> "torch.device":
    """Return the device with a name; for `cuda`, and for `auto` on a machine with GPUs, the GPU of this rank.

    Raises:
        InputError: the device is unavailable.
    """
    import torch  # imported late: the command line needs only the rank

    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", rank_of_process()[2] % torch.cuda.device_count())
    if name == "auto":
        return torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"the device {name!r} cannot be used ({str(error).splitlines()[0]}): try cpu or cuda."
        ) from None


def has_bf16(device: "torch.device") -> bool:
    """Return whether a device computes matrix products in bf16: a GPU natively, another device under autocast."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.amp.is_autocast_available(device.type)


def check_device(device: "torch.device", owner: str, **tensors: "Tensor | None") -> None:
    """Check that tensors are on a device; None is accepted.

    Args:
        device: where they must be.
        owner: what is on that device, for the message: "the model".
        tensors: by the names of the arguments.

    Raises:
        InputError: a tensor is on another device.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise InputError(
                f"{name} is on {tensor.device}, but {owner} is on {device}: move it with {name}.to({str(device)!r})."
            )
