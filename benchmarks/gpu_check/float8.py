"""Training steps with float8 products beside bf16, with the difference of their losses."""

from functools import partial

from benchmarks.gpu_check.cases import Case, NotRunError, Part, Row, Setup
from benchmarks.gpu_check.fitting import STAGE2, StepFigures, check_losses, train
from gpdit_lightning import GPDiTConfig, InputError
from gpdit_lightning.training.float8 import check_float8

STEPS = 20


def measure_float8(setup: Setup, size: str) -> Row:
    """Train twice on the same batches from the same weights; return the figures of both.

    Raises:
        NotRunError: float8 cannot be used.
    """
    if not setup.smoke_test:
        try:
            check_float8(GPDiTConfig.preset(size, float8=True), setup.device, with_deepspeed=False)
        except InputError as reason:
            raise NotRunError(str(reason)) from None
    steps = 2 if setup.smoke_test else STEPS
    backbone = "model__init_args__backbone"
    in_bf16, in_float8 = (
        train(
            *(setup, size, STAGE2, StepFigures, {"max_steps": steps}, steps + 1),
            settings={f"{backbone}__compile": "true", f"{backbone}__float8": str(float8).lower()},
        )
        for float8 in (False, not setup.smoke_test)  # a CPU has no products in float8
    )
    losses = list(zip(in_bf16["losses"], in_float8["losses"], strict=True))
    row = {
        "bf16_ms": in_bf16["milliseconds"],
        "float8_ms": in_float8["milliseconds"],
        "speedup": in_bf16["milliseconds"] / in_float8["milliseconds"],
        "bf16_loss": in_bf16["losses"][-1],
        "float8_loss": in_float8["losses"][-1],
        "largest_difference": max(abs(b - a) / abs(a) for a, b in losses),
        "float8_peak_gib": in_float8["peak_gib"],
    }
    return row | {"failure": check_losses(in_float8).get("failure", "")}


def cases(setup: Setup) -> list[Case]:
    """Return a case for each size."""
    return [
        Case({"model": size, "clips": setup.clips or STAGE2.clips}, partial(measure_float8, setup, size))
        for size in ("H", "B")[: 1 if setup.smoke_test else 2]
    ]


PART = Part(
    name="float8",
    title="Float8 products by torchao beside bf16, compiled, stage2_mixed, 5 latent frames of 192x320",
    share=40,
    columns={
        "model": ("model", ""),
        "clips": ("clips", "d"),
        "bf16_ms": ("bf16, ms per step", ".1f"),
        "float8_ms": ("float8, ms per step", ".1f"),
        "speedup": ("speedup", ".2f"),
        "bf16_loss": (f"bf16, loss at step {STEPS}", ".5f"),
        "float8_loss": (f"float8, loss at step {STEPS}", ".5f"),
        "largest_difference": ("largest relative difference of a loss", ".2%"),
        "float8_peak_gib": ("float8, peak GiB", ".1f"),
    },
    cases=cases,
)
