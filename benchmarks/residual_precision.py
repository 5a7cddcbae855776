"""`python -m benchmarks.residual_precision`: a residual stream and norms in bf16 against float32, at small size.

Both variants compute matrix products with bf16 weights and train float32 master weights, as ZeRO and FSDP2 do. They
differ in `stream_dtype` of `model/precision.py` alone. Everything runs on the CPU, on moving digits with codec `pca`.

First the script trains a shallow and a deep model with each variant, and with all computation in float32, from the same
initial weights on the same batches. It prints the mean loss over the last tenth of the steps and a validation loss,
computed from the master weights in float32, each relative to the variant with a float32 stream. Then it compares one
forward and backward pass of each variant with float64 at the same (rounded) weights, by depth, for random and trained
weights. An error is the norm of the difference relative to the norm of the float64 value.
"""

import argparse
import copy
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.cli.demo_videos import HELD_OUT_DIGITS, load_digits, random_path, render
from gpdit_lightning.codecs.pca import PcaCodec
from gpdit_lightning.diffusion import rotate_to
from gpdit_lightning.model import gpdit, precision

FRAMES, STRIDE = 9, 3  # of a video, which has three latent frames
CLIPS = 8  # per batch
SHALLOW = GPDiTConfig(size="tiny", width=128, mlp_width=512, heads=4)
DEEP = SHALLOW.replaced(layers=24, width=64, mlp_width=256)  # as deep as H
STREAMS = {"float32": torch.float32, "bf16": torch.bfloat16}
Batch = tuple[Tensor, Tensor, Tensor, Tensor]
"""noisy, theta, clean, velocity"""


@contextmanager
def stream_in(dtype: torch.dtype) -> Iterator[None]:
    """Compute models with bf16 weights with a residual stream and norms in `dtype`."""
    standard, describe = precision.stream_dtype, gpdit.describe_streams

    def chosen(weight: Tensor) -> torch.dtype:
        return dtype if weight.dtype == torch.bfloat16 else standard(weight)

    def describe_in_float32(config: GPDiTConfig, layout: Any, x: Tensor, *rest: Any) -> Any:
        return describe(config, layout, x.to(standard(x)), *rest)  # the tables of rotations are never in bf16

    with (
        mock.patch.object(precision, "stream_dtype", chosen),
        mock.patch.object(gpdit, "stream_dtype", chosen),
        mock.patch.object(gpdit, "describe_streams", describe_in_float32),
    ):
        yield


def digit_latents(count: int, held_out: bool) -> Tensor:
    """Return latents (count, 3, C, 8, 8) of moving digits, with a standard deviation of 1."""
    (digits, _), codec = load_digits(), PcaCodec.load()
    digits = digits[-HELD_OUT_DIGITS:] if held_out else digits[:-HELD_OUT_DIGITS]
    clips = []
    for number in range(count):
        generator = np.random.default_rng([held_out, number])
        digit = digits[generator.integers(len(digits))]
        clips.append(render(digit, random_path(generator), generator)[: FRAMES * STRIDE : STRIDE])
    latents = codec.encode(torch.stack(clips))
    mean, std = latents.mean((0, 1, 3, 4), keepdim=True), latents.std((0, 1, 3, 4), keepdim=True)
    return (latents - mean) / std


def batch_of(latents: Tensor, generator: torch.Generator) -> Batch:
    """Return a batch with random noise and noise levels."""
    clean = latents[torch.randint(len(latents), (CLIPS,), generator=generator)]
    theta = torch.rand(clean.shape[:2], generator=generator) * math.pi / 2
    sample = rotate_to(clean, torch.randn(clean.shape, generator=generator), theta)
    return sample.noisy, theta, clean, sample.velocity


def loss_of(model: GPDiT, batch: Batch) -> Tensor:
    """Return the loss, computed in float32 or better from a prediction in the model's precision."""
    noisy, theta, clean, velocity = batch
    return F.mse_loss(model(noisy, theta, clean), velocity)


def train(config: GPDiTConfig, stream: str | None, seed: int, data: Tensor, steps: int) -> tuple[GPDiT, float]:
    """Train float32 master weights; return the model and the mean loss of the last tenth of the steps.

    Args:
        config: the architecture.
        stream: precision of the residual stream of a working copy in bf16; None: all computation is in float32.
        seed: of initial weights, batches and noise.
        data: latents of the training clips.
        steps: number of optimizer steps, with a linear warm-up and a cosine decay.
    """
    torch.manual_seed(seed)
    master, generator = GPDiT(config), torch.Generator().manual_seed(seed)
    working = copy.deepcopy(master).bfloat16() if stream else master
    optimizer = torch.optim.AdamW(master.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        with stream_in(STREAMS[stream or "float32"]):
            loss = loss_of(working, batch_of(data, generator))
            loss.backward()
        if stream:
            for weight, rounded in zip(master.parameters(), working.parameters(), strict=True):
                weight.grad, rounded.grad = None if rounded.grad is None else rounded.grad.float(), None
        torch.nn.utils.clip_grad_norm_(master.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if stream:
            with torch.no_grad():
                for weight, rounded in zip(master.parameters(), working.parameters(), strict=True):
                    rounded.copy_(weight)
        losses.append(loss.item())
    return master, statistics.mean(losses[-max(1, steps // 10) :])


@torch.no_grad()
def validation_loss(model: GPDiT, data: Tensor) -> float:
    """Return the loss on held-out clips with fixed noise, in float32."""
    generator = torch.Generator().manual_seed(99)
    return statistics.mean(loss_of(model, batch_of(data, generator)).item() for _ in range(6))


def compare_training(name: str, config: GPDiTConfig, seeds: int, data: Tensor, held_out: Tensor, steps: int) -> GPDiT:
    """Train with every variant and seed, and print the losses; return the last model with a float32 stream."""
    kept, rows = None, []
    for seed in range(seeds):
        results = {}
        for stream in ("float32", "bf16", None):
            start = time.perf_counter()
            model, loss = train(config, stream, seed, data, steps)
            results[stream] = loss, validation_loss(model, held_out)
            kept = model if stream == "float32" else kept
            print(
                f"{name:<8} seed {seed}, stream {stream or 'float32, products float32':<26}"
                f"loss/train {results[stream][0]:.5f}   loss/val {results[stream][1]:.5f}"
                f"   {time.perf_counter() - start:.0f} s",
                flush=True,
            )
        rows.append(results)
    for stream in ("bf16", None):
        for part, kind in enumerate(("loss/train", "loss/val")):
            relative = [100 * (row[stream][part] / row["float32"][part] - 1) for row in rows]
            print(
                f"{name:<8} {kind:<10} {stream or 'all float32':<12} relative to a float32 stream: "
                f"mean {statistics.mean(relative):+.3f} %, of each seed {', '.join(f'{x:+.3f}' for x in relative)}"
            )
        spread = statistics.stdev(row["float32"][1] for row in rows) if seeds > 1 else math.nan
    print(f"{name:<8} loss/val between seeds (float32 stream): standard deviation {spread:.5f}", flush=True)
    assert kept is not None
    return kept


def activations(model: GPDiT, batch: Batch) -> dict[str, Any]:
    """Return the residual stream after each block, the velocity, and all gradients of one pass."""
    noisy, theta, clean, velocity = (
        part.to(torch.promote_types(model.output.weight.dtype, part.dtype)) for part in batch
    )
    streams: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda module, inputs, output: streams.append(output.detach()))
        for block in model.blocks
    ]
    prediction = model(noisy, theta, clean)
    F.mse_loss(prediction, velocity).backward()
    for hook in hooks:
        hook.remove()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"streams": streams, "velocity": prediction.detach(), "gradients": gradients}


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Return the relative error over all tensors."""
    pairs = list(zip(found, exact, strict=True))
    difference = sum(float((mine.double() - other).square().sum()) for mine, other in pairs)
    return math.sqrt(difference / sum(float(other.square().sum()) for _, other in pairs))


def compare_pass(name: str, model: GPDiT, batch: Batch) -> None:
    """Print the errors of one forward and backward pass of both variants."""
    rounded = copy.deepcopy(model).bfloat16()
    exact = activations(copy.deepcopy(rounded).double(), batch)
    streams, last = exact["streams"], len(exact["streams"]) - 1
    shown = sorted({0, last // 4, last // 2, max(0, last - 1)})
    noisy = len(streams[-1])
    updates = [float((b[-noisy:] - a[-noisy:]).norm() / a[-noisy:].norm()) for a, b in pairwise(streams)]
    peak = streams[max(0, last - 1)]
    print(
        f"{name}: norm of a block's update relative to the stream, first {updates[0]:.3f}, median "
        f"{statistics.median(updates):.3f}; largest value of the stream relative to its RMS "
        f"{float(peak.abs().max() / peak.square().mean().sqrt()):.1f}"
    )
    for stream, dtype in STREAMS.items():
        with stream_in(dtype):
            found = activations(copy.deepcopy(rounded), batch)
        by_depth = "  ".join(f"{n + 1}: {error([found['streams'][n]], [streams[n]]):.2%}" for n in shown)
        velocity = error([found["velocity"]], [exact["velocity"]])
        names = [key for key, value in exact["gradients"].items() if value is not None]
        parts = names, [key for key in names if key.startswith("blocks.0.")]
        gradient, first = (error(*([of["gradients"][key] for key in part] for of in (found, exact))) for part in parts)
        print(
            f"  stream {stream:<8} error after block {by_depth}  velocity {velocity:.2%}  gradient {gradient:.2%}"
            f"  of block 1 {first:.2%}",
            flush=True,
        )


def main() -> None:
    """Train and compare."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of the shallow model")
    parser.add_argument("--deep_steps", type=int, default=100, help="optimizer steps of the deep model")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds of the shallow model")
    parser.add_argument("--deep_seeds", type=int, default=2, help="number of seeds of the deep model")
    options = parser.parse_args()
    data, held_out = digit_latents(256, held_out=False), digit_latents(64, held_out=True)
    batch = batch_of(held_out, torch.Generator().manual_seed(7))
    for layers in (4, 12, 24, 40):
        torch.manual_seed(layers)
        model = GPDiT(DEEP.replaced(layers=layers))
        torch.nn.init.xavier_uniform_(model.output.weight)  # zero at initialization
        compare_pass(f"random weights, {layers} layers", model, batch)
    trainings = (
        ("shallow", SHALLOW, options.seeds, options.steps),
        ("deep", DEEP, options.deep_seeds, options.deep_steps),
    )
    for name, config, seeds, steps in trainings:
        model = compare_training(name, config, seeds, data, held_out, steps)
        compare_pass(f"trained weights, {config.layers} layers", model, batch)


if __name__ == "__main__":
    main()
