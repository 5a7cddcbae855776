"""`python -m benchmarks.generation`: time and memory of a rollout as functions of the frame number.

A GPDiT with random weights generates a long video from one latent frame, with `of2` and `of` attention: with a cache of
all frames, with a rolling cache, and without a cache (where the result is the same). For several frame numbers, the
table shows the mean time of the last frames, relative to the first figure of the rolling cache, and the memory in use.
Further lines show the cost of caching a finished frame, in a separate pass and in the first pass of the next frame, and
the speed of decoding.

On a GPU, for H at 192x320 in 25 steps with guidance: `--size H --frame 192x320 --steps 25 --guidance 1.2 --compile`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.codecs import PcaCodec, WanCodec
from gpdit_lightning.diffusion import Guidance, RotationSampler
from gpdit_lightning.estimation.units import MIB
from gpdit_lightning.files import atomic_write
from gpdit_lightning.generation import GenerationConfig, cast_linear_weights, rollout
from gpdit_lightning.media.images import Size, parse_size
from gpdit_lightning.model.config import AttentionVariant

AVERAGED = 5  # number of frames whose mean time is one figure


@dataclass(frozen=True)
class Figure:
    """One cell of the table: time and memory of a rollout at one frame number."""

    variant: str
    history: str
    frame: int
    seconds: float
    mebibytes: float


def memory_in_use(device: torch.device) -> float:
    """Return the memory in use in MiB: of tensors on the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / MIB
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / MIB


def synchronize(device: torch.device) -> None:
    """Wait until the GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(frames: Iterator[Tensor], device: torch.device) -> Iterator[float]:
    """Yield the seconds that each frame takes."""
    while True:
        start = time.perf_counter()
        if next(frames, None) is None:
            return
        synchronize(device)
        yield time.perf_counter() - start


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Return the median time of a function in seconds, after a warm-up call."""
    work()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def random_model(config: GPDiTConfig, size: Size, device: torch.device) -> tuple[GPDiT, Tensor, torch.dtype | None]:
    """Return a model with random weights, one latent frame of context, and the precision of products for generation.

    Args:
        config: architecture of the model.
        size: height and width of a latent frame.
        device: of the model; on a GPU the precision is bf16.
    """
    with device:
        model = GPDiT(config).eval().requires_grad_(False)
        context = torch.randn(1, 1, config.latent_channels, *size)
    precision = torch.bfloat16 if device.type == "cuda" else None
    if precision is not None:
        cast_linear_weights(model, precision)
    return model, context, precision


def measure_rollout(
    model: GPDiT, context: Tensor, config: GenerationConfig, history: str, marks: Sequence[int]
) -> Iterator[Figure]:
    """Yield the figures of one rollout at the frame numbers `marks`."""
    device = context.device
    recent: list[float] = []
    for number, elapsed in enumerate(timed(rollout(model, context, marks[-1], config), device), start=1):
        recent = [*recent[-AVERAGED + 1 :], elapsed]
        if number in marks:
            yield Figure(model.config.attention, history, number, statistics.fmean(recent), memory_in_use(device))


def table(figures: Sequence[Figure], pixel_frames: int) -> str:
    """Return a Markdown table with a row for each rollout: relative time, pixel frames per second, MiB.

    Args:
        figures: of all rollouts.
        pixel_frames: pixel frames per latent frame.
    """
    unit = next(f.seconds for f in figures if f.history == "window")
    marks = sorted({figure.frame for figure in figures})
    lines = ["| attention | history | " + " | ".join(f"frame {mark}" for mark in marks) + " |"]
    lines.append("|---" * (2 + len(marks)) + "|")
    for variant, history in dict.fromkeys((f.variant, f.history) for f in figures):
        row = {f.frame: f for f in figures if (f.variant, f.history) == (variant, history)}
        cells = [
            f"{f.seconds / unit:.2f}x, {pixel_frames / f.seconds:.1f} frames/s, {f.mebibytes:.0f} MiB" if f else ""
            for f in map(row.get, marks)
        ]
        lines.append(f"| {variant} | {history} | {' | '.join(cells)} |")
    return "\n".join(lines)


def caching_cost(model: GPDiT, context: Tensor, window: int) -> str:
    """Measure the cost of caching a finished frame, in a separate pass and in the first pass of the next frame."""
    clips, _, _, height, width = context.shape
    noisy, clean, theta = context[:, 0], context[:, :1], context.new_ones(clips)
    cache = model.new_cache(clips, window, height, width, sinks=0)
    model.extend(cache, context.expand(-1, window, -1, -1, -1))

    def in_two_passes() -> None:
        model.extend(cache, clean)
        model.denoise(noisy, theta, cache)

    plain = median_seconds(lambda: model.denoise(noisy, theta), context.device)
    separate = median_seconds(in_two_passes, context.device)
    joint = median_seconds(lambda: model.denoise(noisy, theta, cache, clean=clean), context.device)
    return (
        f"caching a frame ({model.config.attention}) and the next frame's first step, relative to a step without "
        f"context: {separate / plain:.2f} in two passes, {joint / plain:.2f} in one"
    )


def load_codec_for(device: torch.device) -> WanCodec | PcaCodec:
    """Return a WanVAE of full size with random weights on a GPU, else `pca`."""
    if device.type == "cuda":
        from diffusers import AutoencoderKLWan

        return WanCodec(AutoencoderKLWan()).to(device)
    return PcaCodec.load()


def decoding_speed(codec: WanCodec | PcaCodec, size: Size, device: torch.device) -> str:
    """Measure the pixel frames per second of the decoder."""
    height, width = (side // codec.spatial_factor for side in size)
    latent = torch.randn(1, 1, codec.latent_channels, height, width, device=device)
    decode = codec.decoder()
    decode(latent)
    rate = codec.temporal_factor / median_seconds(lambda: decode(latent), device)
    return f"decoding by {codec.name}: {rate:.1f} frames/s"


def option_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m benchmarks.generation",
        description=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--size", default="tiny", help="size of the backbone: tiny, B or H")
    add("--frame", default="128x128", help="HEIGHTxWIDTH in pixels")
    add("--steps", type=int, default=4, help="sampler steps")
    add("--guidance", type=float, default=1.0, help="guidance scale over the context; 1 is no guidance")
    add(
        "--window",
        type=int,
        default=11,
        help="latent frames that a frame attends to; 11 as in clips of 45 pixel frames",
    )
    add("--sinks", type=int, default=1, help="first latent frames that all frames attend to, besides the window")
    add("--frames", type=int, default=1000, help="latent frames of rollouts with a window")
    add("--growing_frames", type=int, default=100, help="latent frames of rollouts that attend to all frames")
    add("--compile", action="store_true", help="fuse blocks with torch.compile")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--out", type=Path, help="JSON file for the figures")
    return parser


def measure_variant(
    variant: AttentionVariant, codec: WanCodec | PcaCodec, options: argparse.Namespace
) -> tuple[list[Figure], str]:
    """Return the figures of all rollouts of one attention variant, and a sentence on the cost of caching."""
    height, width = (side // codec.spatial_factor for side in parse_size(options.frame))
    config = GPDiTConfig.preset(options.size, attention=variant)
    model, context, precision = random_model(config, (height, width), torch.device(options.device))

    def settings(window: int | None, cached: bool) -> GenerationConfig:
        sampler, guidance = RotationSampler(options.steps), Guidance(options.guidance)
        sinks = options.sinks if window else 0
        return GenerationConfig(sampler, guidance, window, sinks, cached, options.compile, precision)

    long = [mark for mark in (15, 100, 500, options.frames) if mark <= options.frames]
    short = [mark for mark in (15, 50, options.growing_frames) if mark <= options.growing_frames]
    rollouts = [("window", options.window, True, long), ("all frames", None, True, short)]
    rollouts += [("window, no cache", options.window, False, [15])] if variant == "of" else []
    rollouts += [("all frames, no cache", None, False, [15])] if variant == "of2" else []
    # A warm-up rollout, in which kernels are selected and compiled.
    list(rollout(model, context, options.window + options.sinks + 2, settings(options.window, True)))
    figures: list[Figure] = []
    for history, window, cached, marks in rollouts:
        figures += measure_rollout(model, context, settings(window, cached), history, marks)
    with torch.inference_mode(), torch.autocast(context.device.type, precision, enabled=precision is not None):
        return figures, caching_cost(model, context, options.window)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write the figures."""
    options = option_parser().parse_args(arguments)
    device = torch.device(options.device)
    torch.manual_seed(0)
    codec = load_codec_for(device)
    figures: list[Figure] = []
    notes = [decoding_speed(codec, parse_size(options.frame), device)]
    for variant in get_args(AttentionVariant):
        of_variant, note = measure_variant(variant, codec, options)
        figures += of_variant
        notes.append(note)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{options.size} at {options.frame}, {options.steps} steps, guidance {options.guidance}, window "
        f"{options.window} + {options.sinks} sinks, {name}, torch {torch.__version__}\n"
    )
    print(table(figures, codec.temporal_factor), *notes, sep="\n")
    if options.out:
        settings = {name: str(value) for name, value in vars(options).items()}
        report = {"device": name, "torch": torch.__version__, "date": datetime.now().isoformat(), "options": settings}
        with atomic_write(options.out) as path:
            path.write_text(json.dumps(report | {"figures": [asdict(f) for f in figures], "notes": notes}, indent=2))


if __name__ == "__main__":
    main()
