"""`python -m benchmarks.long_clips`: when several GPUs per clip would pay, by estimates, for docs/scaling.md.

GPDiT-H recomputes its activations and trains with FSDP2 on 64 H100 of 80 GiB, one clip on each. For each size and
length of a clip the table has

- the memory of a GPU, and the time of a step, with one GPU per clip;
- the same with the tokens of a clip divided among the 8 GPUs of a node, and its heads in attention (Ulysses,
  arXiv:2309.14509). Queries, keys, values and outputs are exchanged in each layer, in the forward pass, its
  recomputation and the backward pass. The exchanges are not hidden, and nothing is saved of the weights.

A run with fewer clips per step than GPUs has no other way to use all GPUs; a run with as many has the same throughput
with one GPU per clip, up to the exchanges.
"""

from dataclasses import replace

from gpdit_lightning.cli.estimate import described_cluster
from gpdit_lightning.data.plan import PlannedBucket, PlannedSource
from gpdit_lightning.data.source import SourceConfig
from gpdit_lightning.estimation.flops import PassShape
from gpdit_lightning.estimation.memory import STRATEGIES, activation_bytes
from gpdit_lightning.estimation.requirements import RunSettings, memory, step_flops
from gpdit_lightning.estimation.units import GIB, duration
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.options.estimate import HardwareOptions

GPUS, PER_CLIP, CAPACITY = 64, 8, 80
PATCH_PIXELS = 16  # of the WanVAE with patches of 2x2
SIZES = {"192x320": (24, 40), "480x832": (60, 104), "720x1280": (90, 160)}
LENGTHS = (5, 12, 24, 48, 96)
EXCHANGES = 3 * 4  # of queries, keys, values and outputs, in the three passes of a layer
CONFIG = GPDiTConfig.preset("H", activation_checkpointing=True)


def run_of(height: int, width: int, frames: int) -> RunSettings:
    """Return a run with one clip on each GPU."""
    bucket = PlannedBucket((GPUS,), (frames,), height, width)
    return RunSettings(
        backbone=CONFIG,
        precision="bf16-mixed",
        strategy=next(strategy for strategy in STRATEGIES if strategy.option == "fsdp2"),
        gpus=GPUS,
        max_ranks=GPUS,
        context_dropout=0.0,
        noise_draws=1,
        max_steps=1,
        sources=(PlannedSource("videos", (bucket,), SourceConfig(batch_size=GPUS)),),
    )


def exchange_seconds(shape: PassShape) -> float:
    """Return the seconds in which a clip's GPUs exchange its tokens, in a training step."""
    cluster = described_cluster(HardwareOptions())
    tokens = shape.noisy_tokens(CONFIG) + shape.clean_tokens(CONFIG)
    sent = 2 * CONFIG.width * tokens / PER_CLIP * (PER_CLIP - 1) / PER_CLIP  # bytes of each GPU in one exchange
    of_one = (PER_CLIP - 1) * cluster.node.latency + sent / cluster.node.bytes_per_s
    return CONFIG.layers * EXCHANGES * of_one


def row(size: str, frames: int) -> str:
    """Return the row of a size and a length as Markdown."""
    height, width = SIZES[size]
    run, shape = run_of(height, width, frames), PassShape(1, 1, frames, height, width)
    needed = memory(run)
    activations = activation_bytes(CONFIG, shape, run.bytes_per_value)
    alone = needed["total"]
    # The weights that are gathered, and those of the optimizer, are the same; tokens are divided.
    shared = alone - max(needed["step"], activations) + max(needed["step"], activations / PER_CLIP)
    speed = described_cluster(HardwareOptions()).flops_per_s
    seconds = sum(step_flops(replace(run, gpus=1)).values()) / GPUS / speed
    exchanges = exchange_seconds(shape)
    together = seconds / PER_CLIP + exchanges
    fits = f"{alone / GIB:.0f}" + ("" if alone <= CAPACITY * GIB else " (does not fit)")
    lost = exchanges / together
    tokens = shape.noisy_tokens(CONFIG) + shape.clean_tokens(CONFIG)
    of_clip, divided = f"{fits} | {duration(seconds)}", f"{shared / GIB:.0f} | {duration(together)}"
    return f"| {size} | {frames} | {tokens:,} | {of_clip} | {divided} | {lost:.0%} |"


def main() -> None:
    """Print the table as Markdown."""
    print(
        "| pixels | latent frames | tokens of a clip | GiB, one GPU per clip | step | GiB, 8 GPUs per clip | step | "
        "of it exchanges |"
    )
    print("|---" * 8 + "|")
    for size in SIZES:
        for frames in LENGTHS:
            print(row(size, frames))


if __name__ == "__main__":
    main()
