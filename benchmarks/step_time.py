"""`python -m benchmarks.step_time`: predicted durations of optimizer steps beside those of training on CPU ranks.

For each number of ranks and each strategy, `estimate --measure` measures this machine with the recipe, predicts the
duration of a step, and the recipe is then trained. Every rank has one thread. The recipe is a backbone of the given
size on random latents, with one batch for all numbers of ranks, so that the share of a rank differs.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from benchmarks.fitting import video_arguments
from benchmarks.reading import write_shards
from gpdit_lightning.cli.estimated_recipe import read_recipe
from gpdit_lightning.cli.measured_cluster import measured_cluster
from gpdit_lightning.estimation.time import step_time

WARM_UP = 3  # steps that are left out
FITS = "Training:"  # begins the line with the median seconds of a step


class StepSeconds(Callback):
    """Prints the median duration of an optimizer step, from the end of the one before, at the end of training."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Record the end of a step; the recipe has one micro-batch per step."""
        self.ends.append(time.perf_counter())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the median."""
        if trainer.is_global_zero:
            seconds = [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]
            print(f"\n{FITS} {statistics.median(seconds[WARM_UP:])}", flush=True)


def recipe_arguments(folder: Path, given: argparse.Namespace, strategy: str) -> list[str]:
    """Return the arguments of `fit`."""
    return video_arguments(
        folder / "latents",
        "stage2_mixed",
        data__videos__batch_size=given.batch_size,
        data__max_ranks=given.batch_size,
        data__workers=0,
        trainer__precision="32-true",
        trainer__strategy=strategy,
        model__init_args__backbone__size=given.size,
        model__init_args__backbone__activation_checkpointing="false",
    )


def trained_seconds(arguments: Sequence[str], folder: Path, ranks: int, steps: int) -> float:
    """Train, and return the median duration of an optimizer step."""
    words = [
        *(sys.executable, "-m", "gpdit_lightning", "fit", *arguments, f"--trainer.devices={ranks}"),
        *("--trainer.accelerator=cpu", f"--trainer.max_steps={steps}"),
        *(
            f"--run_dir={folder / f'run-{time.monotonic_ns()}'}",
            "--trainer.callbacks+=benchmarks.step_time.StepSeconds",
        ),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    completed = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in completed.stdout.splitlines() if line.startswith(FITS)]
    if completed.returncode or not lines:
        sys.exit(f"{' '.join(words)} failed:\n{completed.stderr}")
    return float(lines[0].removeprefix(FITS))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks")
    parser.add_argument(
        "--strategies", nargs="+", default=["ddp", "zero2", "fsdp2"], help="strategies of several ranks"
    )
    parser.add_argument("--size", default="tiny", help="size of the trained backbone")
    parser.add_argument("--batch_size", type=int, default=4, help="clips per step")
    parser.add_argument("--steps", type=int, default=20, help="trained optimizer steps")
    given = parser.parse_args(arguments)
    print("| strategy | ranks | predicted s | computation | communication | update | trained s | difference |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder / "latents", 200).save()
        for ranks in given.ranks:
            for strategy in given.strategies if ranks > 1 else ["auto"]:
                words = recipe_arguments(folder, given, strategy)
                run = read_recipe(words, ranks).run
                step = step_time(run, measured_cluster(words, run, ranks, 1e9))
                trained = trained_seconds(words, folder, ranks, given.steps)
                parts = " | ".join(f"{part:.3g}" for part in (step.total, step.computation, step.waiting, step.update))
                print(
                    f"| {strategy} | {ranks} | {parts} | {trained:.3g} | {step.total / trained - 1:+.0%} |", flush=True
                )


if __name__ == "__main__":
    main()
