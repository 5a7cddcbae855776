"""`python -m benchmarks.checkpoints`: how long checkpoints stall a training under FSDP2, on CPU ranks of one thread.

Each rank trains a backbone on random latents and saves checkpoints, in two ways: the first rank gathers, writes and
hashes all tensors, or each rank copies its part and writes it while the training continues. Seconds are those of the
first rank. "first" is the first checkpoint, for whose copy memory is allocated; "later" is the median of the following
ones, which reuse it. "background" is the time until a checkpoint is complete, while the training takes its next steps
on the same cores. "estimated" is what `estimate` computes from the speeds of copies, sha256 and disk that the ranks
measure after the training, all at the same time.
"""

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from benchmarks.ranks import on_ranks, random_latents, trainer_settings
from gpdit_lightning import GPDiTConfig
from gpdit_lightning.checkpoints.files import last_checkpoint
from gpdit_lightning.checkpoints.marks import files_of
from gpdit_lightning.estimation.memory import STRATEGIES, parameter_count
from gpdit_lightning.estimation.saving import SavingSpeeds, saving_costs
from gpdit_lightning.estimation.units import MIB
from gpdit_lightning.stages import GPDiTStage
from gpdit_lightning.training.callbacks.ema import EMA
from gpdit_lightning.training.callbacks.run_checkpoint import RunCheckpoint
from gpdit_lightning.training.strategies.fsdp import FSDP2

CHECKPOINTS = 4


class GatheringFSDP2(FSDP2):
    """FSDP2 whose first rank writes whole tensors while the others wait."""

    writes_parts = False


class Times(Callback):
    """Records the times of each checkpoint; training waits before the next one until it is complete."""

    def __init__(self, checkpoint: RunCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.stalled: list[float] = []
        self.background: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Wait for the checkpoint of the step before the previous one."""
        if batch_idx % 2 == 1:
            self.checkpoint.writing.join()
            if batch_idx > 1:
                self.background.append(self.checkpoint.writing.seconds)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Record the stall of the checkpoint of the previous step."""
        if trainer.global_step % 2 == 1 and trainer.global_step > 1:
            self.stalled.append(self.checkpoint.stalled_seconds)


def train(rank: int, ranks: int, folder: Path, in_parts: bool, config: GPDiTConfig) -> dict[str, list[float]]:
    """Train as one of several ranks; return the times of this rank, the speeds, and the bytes of a checkpoint."""
    checkpoint = RunCheckpoint(every_steps=2, keep_last=1)
    times = Times(checkpoint)
    trainer = Trainer(
        strategy=FSDP2() if in_parts else GatheringFSDP2(),
        max_steps=2 * CHECKPOINTS + 2,
        callbacks=[EMA(), times, checkpoint],
        **trainer_settings(ranks, folder),
    )
    trainer.fit(GPDiTStage(config), random_latents(ranks, folder))
    torch.distributed.barrier()
    speeds = measured_speeds(folder / f"probe-{rank}", 16 * parameter_count(config) // ranks, ranks)
    path = last_checkpoint(folder / "run")
    assert path is not None
    return {
        "stalled": times.stalled[:CHECKPOINTS],
        "background": times.background[:CHECKPOINTS],
        "speeds": list(astuple(speeds)),
        "bytes": [sum(file.stat().st_size for file in files_of(path).values())],
    }


def measured_speeds(file: Path, size: int, ranks: int) -> SavingSpeeds:
    """Return the speeds at which this rank copies, hashes and writes a number of bytes, as the other ranks do."""
    values, copy = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    content = values.numpy().data

    def write() -> None:
        with file.open("wb", buffering=0) as opened:
            opened.write(content)
            os.fsync(opened.fileno())

    speeds = []
    for work in (lambda: copy.copy_(values), lambda: hashlib.sha256(content), write):
        seconds = []
        for _ in range(3):
            torch.distributed.barrier()
            begun = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begun)
        speeds.append(size / statistics.median(seconds))
    return SavingSpeeds(speeds[0], speeds[1], speeds[2] * ranks)


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    config = GPDiTConfig(
        size="tiny", layers=options.layers, width=options.width, mlp_width=4 * options.width, heads=8, latent_channels=4
    )
    fsdp2 = next(strategy for strategy in STRATEGIES if strategy.option == "fsdp2")
    print("| ranks | who writes | MiB | estimated | stall, first | later | estimated | background, later | estimated |")
    print("|---" * 9 + "|")
    for ranks in options.ranks:
        for in_parts in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                times = on_ranks(Path(folder), ranks, train, in_parts, config)[0]
            costs = saving_costs(config, fsdp2, ranks, SavingSpeeds(*times["speeds"]))
            stalls = [f"{times['stalled'][0]:.2f} s", f"{statistics.median(times['stalled'][1:]):.2f} s"]
            estimated = [f"{costs.stall:.2f} s", f"{statistics.median(times['background'][1:]):.2f} s"]
            cells = [
                f"{ranks}",
                "each rank its part" if in_parts else "the first rank",
                f"{times['bytes'][0] / MIB:.1f}",
                f"{costs.bytes / MIB:.1f}",
                *stalls,
                *((*estimated, f"{costs.background:.2f} s") if in_parts else "---"),
            ]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
