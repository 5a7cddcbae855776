"""Options of `plan`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpdit_lightning.options.shared import OptionRecord, check_at_least, check_between, check_has_effect, check_is_utf8


@dataclass(frozen=True, kw_only=True)
class PlannedMachineOptions(OptionRecord):
    """Machine; by default this one."""

    gpus: int | None = None
    """Number of GPUs; 0 for training on the CPU."""
    gpu: str | None = None
    """Model of the GPUs, which determines the peak FLOP/s: H100, A100, RTX 4090, ...; by default that of this machine,
    or H100 if it has no GPUs."""
    gpu_memory: float | None = None
    """GiB of memory per GPU; by default that of the GPUs of this machine, or 80 if it has no GPUs."""
    cores: int | None = None
    """CPU cores; by default those of this machine, or 8 per GPU if it has no GPUs."""
    host_memory: float | None = None
    """GiB of host memory; by default that of this machine, or 64 per GPU if it has no GPUs."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions(PlannedMachineOptions):
    """Plan."""

    data_dir: Sequence[str]
    """Folders made by `prepare`, with images, videos, or both."""
    out: Path = Path("recipe.yaml")
    """The recipe to write."""
    overwrite: bool = False
    """Replace the recipe if it exists."""
    run_dir: str | None = None
    """The run folder of the recipe; by default runs/ and the name of the first folder of data."""
    hours: float | None = None
    """Maximum hours of training; by default 2 on a CPU and 24 on GPUs."""
    size: Literal["tiny", "mini", "S", "B", "L", "XL", "H"] | None = None
    """Size of the backbone (1.8M, 6.3M, 21M, 85M, 302M, 925M and 2.28B parameters); by default chosen by the amount of
    data, the memory and the hours."""
    trial: bool = True
    """Measure the speed of the recipe on this machine, by training for up to 20 seconds without saving anything. By
    default not for other machines, and not if the model is sharded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, gpus=0, cores=1)
        if self.gpus == 0:
            check_has_effect(self, "with --gpus 0", "gpu", "gpu_memory")
        for name in ("data_dir", "out", "run_dir"):
            check_is_utf8(self, name, "rename it, since the recipe records it")
        # Far beyond these, numbers of steps and bytes are infinite.
        check_between(self, hours=(1e-6, 1e9), gpu_memory=(1e-6, 1e9), host_memory=(1e-6, 1e9))
