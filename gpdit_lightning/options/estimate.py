"""Options of `estimate`."""

from collections.abc import Sequence
from dataclasses import dataclass

from gpdit_lightning.errors import InputError
from gpdit_lightning.options.shared import (
    OptionRecord,
    RecipeOptions,
    check_at_least,
    check_between,
    check_has_effect,
)


@dataclass(frozen=True, kw_only=True)
class HardwareOptions(OptionRecord):
    """Hardware."""

    gpus: int = 1
    """Number of GPUs over which the batch is distributed."""
    gpu: str = "H100"
    """Model of the GPUs, which determines the peak FLOP/s (dense bf16, without sparsity): H100, H200, A100, ..."""
    gpu_memory: float = 80
    """GiB of memory per GPU."""
    mfu: float = 0.4
    """Assumed model FLOPs utilization of one GPU: the fraction of its peak FLOP/s in forward and backward passes."""
    tflops: float | None = None
    """TFLOP/s of training on one device, the update of the weights included, if measured (system/tflops_per_s of a run
    without other ranks); replaces --mfu."""
    gpus_per_node: int = 8
    """Number of GPUs in each node; the bandwidth between them is that of --gpu."""
    network: float = 50
    """GB/s from each GPU to other nodes, in one direction: 50 is a port of 400 Gbit/s for each GPU."""
    scaling: Sequence[int] = ()
    """Numbers of GPUs for a table of step times, such as 8 64 512; the batch of each GPU stays the same."""
    measure: bool = False
    """Measure this machine instead, for about half a minute: train the recipe on as many devices as it has, at most
    --gpus, and time the communication between them. The link to other nodes is not measured."""


@dataclass(frozen=True, kw_only=True)
class SizeOptions(OptionRecord):
    """Data."""

    image_sizes: Sequence[str] | None = None
    """HEIGHTxWIDTH in pixels, in equal shares; by default the sizes of the prepared images, or 256x256, 192x320 and
    320x192 (as in the paper) if none are prepared."""
    video_sizes: Sequence[str] | None = None
    """Likewise for videos; 192x320 (as in the paper) if none are prepared."""
    sequence_sizes: Sequence[str] | None = None
    """Likewise for few-shot sequences; 256x256 if none are prepared."""
    codec: str = "wan"
    """Codec of sources that are not prepared, which determines their latent frames: a name or import path, as for
    prepare. It is not loaded."""


@dataclass(frozen=True, kw_only=True)
class EstimateOptions(RecipeOptions, HardwareOptions, SizeOptions):
    """Estimate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, gpus=1, gpus_per_node=1)
        if any(number < 1 for number in self.scaling):
            raise InputError(f"--scaling is {list(self.scaling)}: give numbers of GPUs of at least 1.")
        if self.measure and self.tflops is not None:
            raise InputError("both --measure and --tflops are given: give one of them.")
        if self.measure:
            check_has_effect(self, "with --measure", "gpu", "mfu")
        if self.tflops is not None:
            check_has_effect(self, "with --tflops", "mfu")
        # Far beyond these, times and numbers of bytes are infinite.
        check_between(self, gpu_memory=(1e-6, 1e9), mfu=(1e-6, 1), tflops=(1e-6, 1e9), network=(1e-6, 1e9))
