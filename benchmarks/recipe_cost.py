"""`python -m benchmarks.recipe_cost --config RECIPE.yaml [--config OVERLAY.yaml] --gpus 64`: what a recipe costs.

An estimate without data or GPU: FLOPs of an optimizer step in closed form at the paper's geometry, days at an assumed
MFU, and the memory that does not depend on the batch. The heads of the recipes quote it.
"""

import argparse
from collections.abc import Sequence

import torch

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.cli.fit import parse
from gpdit_lightning.training.flops import training_flops

# Latent sizes: images in the three of the paper in equal parts, video at 192x320 (--video_size changes it).
IMAGE_SIZES = ((32, 32), (24, 40), (40, 24))
VIDEO_SIZE = (24, 40)
SEQUENCE_FRAMES, SEQUENCE_SIZE = 6, (32, 32)

BYTES_PER_PARAMETER = 4 + 4 + 8 + 4  # float32 weights, gradients, Adam's two moments, EMA, all on every GPU (DDP)
PEAK = 989e12  # dense bf16 FLOP/s of an H100 SXM or H200


def flops_of_step(arguments: Sequence[str], video_size: tuple[int, int] = VIDEO_SIZE) -> tuple[float, int, int]:
    """FLOPs of a recipe's optimizer step (the mean over lengths and sizes), its parameters, and its steps."""
    settings = parse("fit", arguments)
    config: GPDiTConfig = GPDiTConfig(**vars(settings.model.init_args.backbone))
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in GPDiT(config).parameters())
    data = settings.data
    kept = 1 - data.context_dropout

    def mean(source: str, lengths: Sequence[int], sizes: Sequence[tuple[int, int]]) -> float:
        clips = getattr(data, source).batch_size
        if not getattr(data, source).manifests:
            return 0.0
        costs = [
            sum(training_flops(config, clips, round(kept * clips), frames, *size).values())
            for frames in lengths
            for size in sizes
        ]
        return sum(costs) / len(costs)

    least = data.videos.least_frames or data.videos.frames
    total = mean("images", [1], IMAGE_SIZES)
    total += mean("videos", range(least, data.videos.frames + 1), [video_size])
    total += mean("sequences", [SEQUENCE_FRAMES], [SEQUENCE_SIZE])
    return total, parameters, settings.trainer.max_steps


def main() -> None:
    """Print the estimate."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--config", action="append", required=True, help="a recipe, then overlays")
    options.add_argument("--gpus", type=int, default=64, help="H100 or H200 that share the batch")
    options.add_argument("--mfu", type=float, default=0.4, help="assumed share of the peak FLOP/s")
    options.add_argument("--video_size", type=int, nargs=2, default=VIDEO_SIZE, help="latent height and width")
    chosen = options.parse_args()
    arguments = [f"--config={path}" for path in chosen.config]
    flops, parameters, steps = flops_of_step(arguments, tuple(chosen.video_size))
    seconds = flops / (chosen.gpus * chosen.mfu * PEAK)
    print(f"{chosen.config[0]}: {parameters / 1e6:,.0f}M parameters")
    print(f"  memory: {parameters * BYTES_PER_PARAMETER / 1e9:.1f} GB a GPU under DDP, before activations")
    print(f"  step:   {flops / 1e15:.3g} PFLOP, {seconds:.3g} s on {chosen.gpus} GPUs at {chosen.mfu:.0%} MFU")
    print(f"  run:    {steps:,} steps, {steps * seconds / 86400:.2g} days")


if __name__ == "__main__":
    main()
