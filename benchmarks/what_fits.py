"""`python -m benchmarks.what_fits`: table of the memory per GPU of the paper's recipes, for docs/scaling.md.

The figures are estimates for GPUs of 80 GiB, computed as by `python -m gpdit_lightning estimate`. A batch that does not
fit is divided into the smallest number of micro-batches that fit.
"""

from collections.abc import Sequence
from dataclasses import replace

from gpdit_lightning.cli.estimated_recipe import read_recipe
from gpdit_lightning.estimation.memory import STRATEGIES
from gpdit_lightning.estimation.requirements import RunSettings, memory, with_smaller_micro_batches
from gpdit_lightning.estimation.units import GIB

CAPACITY = 80 * GIB
GPUS = (1, 8, 32, 64)
OFFERED = [strategy for strategy in STRATEGIES if strategy.option]
STAGES = ("stage1_image_warmup", "stage2_mixed", "stage3_long_video", "stage4_few_shot")
B = ["--config=recipes/size/b.yaml"]  # for one GPU


def cell(run: RunSettings) -> str:
    """Return the GiB per GPU, and in parentheses the micro-batches per step if those of the recipe do not fit."""
    before = run.plan.micro_batches_per_step
    for candidate in with_smaller_micro_batches(run):
        needed = memory(candidate)["total"]
        if needed <= CAPACITY:
            micro_batches = candidate.plan.micro_batches_per_step
            return f"{needed / GIB:.0f}" + (f" ({micro_batches})" if micro_batches > before else "")
    return "no"


def rows(recipe: str, size: str, options: Sequence[str], sizes: dict[str, list[str] | None]) -> list[str]:
    """Return the rows of a recipe, one for each number of GPUs that divides its `max_ranks`."""
    run = read_recipe([f"--config=recipes/{recipe}.yaml", *options], sizes=sizes).run
    counts = [count for count in GPUS if run.max_ranks % count == 0]
    lines = []
    for count in counts:
        cells = [cell(replace(run, gpus=count, strategy=strategy)) for strategy in OFFERED]
        lines.append(f"| {recipe} | {size} | {count} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Print the table as Markdown."""
    print("| recipe | size | GPUs | " + " | ".join(strategy.name for strategy in OFFERED) + " |")
    print("|---" * (3 + len(OFFERED)) + "|")
    for size, options in (("H", []), ("B", B)):
        for recipe in STAGES:
            print("\n".join(rows(recipe, size, options, {})))
    print("\n".join(rows("ucf101_b", "B", [], {"videos": ["256x256"]})))


if __name__ == "__main__":
    main()
