"""`python -m benchmarks.gpu_check [--out FILE.json]`: correctness and speed of the backbone on this GPU.

First, frame-causal attention by each built-in backend, forward and backward, is compared with a dense float64
reference. A backend that cannot be used, such as one whose package is not installed, is no failure: it is listed with
the reason.
Then a training step of GPDiT-B and of GPDiT-H is timed: forward pass, backward pass and AdamW, on random latents of
17-frame clips at 192x320, under bf16 autocast with float32 weights.

Exit status: 0 if all checks passed, 1 if a backend is wrong or a step failed, 2 for invalid options, 3 without a GPU.
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
from gpdit_lightning.estimation.flops import PassShape, training_flops
from gpdit_lightning.estimation.gpus import peak_bf16_flops
from gpdit_lightning.files import atomic_write
from gpdit_lightning.model.attention import KV, QKV, BlockSizes, PlannedAttention, plan_attention
from gpdit_lightning.model.attention.backends import BACKENDS, BUILT_IN, built_in_failure
from gpdit_lightning.model.config import AttentionVariant
from gpdit_lightning.training.optimizer import OptimizerConfig, build_optimizer

# Largest allowed error, relative to the largest reference value: a few roundings, far below the effect of a wrong mask.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
HEAD_WIDTHS = (64, 128)  # of GPDiT-B and of GPDiT-H


@dataclass(frozen=True)
class CheckConfig:
    """Settings of the check.

    Attributes:
        device: to compute on.
        backends: attention backends to compare with the reference.
        frames: number of latent frames per clip.
        height, width: of a latent frame, in latent pixels.
        clips: number of clips in a timed step.
        warmup: number of steps before the timed ones.
        steps: number of timed steps.
        models: backbones to time.
    """

    device: torch.device
    backends: tuple[str, ...]
    frames: int
    height: int
    width: int
    clips: int
    warmup: int
    steps: int
    models: tuple[GPDiTConfig, ...]


@dataclass(frozen=True)
class AttentionResult:
    """Errors of one backend, relative to the largest reference value; None if it did not run."""

    backend: str
    variant: str
    dtype: str
    head_width: int
    forward_error: float | None
    backward_error: float | None
    tolerance: float
    passed: bool
    failure: str = ""
    skipped: str = ""


@dataclass(frozen=True)
class StepResult:
    """Measurements of a training step; `tokens_per_second` counts noisy tokens, on which the loss is computed."""

    model: str
    attention: str
    backend: str
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
    """Compute frame-causal attention with a dense mask, one clip at a time, in the precision of the inputs."""

    def attend(qkv: QKV, allowed: Tensor) -> Tensor:
        scores = torch.einsum("qhk,mhk->hqm", qkv.query, qkv.key) / math.sqrt(qkv.query.shape[-1])
        weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
        return torch.einsum("hqm,mhk->qhk", weights, qkv.value)

    device, clean_count = noisy.query.device, clean.query.shape[1]
    clean_frames, noisy_frames = (torch.arange(x.query.shape[1], device=device) // tokens for x in (clean, noisy))
    frame = torch.cat((clean_frames, noisy_frames))
    is_clean = torch.arange(len(frame), device=device) < clean_count
    same_frame = (frame[:, None] == frame) & (is_clean[:, None] == is_clean)
    earlier_clean = is_clean & (frame < frame[:, None])
    allowed = same_frame | (earlier_clean if variant == "of2" else earlier_clean & ~is_clean[:, None])

    clean_out, noisy_out = [], []
    for clip in range(len(noisy.query)):
        if clip < len(clean.query):
            both = QKV(*(torch.cat((c[clip], n[clip])) for c, n in zip(clean, noisy, strict=True)))
            out = attend(both, allowed)
            clean_out.append(out[:clean_count])
            noisy_out.append(out[clean_count:])
        else:
            without_context = QKV(*(x[clip] for x in noisy))
            noisy_out.append(attend(without_context, same_frame[clean_count:, clean_count:]))
    return torch.stack(clean_out), torch.stack(noisy_out)


def attention_errors(
    backend: str, variant: AttentionVariant, dtype: torch.dtype, head_width: int, check: CheckConfig
) -> tuple[float, float]:
    """Return the largest forward and backward errors on three clips with two heads; the last clip has no context."""
    tokens = (check.height // 2) * (check.width // 2)
    generator = torch.Generator(check.device).manual_seed(0)

    def random_qkv(clips: int, frames: int) -> QKV:
        shape = (clips, frames * tokens, 2, head_width)
        tensors = (torch.randn(shape, device=check.device, generator=generator).to(dtype) for _ in range(3))
        return QKV(*(x.requires_grad_() for x in tensors))

    clean, noisy = random_qkv(2, check.frames - 1), random_qkv(3, check.frames)
    plan = plan_attention(variant, BlockSizes.of_frames(check.frames, tokens), clips=2, rows=3)
    parts = [clean, QKV(*(x[:2] for x in noisy)), QKV(*(x[2:] for x in noisy))]
    attention = PlannedAttention.of(BACKENDS[backend], plan, clean.key.device)
    clean_out, with_context, without = attention(KV(clean.key, clean.value), parts)
    outputs = (clean_out, torch.cat((with_context, without)))
    cotangents = [torch.randn(x.shape, device=x.device, generator=generator).to(dtype) for x in (clean[0], noisy[0])]
    gradients = torch.autograd.grad(outputs, (*clean, *noisy), cotangents)

    exact_clean, exact_noisy = (QKV(*(x.detach().double().requires_grad_() for x in q)) for q in (clean, noisy))
    exact = reference_attention(variant, tokens, exact_clean, exact_noisy)
    exact_gradients = torch.autograd.grad(exact, (*exact_clean, *exact_noisy), [x.double() for x in cotangents])

    def largest_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        if not all(x.isfinite().all() for x in actual):
            raise ArithmeticError("the backend returned values that are not finite")
        return max(
            ((x.double() - y).abs().amax() / y.abs().amax()).item() for x, y in zip(actual, expected, strict=True)
        )

    return largest_error(outputs, exact), largest_error(gradients, exact_gradients)


def check_attention(
    backend: str, variant: AttentionVariant, dtype: torch.dtype, head_width: int, check: CheckConfig
) -> AttentionResult:
    """Compare one backend with the reference; return a row of the first table."""
    forward = backward = None
    failure, skipped = "", BACKENDS[backend].obstacle(check.device.type, dtype, gradient=True) or ""
    try:
        if not skipped:
            forward, backward = attention_errors(backend, variant, dtype, head_width, check)
    except Exception as error:  # a build for another torch or GPU may raise anything
        failure = first_line(error)
    tolerance = TOLERANCES[dtype]
    passed = bool(skipped) or (forward is not None and backward is not None and max(forward, backward) <= tolerance)
    dtype_name = str(dtype).removeprefix("torch.")
    return AttentionResult(
        backend, variant, dtype_name, head_width, forward, backward, tolerance, passed, failure, skipped
    )


def time_step(config: GPDiTConfig, check: CheckConfig) -> StepResult:
    """Time a training step in which every clip has context; return a row of the second table."""
    device = check.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    with device:
        model = GPDiT(config)
        shape = (check.clips, check.frames, config.latent_channels, check.height, check.width)
        noisy, clean, velocity = torch.randn(3, *shape).unbind()
        theta = torch.rand(shape[:2]) * math.pi / 2
    optimizer, _ = build_optimizer(model.parameters(), OptimizerConfig(), max_steps=check.warmup + check.steps)

    seconds = []
    for _ in range(check.warmup + check.steps):
        started = now(device)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = F.mse_loss(model(noisy, theta, clean), velocity)
        loss.backward()
        optimizer.step()
        seconds.append(now(device) - started)

    median = statistics.median(seconds[check.warmup :])
    flops = sum(training_flops(config, PassShape(check.clips, check.clips, *shape[1:2], *shape[3:])).values())
    peak_flops = peak_bf16_flops(torch.cuda.get_device_name()) if on_gpu else None
    tokens = check.clips * check.frames * (check.height // config.patch_size) * (check.width // config.patch_size)
    finite = bool(loss.isfinite())
    return StepResult(
        model=config.size,
        attention=config.attention,
        backend=config.attention_backend,
        clips=check.clips,
        activation_checkpointing=config.activation_checkpointing,
        milliseconds=1000 * median,
        tokens_per_second=tokens / median,
        teraflops_per_second=flops / median / 1e12,
        mfu=flops / median / peak_flops if peak_flops else None,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        passed=finite,
        failure="" if finite else f"the loss is {loss.item()}",
    )


def check_step(config: GPDiTConfig, check: CheckConfig) -> StepResult:
    """Time a training step as `time_step`, but return an error as a failed result."""
    try:
        return time_step(config, check)
    except torch.OutOfMemoryError:
        failure = "out of memory: pass a smaller --clips"
    except RuntimeError as error:
        failure = first_line(error)
    finally:
        gc.collect()
    return StepResult(
        config.size,
        config.attention,
        config.attention_backend,
        check.clips,
        config.activation_checkpointing,
        *(None,) * 5,
        passed=False,
        failure=failure,
    )


def now(device: torch.device) -> float:
    """Return the time in seconds, after the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def first_line(error: Exception) -> str:
    """Return the first line of an exception, with its type."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def table(rows: Sequence[dict[str, Any]], columns: dict[str, tuple[str, str]]) -> str:
    """Format rows as aligned text; `columns` maps each field to its heading and format."""

    def cell(value: Any, spec: str) -> str:
        return "-" if value is None else format(value, spec)

    lines = [[heading for heading, _ in columns.values()]]
    lines += [[cell(row[field], spec) for field, (_, spec) in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


ATTENTION_COLUMNS = {
    "backend": ("backend", ""),
    "variant": ("mask", ""),
    "dtype": ("precision", ""),
    "head_width": ("head width", "d"),
    "forward_error": ("forward error", ".1e"),
    "backward_error": ("backward error", ".1e"),
    "tolerance": ("tolerance", ".0e"),
    "verdict": ("", ""),
}
STEP_COLUMNS = {
    "model": ("model", ""),
    "attention": ("mask", ""),
    "backend": ("backend", ""),
    "clips": ("clips", "d"),
    "activation_checkpointing": ("checkpointing", ""),
    "milliseconds": ("ms/step", ".1f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "teraflops_per_second": ("TFLOP/s", ".3g"),
    "mfu": ("MFU", ".1%"),
    "peak_gib": ("peak GiB", ".1f"),
    "verdict": ("", ""),
}


def with_verdict(result: AttentionResult | StepResult) -> dict[str, Any]:
    """Return a result as a row, with `passed` and `failure` as text."""
    verdict = "ok" if result.passed else f"FAILED {result.failure}".rstrip()
    skipped = getattr(result, "skipped", "")
    return asdict(result) | {"verdict": f"not run: {skipped}" if skipped else verdict}


def environment(check: CheckConfig) -> dict[str, Any]:
    """Return the date, the device and the versions of libraries."""
    try:
        xformers_version = importlib.metadata.version("xformers")
    except importlib.metadata.PackageNotFoundError:
        xformers_version = "not installed"
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if check.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "xformers": xformers_version,
    }


def full_check(clips: int) -> CheckConfig:
    """Return the settings for a GPU: 17 frames at 192x320, which are 5 latent frames of 24x40."""
    return CheckConfig(
        device=torch.device("cuda"),
        backends=BUILT_IN,
        frames=5,
        height=24,
        width=40,
        clips=clips,
        warmup=3,
        steps=10,
        models=tuple(
            model.replaced(attention_backend=backend)
            for model in (GPDiTConfig.preset("B"), GPDiTConfig.preset("H", activation_checkpointing=True))
            for backend in BUILT_IN
            if built_in_failure(backend, "cuda", torch.bfloat16, model.head_width, gradient=True) is None
        ),
    )


def smoke_test() -> CheckConfig:
    """Return settings of a tiny size, which take seconds on a CPU."""
    small = {"layers": 2, "width": 64, "mlp_width": 128, "heads": 2}
    return CheckConfig(
        device=torch.device("cpu"),
        backends=("sdpa",),
        frames=3,
        height=4,
        width=6,
        clips=2,
        warmup=1,
        steps=2,
        models=(GPDiTConfig.preset("B", **small), GPDiTConfig.preset("H", activation_checkpointing=True, **small)),
    )


def option_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    options = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m benchmarks.gpu_check",
        description="Compare the attention backends with a float64 reference on this GPU, and time a training step of "
        "GPDiT-B and of GPDiT-H.",
    )
    options.add_argument("--out", type=Path, metavar="FILE.json", help="also write the results to this file")
    options.add_argument("--clips", type=int, default=16, help="clips per timed step (default: 16)")
    options.add_argument(
        "--smoke_test",
        action="store_true",
        help="run the script at a tiny size on the CPU; its figures are meaningless",
    )
    return options


def run(check: CheckConfig, out: Path | None, is_smoke_test: bool) -> bool:
    """Run all checks, print both tables and write the file; return whether all checks passed."""
    versions = environment(check)
    print(", ".join(f"{name} {value}" for name, value in versions.items()))

    print("\nFrame-causal attention against a float64 reference (errors relative to the largest reference value)")
    attention = [
        check_attention(backend, variant, dtype, head_width, check)
        for backend in check.backends
        for dtype in TOLERANCES
        for head_width in HEAD_WIDTHS
        for variant in get_args(AttentionVariant)
    ]
    print(table([with_verdict(result) for result in attention], ATTENTION_COLUMNS))

    print(
        f"\nA training step: {check.frames} latent frames of {check.height}x{check.width}, every clip with context, "
        f"bf16 autocast, AdamW; median of {check.steps}"
    )
    steps = [check_step(config, check) for config in check.models]
    print(table([with_verdict(result) for result in steps], STEP_COLUMNS))
    print("Tokens are noisy tokens. TFLOP/s and MFU count three forward passes, without recomputation.")

    passed = all([result.passed for result in attention] + [result.passed for result in steps])
    print("\nAll checks passed." if passed else "\nSome checks failed: see FAILED above.")
    if out is not None:
        report = {
            **versions,
            "smoke_test": is_smoke_test,
            "passed": passed,
            "attention": [asdict(result) for result in attention],
            "steps": [asdict(result) for result in steps],
        }
        with atomic_write(out) as path:
            path.write_text(json.dumps(report, indent=2) + "\n")
        print(f"written to {out}")
    return passed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = option_parser().parse_args(arguments)
    try:
        if options.clips < 1:
            raise InputError(f"--clips is {options.clips}: give at least 1.")
        if options.out is not None and options.out.is_dir():
            raise InputError(f"--out is {options.out}, a folder: give the path of a file.")
        if options.smoke_test:
            print("Smoke test at a tiny size on the CPU, without xformers: the figures below are meaningless.")
            return 0 if run(smoke_test(), options.out, is_smoke_test=True) else 1
        if not torch.cuda.is_available():
            print("error: this check needs a CUDA GPU; --smoke_test runs the script without one.", file=sys.stderr)
            return 3
        return 0 if run(full_check(options.clips), options.out, is_smoke_test=False) else 1
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
