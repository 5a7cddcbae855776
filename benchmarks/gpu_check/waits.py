"""The times that the host waits for the GPU in an optimizer step of `fit`."""

import json
import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.gpu_check.cases import Case, Part, Row, Setup
from benchmarks.gpu_check.fitting import FIGURES, STAGE2, train

WARM_UP, STEPS = 4, 5
# Calls of CUDA's runtime that return when the GPU has finished; those that end in `Async` do not wait.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
MEASURED = "measured steps"


def calls_within(events: Iterable[Any], range_name: str, names: Iterable[str]) -> Counter[str]:
    """Count the profiler's events with given names that begin within the range of a name."""
    events, names = list(events), set(names)
    (span,) = [e.time_range for e in events if e.name == range_name and e.device_type == DeviceType.CPU]
    return Counter(
        event.name for event in events if event.name in names and span.start <= event.time_range.start <= span.end
    )


class HostWaits(Callback):
    """Counts the waits of the host in some optimizer steps, by call and by line, and writes them to the run folder.

    The calls are those that the profiler records. The lines are from PyTorch's warnings, which do not cover all calls.

    Args:
        first: optimizer step after which counting begins.
        steps: number of steps.
    """

    def __init__(self, first: int, steps: int) -> None:
        self.first, self.steps = first, steps
        self._block = ExitStack()
        self._warnings: list[warnings.WarningMessage] = []
        self._span: Any = None
        self._profile: Any = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Begin or end the count; the recipe has one micro-batch per step."""
        if trainer.global_step == self.first:
            self._begin(pl_module.device.type == "cuda")
        elif trainer.global_step == self.first + self.steps:
            self._end(Path(trainer.default_root_dir))

    def _begin(self, on_gpu: bool) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        self._profile = self._block.enter_context(profile(activities=activities))
        self._warnings = self._block.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        if on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
            self._block.callback(torch.cuda.set_sync_debug_mode, "default")
        # The profiler itself waits for the GPU at its end, after this range.
        self._span = record_function(MEASURED)
        self._span.__enter__()

    def _end(self, run_dir: Path) -> None:
        self._span.__exit__(None, None, None)
        self._block.close()
        calls = calls_within(self._profile.events(), MEASURED, WAITS)
        lines = Counter(
            f"{Path(warning.filename).parent.name}/{Path(warning.filename).name}:{warning.lineno}"
            for warning in self._warnings
            if "synchronizing" in str(warning.message)
        )
        figures = {
            "waits_per_step": calls.total() / self.steps,
            "calls": ", ".join(f"{count} {name}" for name, count in calls.most_common()) or "none",
            "lines": ", ".join(f"{count} at {line}" for line, count in lines.most_common()) or "none",
        }
        (run_dir / FIGURES).write_text(json.dumps(figures))


def measure_waits(setup: Setup, compiled: bool) -> Row:
    """Train for some steps, to the checkpoint at their end; return the waits of those after the warm-up."""
    warm_up, steps = (1, 1) if setup.smoke_test else (WARM_UP, STEPS)
    return train(
        *(setup, "B", STAGE2, HostWaits, {"first": warm_up, "steps": steps}, warm_up + steps + 1),
        settings={"model__init_args__backbone__compile": str(compiled).lower()},
    )


def cases(setup: Setup) -> list[Case]:
    """Return the cases: not compiled and compiled."""
    return [
        Case({"model": "B", "compiled": "yes" if compiled else "no"}, partial(measure_waits, setup, compiled))
        for compiled in ((False,) if setup.smoke_test else (False, True))
    ]


PART = Part(
    name="waits",
    title="Waits of the host for the GPU by optimizer step of `fit`, between log points",
    share=20,
    columns={
        "model": ("model", ""),
        "compiled": ("compiled", ""),
        "waits_per_step": ("waits per step", ".2f"),
        "calls": (f"calls in {STEPS} steps", ""),
        "lines": ("lines that PyTorch reports", ""),
    },
    cases=cases,
    note="The library waits once per step, for the check of loss and gradient before the update.",
)
