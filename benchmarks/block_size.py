"""`python -m benchmarks.block_size`: FLOPs and time as functions of the block size, beside equation 6 of ACDiT.

A GPDiT with random weights denoises a clip block after block with a KV cache. For each number of frames per block, the
table shows the cost relative to denoising the clip as a single block, as full-sequence diffusion does:

- one sampler step of every block, as predicted by equation 6, in counted FLOPs and in time;
- all sampler steps of every block, of which the first one also writes the block before into the cache;
- one training step, in which the network also processes the clean blocks.

On a GPU, for ACDiT-B on 16 frames of 256x256: `--size B --latent_size 32x32`.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.estimation.flops import PassShape, training_flops
from gpdit_lightning.files import atomic_write
from gpdit_lightning.media.images import Size, parse_size


@dataclass(frozen=True)
class Costs:
    """FLOPs or seconds for one clip.

    Attributes:
        step: one sampler step of every block.
        first_step: the same, with each block written into the cache in the first step of the next block.
        training: a forward and backward pass.
    """

    step: float
    first_step: float
    training: float

    def generation(self, steps: int) -> float:
        """Return the costs of all sampler steps of every block."""
        return self.first_step + (steps - 1) * self.step


@dataclass(frozen=True)
class Figure:
    """One row of the table.

    Attributes:
        frames: latent frames of a block.
        tokens: tokens of a block.
        equation: cost of a sampler step relative to that of a single block, by equation 6.
        flops: counted.
        seconds: measured.
    """

    frames: int
    tokens: int
    equation: float
    flops: Costs
    seconds: Costs


def saved_fraction(config: GPDiTConfig, block_tokens: int, tokens: int) -> float:
    """Return the fraction of FLOPs that blocks of B tokens save in a sequence of L (ACDiT, equation 6).

    It is (1 - B/L) / (2 + m/k) with m = theta / h^2 and k = L / h, where theta is the number of weights of a layer with
    which every token is multiplied: those of attention and MLP, without adaLN.
    """
    theta = 4 * config.width**2 + 2 * config.width * config.mlp_width
    m, k = theta / config.width**2, tokens / config.width
    return (1 - block_tokens / tokens) / (2 + m / k)


def sampler_steps(
    model: GPDiT, frames: int, size: Size, measure: Callable[[Callable[[], object]], float]
) -> tuple[float, float]:
    """Return the costs of one sampler step of every block of a clip: without and with writing into the cache.

    Args:
        model: the network.
        frames: latent frames of the clip.
        size: height and width of a latent frame.
        measure: runs a function and returns its costs.
    """
    layout, device = model.layout(*size), model.device
    clip = torch.randn(1, frames, model.config.latent_channels, *size, device=device)
    theta = torch.ones(1, device=device)
    cache, before, step, first_step = model.new_cache(1, frames, *size), None, 0.0, 0.0
    with torch.inference_mode():
        for block in range(layout.count(frames)):
            group = layout.group_of(block, frames)
            latents = clip[:, group.start : group.stop]
            noisy = latents[:, 0] if len(group) == 1 else latents
            # The call that appends is first: the other one needs the block before in the cache.
            first_step += measure(partial(model.denoise, noisy, theta, cache, clean=before))
            step += measure(partial(model.denoise, noisy, theta, cache))
            before = latents
    return step, first_step


def training_step(model: GPDiT, frames: int, size: Size) -> None:
    """Run one forward and backward pass on a clip with context."""
    config, device = model.config, model.device
    noisy, target = torch.randn(2, 1, frames, config.latent_channels, *size, device=device)
    theta = torch.rand(1, model.layout(*size).count(frames), device=device) * math.pi / 2
    F.mse_loss(model(noisy, theta, torch.randn_like(noisy)), target).backward()


def counted_flops(config: GPDiTConfig, frames: int, size: Size) -> Costs:
    """Count the FLOPs: of sampler steps by torch's counter, of training by the library's formula."""
    with torch.device("meta"):
        model = GPDiT(config).requires_grad_(False)

    def count(run: Callable[[], object]) -> float:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    training = sum(training_flops(config, PassShape(1, 1, frames, *size)).values())
    return Costs(*sampler_steps(model, frames, size, count), training)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Return the time that a function takes: of the clock on a GPU, which computes under bf16 autocast, else CPU time.

    CPU time does not include that of other processes on the same cores.
    """
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize(device)
    start = clock()
    with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
        run()
    if on_gpu:
        torch.cuda.synchronize(device)
    return clock() - start


def measured_seconds(models: Sequence[GPDiT], frames: int, size: Size, repeats: int) -> list[Costs]:
    """Return the least times of each model, since other load on the machine only adds to them.

    The models alternate, so that such load affects all alike; the first round is a warm-up.
    """
    rounds = []
    for _ in range(repeats + 1):
        of_round = []
        for model in models:
            steps = sampler_steps(model, frames, size, partial(seconds_of, device=model.device))
            training = seconds_of(partial(training_step, model, frames, size), model.device)
            of_round.append((*steps, training))
        rounds.append(of_round)
    by_model = zip(*rounds[1:], strict=True)
    return [Costs(*map(min, zip(*of_model, strict=True))) for of_model in by_model]


def measure(config: GPDiTConfig, options: argparse.Namespace) -> list[Figure]:
    """Return the figures of all block sizes; the last one is of a single block."""
    frames, size, device = options.frames, parse_size(options.latent_size), torch.device(options.device)
    numbers = [number for number in sorted(set(options.block_frames)) if frames % number == 0 and number < frames]
    configs = [config.replaced(block_shape=(number, 0, 0)) for number in (*numbers, frames)]
    with device:
        models = [GPDiT(each) for each in configs]
    seconds = measured_seconds(models, frames, size, options.repeats)
    frame_tokens = models[0].layout(*size).frame_tokens
    return [
        Figure(
            frames=number,
            tokens=number * frame_tokens,
            equation=1 - saved_fraction(each, number * frame_tokens, frames * frame_tokens),
            flops=counted_flops(each, frames, size),
            seconds=of_model,
        )
        for number, each, of_model in zip((*numbers, frames), configs, seconds, strict=True)
    ]


def table(figures: Sequence[Figure], steps: int) -> str:
    """Return a Markdown table, relative to a single block, whose absolute costs are in its row."""
    whole = figures[-1]
    lines = [
        f"| frames per block (tokens) | a step, equation 6 | FLOPs | time | {steps} steps and cache, FLOPs | time "
        "| training, FLOPs | time |",
        "|---" * 8 + "|",
    ]
    for figure in figures[:-1]:
        cells = [f"{figure.equation:.3f}"]
        for costs in (lambda c: c.step, lambda c: c.generation(steps), lambda c: c.training):
            cells.append(f"{costs(figure.flops) / costs(whole.flops):.3f}")
            cells.append(f"{costs(figure.seconds) / costs(whole.seconds):.2f}")
        lines.append(f"| {figure.frames} ({figure.tokens}) | {' | '.join(cells)} |")
    cells = ["1"]
    for costs in (lambda c: c.step, lambda c: c.generation(steps), lambda c: c.training):
        cells += [f"1 ({costs(whole.flops) / 1e9:.1f} GFLOP)", f"1 ({costs(whole.seconds):.2f} s)"]
    lines.append(f"| {whole.frames} ({whole.tokens}), all | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(figures: Sequence[Figure], title: str, path: Path) -> None:
    """Draw the costs of a sampler step and of a training step as functions of the block size."""
    from matplotlib.figure import Figure as Drawing  # takes half a second to import

    drawing = Drawing(figsize=(9, 3.6), layout="constrained")
    whole, tokens = figures[-1], [figure.tokens for figure in figures]
    step, training = drawing.subplots(1, 2)
    step.plot(tokens, [f.equation for f in figures], "k--", zorder=3, label="equation 6 of ACDiT")
    step.plot(tokens, [f.flops.step / whole.flops.step for f in figures], "o-", label="FLOPs, counted")
    step.plot(tokens, [f.seconds.step / whole.seconds.step for f in figures], "s-", label="time, measured")
    step.set_title("one sampler step of every block")
    training.plot(tokens, [f.flops.training / whole.flops.training for f in figures], "o-", label="FLOPs, counted")
    training.plot(tokens, [f.seconds.training / whole.seconds.training for f in figures], "s-", label="time, measured")
    training.set_title("one training step")
    for axes in (step, training):
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, [str(number) for number in tokens])
        axes.set_xlabel("tokens per block")
        axes.set_ylabel("relative to a single block")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    drawing.suptitle(title, fontsize=9)
    with atomic_write(path) as temporary:
        drawing.savefig(temporary, format="png", dpi=120)


def option_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m benchmarks.block_size",
        description=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--size", default="tiny", help="size of the backbone: tiny, B, acdit-l, ..., H")
    add("--time_conditioning", default="adaln", help="adaln or rotation")
    add("--frames", type=int, default=16, help="latent frames of the clip")
    add("--latent_size", default="32x32", help="HEIGHTxWIDTH of a latent frame, in latent pixels")
    add("--block_frames", type=int, nargs="+", default=[1, 2, 4, 8], help="frames of a block, of divisors of --frames")
    add("--steps", type=int, default=25, help="sampler steps")
    add("--repeats", type=int, default=3, help="timed runs of each computation")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--out", type=Path, help="JSON file for the figures")
    add("--image", type=Path, help="PNG file for the curves")
    return parser


def machine_name(device: torch.device) -> str:
    """Return the name of the hardware for reports."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU time (threads: {torch.get_num_threads()})"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, draw the curves, and write the figures."""
    options = option_parser().parse_args(arguments)
    torch.manual_seed(0)
    config = GPDiTConfig(size=options.size, time_conditioning=options.time_conditioning)
    figures = measure(config, options)
    machine = machine_name(torch.device(options.device))
    title = (
        f"{options.size}, {options.time_conditioning}, {options.frames} latent frames of {options.latent_size}, "
        f"{machine}, torch {torch.__version__}, {datetime.now():%Y-%m-%d}"
    )
    print(f"{title}\n\n{table(figures, options.steps)}")
    if options.out:
        settings = {name: str(value) for name, value in vars(options).items()}
        report = {
            "device": machine,
            "torch": torch.__version__,
            "date": datetime.now().isoformat(),
            "options": settings,
        }
        with atomic_write(options.out) as path:
            path.write_text(json.dumps(report | {"figures": [asdict(figure) for figure in figures]}, indent=2))
    if options.image:
        draw(figures, title, options.image)


if __name__ == "__main__":
    main()
