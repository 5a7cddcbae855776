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
import json
import logging
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
import warnings
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

from gpdit_lightning import GPDiTConfig
from gpdit_lightning.checkpoints.files import last_checkpoint
from gpdit_lightning.checkpoints.marks import files_of
from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.shard_writer import ShardSetWriter
from gpdit_lightning.estimation.memory import STRATEGIES, parameter_count
from gpdit_lightning.estimation.saving import SavingSpeeds, saving_costs
from gpdit_lightning.estimation.units import MIB
from gpdit_lightning.specs import CodecSpec
from gpdit_lightning.stages import GPDiTStage
from gpdit_lightning.training.callbacks.ema import EMA
from gpdit_lightning.training.callbacks.run_checkpoint import RunCheckpoint
from gpdit_lightning.training.callbacks.stopping import shut_down_process_group
from gpdit_lightning.training.strategies.fsdp import FSDP2

CODEC = CodecSpec("pca", None, 4, 8, 4, mean=(0.0,) * 4, std=(1.0,) * 4, fingerprint="0" * 16)
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


def write_latents(folder: Path) -> None:
    """Write clips of random latents: 3 frames of 8x8."""
    numbers = np.random.default_rng(0)
    with ShardSetWriter(folder, 8) as writer:
        for number in range(8):
            writer.write("train", "video", numbers.normal(size=(3, 4, 8, 8)), {"source": f"{number}"})
        shards = writer.close()
    Manifest(folder, CODEC, shards, preparation={"stride": 3}, validation={"held_out_by": "source"}).save()


def train(rank: int, ranks: int, port: int, in_parts: bool, config: GPDiTConfig, folder: Path) -> None:
    """Train as one of several ranks; the first one writes its times to `times.json`."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "benchmark"}
    os.environ.update({name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"})
    os.environ["MASTER_PORT"] = str(port)
    data = LatentDataModule(
        videos=SourceConfig([str(folder / "latents")], batch_size=ranks), max_ranks=ranks, validation_batches=0
    )
    checkpoint = RunCheckpoint(every_steps=2, keep_last=1)
    times = Times(checkpoint)
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=FSDP2() if in_parts else GatheringFSDP2(),
        max_steps=2 * CHECKPOINTS + 2,
        default_root_dir=str(folder / "run"),
        callbacks=[EMA(), times, checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(GPDiTStage(config), data)
    torch.distributed.barrier()
    speeds = measured_speeds(folder / f"probe-{rank}", 16 * parameter_count(config) // ranks, ranks)
    if rank == 0:
        found = {"stalled": times.stalled[:CHECKPOINTS], "background": times.background[:CHECKPOINTS]}
        path = last_checkpoint(folder / "run")
        assert path is not None
        found["speeds"] = list(astuple(speeds))
        found["bytes"] = [sum(file.stat().st_size for file in files_of(path).values())]
        (folder / "times.json").write_text(json.dumps(found))
    shut_down_process_group()


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


def measure(ranks: int, in_parts: bool, config: GPDiTConfig) -> dict[str, list[float]]:
    """Return the times of the first rank, and the bytes of a checkpoint."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_latents(folder / "latents")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("fork")  # the ranks need not import all packages again
        processes = [
            context.Process(target=train, args=(rank, ranks, port, in_parts, config, folder)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        times: dict[str, list[float]] = json.loads((folder / "times.json").read_text())
        return times


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    config = GPDiTConfig(
        size="tiny", layers=options.layers, width=options.width, mlp_width=4 * options.width, heads=8, latent_channels=4
    )
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    fsdp2 = next(strategy for strategy in STRATEGIES if strategy.option == "fsdp2")
    print("| ranks | who writes | MiB | estimated | stall, first | later | estimated | background, later | estimated |")
    print("|---" * 9 + "|")
    for ranks in options.ranks:
        for in_parts in (False, True):
            times = measure(ranks, in_parts, config)
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
