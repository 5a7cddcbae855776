"""Rank, devices, CPU cores and memory of this process, and the devices of tensors."""

import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gpdit_lightning.errors import InputError, message_line
from gpdit_lightning.names import counted, number_in

if TYPE_CHECKING:
    import torch
    from torch import Tensor


MAX_RANKS = 2**20
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # Lightning reads each as a number at its import
CGROUP = Path("/sys/fs/cgroup")  # limits of a container


def environment_number(name: str, default: int | None = None, least: int = 0, most: int = MAX_RANKS) -> int:
    """Return the number in an environment variable that launchers set.

    Args:
        name: of the variable.
        default: for a variable that is not set; None if it is set.
        least, most: its limits.

    Raises:
        InputError: it is no number within the limits.
    """
    text = os.environ.get(name, str(default))
    number = number_in(text)
    if number is None or not least <= number <= most:
        raise InputError(
            f"the environment variable {name} is {text!r}: give {least} to {most:,}, or unset it and the others that a "
            "launcher of several ranks sets."
        )
    return number


def rank_of_process() -> tuple[int, int, int]:
    """Return rank, number of ranks and rank on this machine, as set by torchrun, srun or Lightning's launcher.

    Raises:
        InputError: an environment variable has an impossible value.
    """
    for rank, ranks, local_rank in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
        ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_RANK"),  # Lightning, on one machine
    ):
        if rank in os.environ and ranks in os.environ:
            total = environment_number(ranks, least=1)
            return environment_number(rank, most=total - 1), total, environment_number(local_rank, 0)
    for rank in RANKS:
        environment_number(rank, 0, least=-1)  # -1 is a common value for "none"
    return 0, 1, 0


def available_cores() -> int:
    """Return the number of CPU cores that this process may use: those assigned to it, or the quota of its container."""
    if hasattr(os, "sched_getaffinity"):  # Linux: a container or a scheduler may restrict a process to some cores
        return min((len(os.sched_getaffinity(0)), *_cores_of_quota()))
    return os.cpu_count() or 1


def _cores_of_quota() -> tuple[int, ...]:
    """Return the CPU time that a container may use, in cores, rounded up; an empty tuple if it is unlimited."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroup versions 2, 1
        try:
            quota, period = (int(n) for file in files for n in (CGROUP / file).read_text(encoding="ascii").split())
        except (OSError, ValueError):  # another system, or no limit ("max")
            continue
        if quota > 0:  # -1: no limit
            return (max(1, math.ceil(quota / period)),)
    return ()


def host_memory() -> int:
    """Return the bytes of memory that this process may use: those of the machine, or of its container if less."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup versions 2, 1
        try:
            sizes.append(int((CGROUP / limit).read_text(encoding="ascii")))
        except (OSError, ValueError):  # another system, or no limit
            continue
    return min(sizes)


@dataclass(frozen=True)
class Machine:
    """The devices of a machine on which a model is trained.

    Attributes:
        accelerator: the devices that compute.
        devices: number of GPUs; 1 for a CPU.
        name: model of the GPUs, or the name of the accelerator.
        memory: bytes of memory of each GPU; for `mps` and `cpu` those of the process.
        cores: CPU cores of the process.
        host_memory: bytes of host memory of the process.
        bf16: whether the GPUs compute matrix products in bf16 natively.
    """

    accelerator: Literal["cpu", "cuda", "mps"]
    devices: int
    name: str
    memory: int
    cores: int
    host_memory: int
    bf16: bool


def this_machine() -> Machine:
    """Return the GPUs of this machine, with the least memory among them; its CPU if there are none."""
    import torch

    cores, memory = available_cores(), host_memory()
    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(device) for device in range(torch.cuda.device_count())]
        least = min(gpu.total_memory for gpu in properties)
        bf16 = has_bf16(torch.device("cuda"))
        return Machine("cuda", len(properties), properties[0].name, least, cores, memory, bf16)
    if torch.backends.mps.is_available():
        usable = min(memory, torch.mps.recommended_max_memory())
        return Machine("mps", 1, "mps", usable, cores, memory, bf16=False)
    return Machine("cpu", 1, "cpu", memory, cores, memory, bf16=False)


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
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"torch has no device {name!r}: give auto, cpu or cuda.") from None
    if missing := missing_gpu(device.type):
        raise InputError(f"the device {name!r} cannot be used, since {missing}, or give auto or cpu.")
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ImportError) as error:  # the last for a device of a package, such as hpu
        reason = message_line(error).partition(". ")[0]
        if device.type == "cuda":  # with a number
            reason = f"torch finds {counted(torch.cuda.device_count(), 'GPU')}, numbered from 0"
        raise InputError(f"the device {name!r} cannot be used ({reason}): give auto, cpu or cuda.") from None
    if device.type == "meta":
        raise InputError("the device 'meta' stores no values: give auto, cpu or cuda.")
    return device


def missing_gpu(kind: str) -> str | None:
    """Return why torch has no GPU of a kind, with the cure, as part of a sentence; None if it has one.

    Args:
        kind: `cuda` or `mps`; None is returned for any other.
    """
    import torch

    if kind == "mps" and not torch.backends.mps.is_available():
        return f"torch {torch.__version__} finds no GPU of Apple: use a Mac that has one"
    if kind != "cuda" or torch.cuda.is_available():
        return None
    if not torch.backends.cuda.is_built():
        return (
            f"torch {torch.__version__} is built without CUDA: install a build with it (see pytorch.org) if this "
            "machine has an NVIDIA GPU"
        )
    return (
        f"torch {torch.__version__} finds no GPU: check the driver with nvidia-smi, and the environment variable "
        "CUDA_VISIBLE_DEVICES"
    )


def has_bf16(device: "torch.device") -> bool:
    """Return whether a device computes matrix products in bf16: a GPU natively, another device under autocast."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.amp.is_autocast_available(device.type)


def device_name(device: "torch.device") -> str:
    """Return the name of a GPU, or "CPU" with its architecture."""
    import torch

    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type.upper()} ({platform.machine()})"
    )


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
