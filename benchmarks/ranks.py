"""Training on several CPU ranks of one thread, as forks of a process that has imported all packages."""

import json
import logging
import multiprocessing
import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.shard_writer import ShardSetWriter
from gpdit_lightning.specs import CodecSpec
from gpdit_lightning.training.callbacks.stopping import shut_down_process_group

CODEC = CodecSpec("pca", None, 4, 8, 4, mean=(0.0,) * 4, std=(1.0,) * 4, fingerprint="0" * 16)

Work = Callable[..., dict[str, list[float]]]
"""Function of a rank, the number of ranks, a folder that they share, and further arguments; returns measurements."""


def on_ranks(folder: Path, ranks: int, work: Work, *arguments: Any) -> list[dict[str, list[float]]]:
    """Run a function on each rank of a group; return the results by rank."""
    if not (folder / "latents").exists():
        write_latents(folder / "latents")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=run_rank, args=(rank, ranks, port, folder, work, arguments)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def run_rank(rank: int, ranks: int, port: int, folder: Path, work: Work, arguments: tuple[Any, ...]) -> None:
    """Run a function as one of several ranks, and write its result to a file."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "benchmark"}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    (folder / f"{rank}.json").write_text(json.dumps(work(rank, ranks, folder, *arguments)))
    shut_down_process_group()


def write_latents(folder: Path) -> None:
    """Write clips of random latents: 3 frames of 8x8."""
    numbers = np.random.default_rng(0)
    with ShardSetWriter(folder, 8) as writer:
        for number in range(8):
            writer.write("train", "video", numbers.normal(size=(3, 4, 8, 8)), {"source": f"{number}"})
        shards = writer.close()
    Manifest(folder, CODEC, shards, preparation={"stride": 3}, validation={"held_out_by": "source"}).save()


def random_latents(ranks: int, folder: Path) -> LatentDataModule:
    """Return the data of a training, one clip for each rank in a step."""
    source = SourceConfig([str(folder / "latents")], batch_size=ranks)
    return LatentDataModule(videos=source, max_ranks=ranks, validation_batches=0)


def trainer_settings(ranks: int, folder: Path) -> dict[str, Any]:
    """Return arguments of a trainer that runs in `folder/run` on CPU ranks."""
    return {
        "accelerator": "cpu",
        "devices": ranks,
        "default_root_dir": str(folder / "run"),
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
