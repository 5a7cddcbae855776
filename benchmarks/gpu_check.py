"""Is the backbone right on this GPU, and how fast? `python -m benchmarks.gpu_check [--out FILE.json]`.

Two parts. The attention operators (xformers and SDPA) compute frame-causal attention, forward and backward, and are
held against a dense float64 reference. Then one training step of GPDiT-B and one of GPDiT-H are timed: forward,
backward and AdamW on random latents of 17-frame clips at 192x320, bf16 autocast over float32 weights.

Exit status: 0 all is well, 1 an operator is wrong or a step failed, 2 the command cannot be used so, 3 no GPU.
"""

import argparse
import gc
import importlib.metadata
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from gpdit_lightning import GPDiT, GPDiTConfig, InputError
from gpdit_lightning.estimation.flops import PassShape, peak_bf16_flops, training_flops
from gpdit_lightning.files import written_whole
from gpdit_lightning.model.attention import KV, QKV, AttentionOperator, frame_causal_attention, select_backend
from gpdit_lightning.model.attention.backends import sdpa, xformers
from gpdit_lightning.model.config import AttentionVariant
from gpdit_lightning.training.optimizer import OptimizerConfig, build_optimizer

# Largest error allowed, as a part of the largest expected value: a few roundings, far below what a wrong mask does.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
HEAD_WIDTHS = (64, 128)  # GPDiT-B, GPDiT-H


@dataclass(frozen=True)
class Scale:
    """What is run: the real thing, or a rehearsal of the script."""

    device: torch.device
    operators: tuple[AttentionOperator, ...]
    frames: int
    height: int
    width: int
    clips: int
    warmup: int
    steps: int
    models: tuple[GPDiTConfig, ...]


@dataclass(frozen=True)
class AttentionResult:
    """Errors of one operator, as parts of the largest expected value; None where it did not run."""

    operator: str
    variant: str
    dtype: str
    head_width: int
    forward_error: float | None
    backward_error: float | None
    tolerance: float
    passed: bool
    failure: str = ""


@dataclass(frozen=True)
class StepResult:
    """A timed training step; tokens are noisy ones (those that are supervised)."""

    model: str
    attention: str
    operator: str
    clips: int
    activation_checkpointing: bool
    milliseconds: float | None
    tokens_per_second: float | None
    teraflops_per_second: float | None
    mfu: float | None
    peak_gib: float | None
    passed: bool
    failure: str = ""


def reference_attention(variant: AttentionVariant, tokens: int, clean: QKV, noisy: QKV) -> tuple[Tensor, Tensor]:
    """Frame-causal attention by a dense mask, clip after clip, in the precision of its inputs."""

    def attend(queries: QKV, allowed: Tensor) -> Tensor:
        scores = torch.einsum("qhk,mhk->hqm", queries.query, queries.key) / math.sqrt(queries.query.shape[-1])
        weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
        return torch.einsum("hqm,mhk->qhk", weights, queries.value)

    device, clean_count = noisy.query.device, clean.query.shape[1]
    clean_frames, noisy_frames = (torch.arange(x.query.shape[1], device=device) // tokens for x in (clean, noisy))
    frame = torch.cat((clean_frames, noisy_frames))
    is_clean = torch.arange(len(frame), device=device) < clean_count
    itself = (frame[:, None] == frame) & (is_clean[:, None] == is_clean)
    before = is_clean & (frame < frame[:, None])
    allowed = itself | (before if variant == "of2" else before & ~is_clean[:, None])

    clean_out, noisy_out = [], []
    for clip in range(len(noisy.query)):
        if clip < len(clean.query):
            both = QKV(*(torch.cat((c[clip], n[clip])) for c, n in zip(clean, noisy, strict=True)))
            out = attend(both, allowed)
            clean_out.append(out[:clean_count])
            noisy_out.append(out[clean_count:])
        else:
            alone = QKV(*(x[clip] for x in noisy))
            noisy_out.append(attend(alone, itself[clean_count:, clean_count:]))
    return torch.stack(clean_out), torch.stack(noisy_out)


def attention_errors(
    operator: AttentionOperator, variant: AttentionVariant, dtype: torch.dtype, head_width: int, scale: Scale
) -> tuple[float, float]:
    """Largest forward and backward errors; three clips of two heads, the last clip without context."""
    tokens = (scale.height // 2) * (scale.width // 2)
    generator = torch.Generator(scale.device).manual_seed(0)

    def leaves(clips: int, frames: int) -> QKV:
        shape = (clips, frames * tokens, 2, head_width)
        made = (torch.randn(shape, device=scale.device, generator=generator).to(dtype) for _ in range(3))
        return QKV(*(x.requires_grad_() for x in made))

    clean, noisy = leaves(2, scale.frames - 1), leaves(3, scale.frames)
    context = KV(clean.key, clean.value)
    clean_out, noisy_out = frame_causal_attention(operator, variant, tokens, context, clean, noisy)
    assert clean_out is not None
    assert noisy_out is not None
    outputs = (clean_out, noisy_out)
    cotangents = [torch.randn(x.shape, device=x.device, generator=generator).to(dtype) for x in (clean[0], noisy[0])]
    gradients = torch.autograd.grad(outputs, (*clean, *noisy), cotangents)

    exact_clean, exact_noisy = (QKV(*(x.detach().double().requires_grad_() for x in q)) for q in (clean, noisy))
    exact = reference_attention(variant, tokens, exact_clean, exact_noisy)
    exact_gradients = torch.autograd.grad(exact, (*exact_clean, *exact_noisy), [x.double() for x in cotangents])

    def worst(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        if not all(x.isfinite().all() for x in found):
            raise ArithmeticError("the operator gave values that are not finite")
        return max(
            ((x.double() - y).abs().amax() / y.abs().amax()).item() for x, y in zip(found, expected, strict=True)
        )

    return worst(outputs, exact), worst(gradients, exact_gradients)


def check_attention(
    operator: AttentionOperator, variant: AttentionVariant, dtype: torch.dtype, head_width: int, scale: Scale
) -> AttentionResult:
    """One row of the first table."""
    forward = backward = None
    failure = ""
    try:
        forward, backward = attention_errors(operator, variant, dtype, head_width, scale)
    except Exception as error:  # whatever a build for another torch or GPU may raise is a result
        failure = first_line(error)
    tolerance = TOLERANCES[dtype]
    passed = forward is not None and backward is not None and max(forward, backward) <= tolerance
    dtype_name = str(dtype).removeprefix("torch.")
    return AttentionResult(
        operator.__name__, variant, dtype_name, head_width, forward, backward, tolerance, passed, failure
    )


def time_step(config: GPDiTConfig, scale: Scale) -> StepResult:
    """One row of the second table; every clip has context."""
    device = scale.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    with device:
        model = GPDiT(config)
        shape = (scale.clips, scale.frames, config.latent_channels, scale.height, scale.width)
        noisy, clean, velocity = torch.randn(3, *shape).unbind()
        theta = torch.rand(shape[:2]) * math.pi / 2
    optimizer, _ = build_optimizer(model.parameters(), OptimizerConfig(), max_steps=scale.warmup + scale.steps)

    seconds = []
    for _ in range(scale.warmup + scale.steps):
        started = now(device)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = F.mse_loss(model(noisy, theta, clean), velocity)
        loss.backward()
        optimizer.step()
        seconds.append(now(device) - started)

    median = statistics.median(seconds[scale.warmup :])
    flops = sum(training_flops(config, PassShape(scale.clips, scale.clips, *shape[1:2], *shape[3:])).values())
    peak_flops = peak_bf16_flops(torch.cuda.get_device_name()) if on_gpu else None
    tokens = scale.clips * scale.frames * (scale.height // config.patch_size) * (scale.width // config.patch_size)
    finite = bool(loss.isfinite())
    return StepResult(
        model=config.size,
        attention=config.attention,
        operator=select_backend(config.attention_backend, device.type, torch.bfloat16).__name__,
        clips=scale.clips,
        activation_checkpointing=config.activation_checkpointing,
        milliseconds=1000 * median,
        tokens_per_second=tokens / median,
        teraflops_per_second=flops / median / 1e12,
        mfu=flops / median / peak_flops if peak_flops else None,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        passed=finite,
        failure="" if finite else f"the loss is {loss.item()}",
    )


def check_step(config: GPDiTConfig, scale: Scale) -> StepResult:
    """`time_step`, with an error as its result where it cannot run."""
    try:
        return time_step(config, scale)
    except torch.OutOfMemoryError:
        failure = "out of memory: take fewer clips with --clips"
    except RuntimeError as error:
        failure = first_line(error)
    finally:
        gc.collect()
    return StepResult(
        config.size,
        config.attention,
        config.attention_backend,
        scale.clips,
        config.activation_checkpointing,
        *(None,) * 5,
        passed=False,
        failure=failure,
    )


def now(device: torch.device) -> float:
    """Seconds, after the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def first_line(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def table(rows: Sequence[dict[str, Any]], columns: dict[str, tuple[str, str]]) -> str:
    """Rows as aligned text; `columns` maps a field to its heading and format."""

    def cell(value: Any, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [[heading for heading, _ in columns.values()]]
    lines += [[cell(row[field], form) for field, (_, form) in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


ATTENTION_COLUMNS = {
    "operator": ("operator", ""),
    "variant": ("mask", ""),
    "dtype": ("precision", ""),
    "head_width": ("head width", "d"),
    "forward_error": ("forward error", ".1e"),
    "backward_error": ("backward error", ".1e"),
    "tolerance": ("allowed", ".0e"),
    "verdict": ("", ""),
}
STEP_COLUMNS = {
    "model": ("model", ""),
    "attention": ("mask", ""),
    "operator": ("attention by", ""),
    "clips": ("clips", "d"),
    "activation_checkpointing": ("recompute", ""),
    "milliseconds": ("ms/step", ".1f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "teraflops_per_second": ("TFLOP/s", ".3g"),
    "mfu": ("MFU", ".1%"),
    "peak_gib": ("peak GiB", ".1f"),
    "verdict": ("", ""),
}


def with_verdict(result: AttentionResult | StepResult) -> dict[str, Any]:
    """A result as a row: `passed` and `failure` in one word or sentence."""
    verdict = "ok" if result.passed else f"FAILED {result.failure}".rstrip()
    return asdict(result) | {"verdict": verdict}


def environment(scale: Scale) -> dict[str, Any]:
    """Where and with what the figures were made."""
    try:
        xformers_version = importlib.metadata.version("xformers")
    except importlib.metadata.PackageNotFoundError:
        xformers_version = "not installed"
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if scale.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "xformers": xformers_version,
    }


def real_scale(clips: int) -> Scale:
    """The check itself: 17 frames at 192x320 are 5 latent frames of 24x40."""
    return Scale(
        device=torch.device("cuda"),
        operators=(xformers, sdpa),
        frames=5,
        height=24,
        width=40,
        clips=clips,
        warmup=3,
        steps=10,
        models=(GPDiTConfig.preset("B"), GPDiTConfig.preset("H", activation_checkpointing=True)),
    )


def rehearsal_scale() -> Scale:
    """Everything the check does, in seconds on a CPU."""
    small = {"layers": 2, "width": 64, "mlp_width": 128, "heads": 2}
    return Scale(
        device=torch.device("cpu"),
        operators=(sdpa,),
        frames=3,
        height=4,
        width=6,
        clips=2,
        warmup=1,
        steps=2,
        models=(GPDiTConfig.preset("B", **small), GPDiTConfig.preset("H", activation_checkpointing=True, **small)),
    )


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description="Checks the attention operators against a float64 reference on this GPU and times one training "
        "step of GPDiT-B and of GPDiT-H.",
    )
    options.add_argument("--out", type=Path, metavar="FILE.json", help="write the results there as well")
    options.add_argument("--clips", type=int, default=16, help="clips in a timed step (default: 16)")
    options.add_argument(
        "--cpu-rehearsal", action="store_true", help="run the script at toy size on the CPU; its figures mean nothing"
    )
    return options


def check(scale: Scale, out: Path | None, rehearsal: bool) -> bool:
    """Run everything, print both tables, write the file; True if all is well."""
    about = environment(scale)
    print(", ".join(f"{name} {value}" for name, value in about.items()))

    print("\nFrame-causal attention against a float64 reference (errors as parts of the largest expected value)")
    attention = [
        check_attention(operator, variant, dtype, head_width, scale)
        for operator in scale.operators
        for dtype in TOLERANCES
        for head_width in HEAD_WIDTHS
        for variant in get_args(AttentionVariant)
    ]
    print(table([with_verdict(result) for result in attention], ATTENTION_COLUMNS))

    print(
        f"\nOne training step: {scale.frames} latent frames of {scale.height}x{scale.width}, every clip with context, "
        f"bf16 autocast, AdamW; median of {scale.steps}"
    )
    steps = [check_step(config, scale) for config in scale.models]
    print(table([with_verdict(result) for result in steps], STEP_COLUMNS))
    print("Tokens are noisy ones; TFLOP/s and MFU count three forward passes, recomputation not included.")

    passed = all([result.passed for result in attention] + [result.passed for result in steps])
    print("\nAll is well." if passed else "\nNot all is well: see FAILED above.")
    if out is not None:
        report = {
            **about,
            "rehearsal": rehearsal,
            "passed": passed,
            "attention": [asdict(result) for result in attention],
            "steps": [asdict(result) for result in steps],
        }
        with written_whole(out) as path:
            path.write_text(json.dumps(report, indent=2) + "\n")
        print(f"written to {out}")
    return passed


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = parser().parse_args(arguments)
    try:
        if options.clips < 1:
            raise InputError(f"--clips is {options.clips}; it must be at least 1.")
        if options.out is not None and options.out.is_dir():
            raise InputError(f"--out {options.out} is a folder: name a file in it.")
        if options.cpu_rehearsal:
            print("Rehearsal on the CPU at toy size, SDPA in the place of xformers: no figure below means anything.")
            return 0 if check(rehearsal_scale(), options.out, rehearsal=True) else 1
        if not torch.cuda.is_available():
            print("This check needs a CUDA GPU; --cpu-rehearsal runs the script itself without one.", file=sys.stderr)
            return 3
        return 0 if check(real_scale(options.clips), options.out, rehearsal=False) else 1
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
