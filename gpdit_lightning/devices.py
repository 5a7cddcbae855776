"""What this process runs on: its rank, its device, its cores."""

import os

import torch

from gpdit_lightning.errors import InputError


def rank_of_process() -> tuple[int, int, int]:
    """Rank, number of ranks and rank on this machine, as torchrun or SLURM's srun set them."""
    for rank, ranks, local_rank in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ):
        if rank in os.environ and ranks in os.environ:
            return int(os.environ[rank]), int(os.environ[ranks]), int(os.environ.get(local_rank, 0))
    return 0, 1, 0


def available_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux: a container or a scheduler may allow fewer than there are
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_device(name: str) -> torch.device:
    """The device of a name: for `auto`, if there is one, and `cuda` the GPU of this rank.

    Raises:
        InputError: it is unavailable.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", rank_of_process()[2] % torch.cuda.device_count())
    if name == "auto":
        return torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"The device {name!r} cannot be used ({str(error).splitlines()[0]}): try cpu or cuda."
        ) from None
