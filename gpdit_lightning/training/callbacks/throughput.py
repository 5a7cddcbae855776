"""Measurement of a run: throughput, FLOPs, time spent waiting for data, and memory."""

import resource
import sys
import time

import torch
from lightning import Trainer

from gpdit_lightning.data.batches import LatentBatch, TimedLoader
from gpdit_lightning.estimation.flops import PassShape, peak_bf16_flops, training_flops
from gpdit_lightning.model import GPDiTConfig


class Throughput:
    """Counts the work and the time of the optimizer steps since the last call of `rates`.

    The time of a micro-batch is from its request to the loader until the end of its step. Validation, checkpoints and
    previews are not included.

    Args:
        config: architecture of the backbone, to count tokens and FLOPs.
    """

    def __init__(self, config: GPDiTConfig) -> None:
        self.config = config
        self._reset()

    def _reset(self) -> None:
        self.steps = self.clips = self.tokens = self.flops = 0  # of this rank; the plan gives every rank the same
        self.seconds = self.waited = 0.0

    def add(self, batch: LatentBatch, loader: TimedLoader, ends_step: bool) -> None:
        """Add a micro-batch at its end."""
        clips, frames, _, height, width = batch.latents.shape
        self.steps += ends_step
        self.clips += clips
        self.tokens += batch.t.numel() * height * width // self.config.patch_size**2
        shape = PassShape(clips, batch.context, frames, height, width, batch.draws, batch.frames)
        self.flops += sum(training_flops(self.config, shape).values())
        self.seconds += time.perf_counter() - loader.request_time
        self.waited += loader.wait_seconds

    def rates(self, trainer: Trainer) -> dict[str, float]:
        """Return the rates since the last call, named as in `MetricsLogger`; all ranks must call it."""
        device = trainer.strategy.root_device
        of_rank = torch.tensor([self.waited / self.seconds, peak_memory_gib(device)], device=device)
        data_wait, peak_memory = trainer.strategy.reduce(of_rank, reduce_op="max").tolist()
        flops_per_s = self.flops / self.seconds
        rates = {
            "steps_per_s": self.steps / self.seconds,
            "clips_per_s": self.clips * trainer.world_size / self.seconds,
            "tokens_per_s": self.tokens * trainer.world_size / self.seconds,
            "tflops_per_s": flops_per_s / 1e12,
            "data_wait": data_wait,
            "peak_memory_gib": peak_memory,
        }
        peak = peak_bf16_flops(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
        if peak is not None:
            rates["mfu"] = flops_per_s / peak
        self._reset()
        return rates


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory in GiB: of tensors on a CUDA device; elsewhere, the resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
