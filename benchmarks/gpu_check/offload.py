"""Training by `fit` under ZeRO on one GPU with the optimizer in host memory, and the memory that it takes."""

import importlib.util
from functools import partial

from benchmarks.gpu_check.cases import Case, NotRunError, Part, Row, Setup
from benchmarks.gpu_check.fitting import STAGE2, StepFigures, against_estimate, check_losses, train

STEPS = 4


def measure_offload(setup: Setup, size: str, strategy: str, saves: bool) -> Row:
    """Train for some steps, and write the checkpoint at their end if `saves`; return the figures.

    Raises:
        NotRunError: DeepSpeed is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise NotRunError("deepspeed is not installed")
    steps = 2 if setup.smoke_test else STEPS
    max_steps = steps if saves else steps + 1
    ends = {"max_steps": max_steps + 1 if saves else steps}
    figures = train(setup, size, STAGE2, StepFigures, ends, max_steps, {"trainer__strategy": strategy})
    return against_estimate(check_losses(figures))


def cases(setup: Setup) -> list[Case]:
    """Return the cases: B with its checkpoint, which is small, and H without it."""
    grid = [("B", "zero2_offload", True), ("H", "zero2_offload", False), ("H", "zero3_offload", False)]
    return [
        Case(
            {
                "model": size,
                "strategy": strategy,
                "clips": setup.clips or STAGE2.clips,
                "saved": "yes" if saves else "no",
            },
            partial(measure_offload, setup, size, strategy, saves),
        )
        for size, strategy, saves in (grid[:1] if setup.smoke_test else grid)
    ]


PART = Part(
    name="offload",
    title="ZeRO with CPU offload by `fit` on one GPU, stage2_mixed, 5 latent frames of 192x320",
    share=80,
    columns={
        "model": ("model", ""),
        "strategy": ("strategy", ""),
        "clips": ("clips", "d"),
        "saved": ("checkpoint written", ""),
        "milliseconds": ("ms per step", ".0f"),
        "update_milliseconds": ("of it update, ms", ".0f"),
        "peak_gib": ("peak GiB", ".1f"),
        "predicted_gib": ("estimated GiB", ".1f"),
        "peak_to_predicted": ("peak / estimate", ".2f"),
        "host_gib": ("host GiB", ".1f"),
        "predicted_host_gib": ("estimated host GiB", ".1f"),
    },
    cases=cases,
    note="Host GiB is the resident memory of the process, the estimate is that of the offloaded tensors.",
)
