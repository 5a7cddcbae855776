"""`python -m benchmarks.scaling`: simulated training of GPDiT-H on 8 to 1,024 GPUs, for docs/scaling.md.

The table is computed as by `python -m gpdit_lightning estimate --config gpdit:stage2_mixed --gpus 8 --scaling 8 64 256
512 1024`: nodes of eight H100 with a network port of 400 Gbit/s each, every GPU with the batch that it has on 8 GPUs,
32 images or 8 videos of 17 frames, and 40 % of the peak in the forward and backward passes. `--image FILE` draws the
curves.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gpdit_lightning.cli.estimate import described_cluster, known_gpu
from gpdit_lightning.cli.estimated_recipe import read_recipe
from gpdit_lightning.estimation.memory import STRATEGIES
from gpdit_lightning.estimation.requirements import RunSettings, step_flops
from gpdit_lightning.estimation.time import scaled, step_time
from gpdit_lightning.options.estimate import HardwareOptions

NUMBERS = (8, 64, 256, 512, 1024)
HARDWARE = HardwareOptions(gpus=8)
ON_GPUS = [strategy for strategy in STRATEGIES if not strategy.offload]


def speed(run: RunSettings, devices: int) -> tuple[float, float]:
    """Return the seconds of a step, and the share of the peak FLOP/s over the whole step."""
    of_run = scaled(run, devices)
    seconds = step_time(of_run, described_cluster(HARDWARE)).total
    peak = devices * known_gpu(HARDWARE.gpu).flops
    return seconds, sum(step_flops(of_run).values()) / (seconds * peak)


def draw(run: RunSettings, path: Path) -> None:
    """Draw the share of the peak against the number of GPUs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    numbers = [2**power for power in range(11)]
    for strategy in ON_GPUS:
        of_strategy = replace(run, strategy=strategy)
        shares = [100 * speed(of_strategy, devices)[1] for devices in numbers]
        axes.plot(numbers, shares, marker="o", markersize=3, label=strategy.name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
    axes.set(xlabel="GPUs (H100), 8 per node", ylabel="% of the peak FLOP/s", ylim=(0, 45))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", type=Path, help="file for a figure")
    given = parser.parse_args(arguments)
    run = read_recipe(["--config=recipes/stage2_mixed.yaml"], HARDWARE.gpus).run
    print("| strategy | " + " | ".join(f"{number:,} GPUs" for number in NUMBERS) + " |")
    print("|---" * (1 + len(NUMBERS)) + "|")
    for strategy in ON_GPUS:
        speeds = [speed(replace(run, strategy=strategy), devices) for devices in NUMBERS]
        cells = [f"{1000 * seconds:.0f} ms, {share:.0%}" for seconds, share in speeds]
        print(f"| {strategy.name} | {' | '.join(cells)} |")
    if given.image:
        draw(run, given.image)


if __name__ == "__main__":
    main()
