"""Training steps of H and B by `fit`, compiled and not, with MFU, and peak memory beside the estimate."""

from functools import partial

from benchmarks.gpu_check.cases import Case, Part, Row, Setup
from benchmarks.gpu_check.fitting import STAGE2, STAGE3, Share, StepFigures, against_estimate, check_losses, train

STEPS = 10  # of which the first is not timed


def measure_steps(setup: Setup, size: str, share: Share, compiled: bool) -> Row:
    """Train for some steps; return the figures."""
    steps = 2 if setup.smoke_test else STEPS
    compile_option = {"model__init_args__backbone__compile": str(compiled).lower()}
    # One step more than is trained, so that no checkpoint is written.
    figures = train(setup, size, share, StepFigures, {"max_steps": steps}, steps + 1, compile_option)
    return against_estimate(check_losses(figures))


def cases(setup: Setup) -> list[Case]:
    """Return the cases: each size and stage, not compiled and compiled."""
    grid = [(size, share, compiled) for share in (STAGE2, STAGE3) for size in ("H", "B") for compiled in (False, True)]
    return [
        Case(
            {
                "model": size,
                "recipe": share.recipe,
                "clips": setup.clips or share.clips,
                "frames": share.frames,
                "compiled": "yes" if compiled else "no",
            },
            partial(measure_steps, setup, size, share, compiled),
        )
        for size, share, compiled in (grid[-1:] if setup.smoke_test else grid)
    ]


PART = Part(
    name="steps",
    title="Training steps by `fit` on one GPU, bf16-mixed, videos of 192x320",
    share=200,
    columns={
        "model": ("model", ""),
        "recipe": ("recipe", ""),
        "clips": ("clips", "d"),
        "frames": ("latent frames", "d"),
        "compiled": ("compiled", ""),
        "backend": ("attention", ""),
        "kernel": ("kernel", ""),
        "fused": ("fused AdamW", ""),
        "milliseconds": ("ms per step", ".1f"),
        "update_milliseconds": ("of it update, ms", ".1f"),
        "waited": ("of it waiting for data", ".1%"),
        "tokens_per_second": ("noisy tokens/s", ",.0f"),
        "teraflops_per_second": ("TFLOP/s", ".3g"),
        "mfu": ("MFU", ".1%"),
        "peak_gib": ("peak GiB", ".1f"),
        "predicted_gib": ("estimated GiB", ".1f"),
        "peak_to_predicted": ("peak / estimate", ".2f"),
    },
    cases=cases,
    note="TFLOP/s and MFU count three forward passes, without recomputation, relative to the dense bf16 peak. Peak "
    "memory is that of tensors; the estimate is that of `estimate` without its allowance for CUDA and fragmentation.",
)
