"""`python -m benchmarks.attention_variants`: what `of` saves in training compared with `of2`, by number of frames.

For each number of latent frames, one forward and backward pass of both variants with random weights: its time, the
memory that is kept for the backward pass (the bytes of all tensors that autograd saves, without weights), and on a GPU
the peak memory. The passes of both variants alternate, so that other load on the machine affects both alike, and the
ratios `of` / `of2` are of medians. FLOPs follow from the closed form that `estimate` uses. The costs of generation,
with a cache and without, are those of `python -m benchmarks.generation`.

On a GPU at size B: `--size B --frame 256x256 --device cuda`.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.devices import device_name
from gpdit_lightning.estimation.flops import PassShape, training_flops
from gpdit_lightning.estimation.units import MIB, duration
from gpdit_lightning.media.images import parse_size
from gpdit_lightning.model.attention.trial import saved_bytes
from gpdit_lightning.model.config import AttentionVariant

SPATIAL_FACTOR = 8  # pixels of a latent pixel, of the codecs wan and pca


@dataclass(frozen=True)
class PassCost:
    """The cost of one forward and backward pass.

    Attributes:
        seconds: median.
        kept: bytes that are kept for the backward pass.
        peak: peak bytes of memory on a GPU; 0 on a CPU.
        flops: floating-point operations.
        attention_flops: those of the attention products.
    """

    seconds: float
    kept: int
    peak: int
    flops: int
    attention_flops: int


class TrainingPass:
    """A forward and backward pass of one variant on clips of one length.

    Args:
        variant: of the attention.
        frames: latent frames of a clip.
        options: of the command.
    """

    def __init__(self, variant: AttentionVariant, frames: int, options: argparse.Namespace) -> None:
        height, width = (side // SPATIAL_FACTOR for side in parse_size(options.frame))
        config = GPDiTConfig.preset(options.size, attention=variant)
        torch.manual_seed(0)
        with torch.device(options.device):
            self.model = GPDiT(config)
            self.clean = torch.randn(options.clips, frames, config.latent_channels, height, width)
            self.theta = torch.rand(options.clips, frames)
        self.flops = training_flops(config, PassShape(options.clips, options.clips, frames, height, width))

    def loss(self) -> Tensor:
        """Return the mean square of the prediction."""
        device = self.clean.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return self.model(self.clean, self.theta, self.clean).square().mean()

    def run(self) -> float:
        """Run the pass, and return its seconds."""
        self.model.zero_grad()
        self.wait()
        start = time.perf_counter()
        self.loss().backward()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Wait until the GPU has finished."""
        if self.clean.is_cuda:
            torch.cuda.synchronize(self.clean.device)

    def kept_bytes(self) -> int:
        """Return the bytes of all tensors that are kept for the backward pass, without weights and inputs."""
        return saved_bytes(self.loss, (*self.model.parameters(), self.clean, self.theta))

    def peak_bytes(self) -> int:
        """Return the peak memory of the pass on a GPU, with weights; 0 on a CPU."""
        if not self.clean.is_cuda:
            return 0
        torch.cuda.reset_peak_memory_stats(self.clean.device)
        self.run()
        return torch.cuda.max_memory_allocated(self.clean.device)


def measure(frames: int, options: argparse.Namespace) -> dict[str, PassCost]:
    """Return the costs of both variants, whose passes alternate."""
    passes = {variant: TrainingPass(variant, frames, options) for variant in get_args(AttentionVariant)}
    seconds: dict[str, list[float]] = {variant: [] for variant in passes}
    for _ in range(options.repeats + 1):
        for variant, training in passes.items():
            seconds[variant].append(training.run())
    return {
        variant: PassCost(
            statistics.median(seconds[variant][1:]),  # the first run is a warm-up
            training.kept_bytes(),
            training.peak_bytes(),
            sum(training.flops.values()),
            training.flops["attention_products"],
        )
        for variant, training in passes.items()
    }


def row(frames: int, costs: dict[str, PassCost]) -> str:
    """Return a row of the table."""
    of2, of = costs["of2"], costs["of"]
    cells = [
        str(frames),
        f"{of.flops / of2.flops:.3f}",
        f"{of.attention_flops / of2.attention_flops:.3f}",
        f"{of.seconds / of2.seconds:.3f}",
        duration(of2.seconds),
        f"{of.kept / of2.kept:.3f}",
        f"{of2.kept / MIB:.0f} MiB",
        f"{of.peak / of2.peak:.3f}" if of2.peak else "-",
    ]
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m benchmarks.attention_variants",
        description=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--size", default="tiny", help="size of the backbone: tiny, B or H")
    add("--frame", default="64x64", help="HEIGHTxWIDTH in pixels")
    add("--clips", type=int, default=1, help="clips of a pass")
    add("--frames", type=int, nargs="+", default=[5, 12, 24, 48], help="numbers of latent frames of a clip")
    add("--repeats", type=int, default=7, help="timed passes of each variant")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    options = parser.parse_args(arguments)
    print(
        f"{options.size} at {options.frame}, {options.clips} clips, {device_name(torch.device(options.device))}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; ratios are of / of2\n"
    )
    head = [
        "frames",
        "FLOPs",
        "products of attention",
        "time",
        "time of of2",
        "kept for backward",
        "of of2",
        "peak memory",
    ]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for frames in options.frames:
        print(row(frames, measure(frames, options)), flush=True)


if __name__ == "__main__":
    main()
