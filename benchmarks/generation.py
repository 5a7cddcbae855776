"""Frames per second and memory of a rollout against the number of its frame: `python -m benchmarks.generation`.

A GPDiT with random weights generates a long video from one latent frame, `of2` and `of`, with a cache that keeps all
frames, with one that rolls, and without (where an equal result permits it). The table has the mean time of the frames
around some frame numbers, relative to the first ones of the rolling cache, and the memory then. Two further lines show
what it saves to take a finished frame in on the way, and what the pixels cost.

On a GPU, of H at 192x320 in 25 steps with guidance: `--size H --frame 192x320 --steps 25 --guidance 1.2 --compile`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.codecs import PcaCodec, WanCodec
from gpdit_lightning.diffusion import Guidance, RotationSampler
from gpdit_lightning.files import written_whole
from gpdit_lightning.generation import GenerationConfig, cast_linear_weights, rollout
from gpdit_lightning.media.images import parse_size

MIB = 2**20
PIXEL_FRAMES = 4  # of a latent frame
AROUND = 5  # frames whose mean time is one figure


@dataclass(frozen=True)
class Figure:
    """One cell of the table."""

    variant: str
    history: str
    frame: int
    seconds: float
    mebibytes: float


def memory(device: torch.device) -> float:
    """MiB in use: of the GPU by tensors, or of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / MIB
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / MIB


def settle(device: torch.device) -> None:
    """Wait until the GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(frames: Iterator[Tensor], device: torch.device) -> Iterator[float]:
    """Seconds of each frame."""
    while True:
        began = time.perf_counter()
        if next(frames, None) is None:
            return
        settle(device)
        yield time.perf_counter() - began


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Median time of some work, after a first run that does not count."""
    work()
    taken = []
    for _ in range(repeats):
        settle(device)
        began = time.perf_counter()
        work()
        settle(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def curve(
    model: GPDiT, context: Tensor, config: GenerationConfig, history: str, marks: Sequence[int]
) -> Iterator[Figure]:
    """The figures of one rollout, up to the last mark."""
    device = context.device
    taken: list[float] = []
    for number, passed in enumerate(timed(rollout(model, context, marks[-1], config), device), start=1):
        taken = [*taken[-AROUND + 1 :], passed]
        if number in marks:
            yield Figure(model.config.attention, history, number, statistics.fmean(taken), memory(device))


def table(figures: Sequence[Figure]) -> str:
    """Rows of frame numbers, in Markdown: relative time, frames per second, MiB."""
    unit = next(f.seconds for f in figures if f.history == "window")
    marks = sorted({figure.frame for figure in figures})
    lines = ["| attention | history | " + " | ".join(f"frame {mark}" for mark in marks) + " |"]
    lines.append("|---" * (2 + len(marks)) + "|")
    for variant, history in dict.fromkeys((f.variant, f.history) for f in figures):
        row = {f.frame: f for f in figures if (f.variant, f.history) == (variant, history)}
        cells = [
            f"{f.seconds / unit:.2f}x, {PIXEL_FRAMES / f.seconds:.1f} frames/s, {f.mebibytes:.0f} MiB" if f else ""
            for f in map(row.get, marks)
        ]
        lines.append(f"| {variant} | {history} | {' | '.join(cells)} |")
    return "\n".join(lines)


def taking_in(model: GPDiT, context: Tensor, window: int) -> str:
    """What it saves to compute a finished frame's keys and values in the next one's first pass."""
    clips, _, _, height, width = context.shape
    noisy, clean, theta = context[:, 0], context[:, :1], context.new_ones(clips)
    cache = model.new_cache(clips, window, height, width, sinks=0)
    model.extend(cache, context.expand(-1, window, -1, -1, -1))

    def in_two_passes() -> None:
        model.extend(cache, clean)
        model.denoise(noisy, theta, cache)

    plain = seconds(lambda: model.denoise(noisy, theta), context.device)
    apart = seconds(in_two_passes, context.device)
    on_the_way = seconds(lambda: model.denoise(noisy, theta, cache, clean=clean), context.device)
    return (
        f"taking a frame in ({model.config.attention}): with a pass of its own and the next frame's first one "
        f"{apart / plain:.2f} times a frame without context, in one pass {on_the_way / plain:.2f} times"
    )


def decoding(height: int, width: int, device: torch.device) -> str:
    """What the pixels of one latent frame cost: a WanVAE of full size with random weights on a GPU, else `pca`."""
    if device.type == "cuda":
        from diffusers import AutoencoderKLWan

        codec: WanCodec | PcaCodec = WanCodec(AutoencoderKLWan()).to(device)
    else:
        codec = PcaCodec.load()
    latent = torch.randn(1, 1, codec.latent_channels, height // 8, width // 8, device=device)
    decode = codec.decoder()
    decode(latent)
    return f"decoding by {codec.name}: {PIXEL_FRAMES / seconds(lambda: decode(latent), device):.1f} frames/s"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation",
        description=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--size", default="tiny", help="tiny, B or H")
    add("--frame", default="128x128", help="HEIGHTxWIDTH in pixels")
    add("--steps", type=int, default=4, help="sampler steps")
    add("--guidance", type=float, default=1.0, help="scale over the context; 1 needs no second branch")
    add("--window", type=int, default=11, help="latest frames that a frame sees: 11 are those of 45 pixel frames")
    add("--sinks", type=int, default=1, help="first frames that stay visible besides")
    add("--frames", type=int, default=1000, help="latent frames of the rollout with a window")
    add("--growing_frames", type=int, default=100, help="latent frames of those whose history grows")
    add("--compile", action="store_true", help="fuse blocks")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args(arguments)

    device = torch.device(options.device)
    height, width = parse_size(options.frame)
    torch.manual_seed(0)
    figures: list[Figure] = []
    notes = [decoding(height, width, device)]
    for variant in ("of2", "of"):
        config = GPDiTConfig.preset(options.size, attention=variant)
        with device:
            model = GPDiT(config).eval().requires_grad_(False)
            context = torch.randn(1, 1, config.latent_channels, height // 8, width // 8)
        precision = torch.bfloat16 if device.type == "cuda" else None
        if precision is not None:
            cast_linear_weights(model, precision)

        def settings(window: int | None, cached: bool, precision: torch.dtype | None = precision) -> GenerationConfig:
            sampler, guidance = RotationSampler(options.steps), Guidance(options.guidance)
            sinks = options.sinks if window else 0
            return GenerationConfig(sampler, guidance, window, sinks, cached, options.compile, precision)

        long = [mark for mark in (15, 100, 500, options.frames) if mark <= options.frames]
        short = [mark for mark in (15, 50, options.growing_frames) if mark <= options.growing_frames]
        histories = [("window", options.window, True, long), ("all frames", None, True, short)]
        histories += [("window, no cache", options.window, False, [15])] if variant == "of" else []
        histories += [("all frames, no cache", None, False, [15])] if variant == "of2" else []
        # A first rollout does not count: kernels are chosen and compiled in it.
        list(rollout(model, context, options.window + options.sinks + 2, settings(options.window, True)))
        for history, window, cached, marks in histories:
            figures += curve(model, context, settings(window, cached), history, marks)
        with torch.inference_mode(), torch.autocast(device.type, precision, enabled=precision is not None):
            notes.append(taking_in(model, context, options.window))
        del model

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{options.size} at {options.frame}, {options.steps} steps, guidance {options.guidance}, window "
        f"{options.window} + {options.sinks} sinks, {name}, torch {torch.__version__}\n"
    )
    print(table(figures), *notes, sep="\n")
    if options.out:
        shown = {name: str(value) for name, value in vars(options).items()}
        report = {"device": name, "torch": torch.__version__, "date": datetime.now().isoformat(), "options": shown}
        with written_whole(options.out) as path:
            path.write_text(json.dumps(report | {"figures": [asdict(f) for f in figures], "notes": notes}, indent=2))


if __name__ == "__main__":
    main()
