"""Measurement of a run: throughput, FLOPs, time spent waiting for data, memory, and the remaining time."""

import gc
import math
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Timer

from gpdit_lightning.data.batches import LatentBatch, TimedLoader
from gpdit_lightning.estimation.flops import PassShape, training_flops
from gpdit_lightning.estimation.gpus import peak_bf16_flops
from gpdit_lightning.model import GPDiTConfig

# The speed is averaged over the last steps, with weights that decay by e in this many steps, but not in less time.
AVERAGED_STEPS, AVERAGED_SECONDS = 50, 60.0


class Pace:
    """Smoothed speed of the optimizer steps of this process, and the time that the remaining ones take.

    The first step of a process is slow (compilation, memory allocation), and is left out when there is another one.
    """

    def __init__(self) -> None:
        self._seen = 0
        self._steps = self._seconds = self._clips = 0.0  # sums with decaying weights
        self._began = 0.0  # end of the first step
        self._training = 0.0  # seconds of all steps after the first one

    def add(self, seconds: float, clips: int) -> None:
        """Add a step of this rank at its end: the seconds without validation, checkpoints and previews."""
        self._seen += 1
        kept = max(math.exp(-1 / AVERAGED_STEPS), math.exp(-seconds / AVERAGED_SECONDS)) if self._seen > 2 else 0.0
        self._steps = kept * self._steps + 1
        self._seconds = kept * self._seconds + seconds
        self._clips = kept * self._clips + clips
        if self._seen == 1:
            self._began = time.perf_counter()
        else:
            self._training += seconds

    @property
    def clips_per_s(self) -> float:
        """Samples of this rank per second, smoothed; 0 before the first step."""
        return self._clips / self._seconds if self._seconds else 0.0

    def seconds_left(self, trainer: Trainer) -> float | None:
        """Return the seconds until the last step, or until `trainer.max_time`; None if they cannot be estimated.

        The smoothed duration of a step is used. The time between steps (validation, previews, checkpoints) is rare and
        long: of it the mean over all steps of this process is used.
        """
        estimates = []
        if trainer.max_steps > 0 and self._seen:
            others = self._seen - 1
            between = max(0.0, time.perf_counter() - self._began - self._training) / others if others else 0.0
            remaining = max(0, trainer.max_steps - trainer.global_step)
            estimates.append(remaining * (self._seconds / self._steps + between))
        timers: list[Timer] = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
        estimates += [left for timer in timers if (left := timer.time_remaining()) is not None]
        return min(estimates, default=None)


class Throughput:
    """Counts the work and the time of the optimizer steps since the last call of `rates`.

    The time of a micro-batch is from its request to the loader until the end of its step. Validation, checkpoints and
    previews are not included.

    Args:
        config: architecture of the backbone, to count tokens and FLOPs.

    Attributes:
        pace: the smoothed speed, which `rates` does not reset.
    """

    def __init__(self, config: GPDiTConfig) -> None:
        self.config = config
        self.pace = Pace()
        self._step_seconds, self._step_clips = 0.0, 0  # of the current optimizer step
        self.reset()

    def reset(self) -> None:
        """Forget the work and the time since the last call of `rates`."""
        self.steps = self.clips = self.tokens = self.flops = 0  # of this rank; the plan gives every rank the same
        self.seconds = self.waited = 0.0

    def add(self, batch: LatentBatch, loader: TimedLoader, ends_step: bool) -> None:
        """Add a micro-batch at its end."""
        clips, frames, _, height, width = batch.latents.shape
        self.steps += ends_step
        self.clips += clips
        shape = PassShape(clips, batch.context, frames, height, width, batch.draws, batch.frames)
        self.tokens += shape.noisy_tokens(self.config) or shape.clean_tokens(self.config)
        self.flops += sum(training_flops(self.config, shape).values())
        seconds = time.perf_counter() - loader.request_time
        self.seconds += seconds
        self.waited += loader.wait_seconds
        self._step_seconds += seconds
        self._step_clips += clips
        if ends_step:
            self.pace.add(self._step_seconds, self._step_clips)
            self._step_seconds, self._step_clips = 0.0, 0

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
        self.reset()
        return rates


def reset_peak_memory(device: torch.device) -> None:
    """Make `peak_memory_gib` that from now on; without CUDA, only on Linux, for processes that train several runs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    gc.collect()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # see proc(5)


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory in GiB: of tensors on a CUDA device; elsewhere, the resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
