"""Fixtures of all tests."""

import fcntl
import functools
import gc
import logging
import math
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import docstring_parser
import numpy as np
import pytest
import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.shard_entry import Kind, Split
from gpdit_lightning.data.shard_writer import ShardSetWriter
from gpdit_lightning.specs import CodecSpec

# On a busy machine, synchronization of OpenMP threads makes small tests slower by an order of magnitude.
torch.set_num_threads(1)

ASSETS = Path(__file__).parents[2] / "shared" / "assets"

# Exact in binary, and far from 0 and 1, so that missing whitening is detected.
TINY_CODEC = CodecSpec(
    "pca", None, 4, 8, 4, mean=(0.5, -0.25, 2.0, 0.0), std=(2.0, 0.5, 4.0, 1.0), fingerprint="0123456789abcdef"
)

MadeOnce = Callable[[str, Callable[[Path], object]], Path]
Counts = Mapping[tuple[Split, Kind, tuple[int, int, int]], int]


# A background job ignores SIGINT, and processes that tests start and interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Containers often set it; without it, Python collects what it prints to a file, as for most users.
os.environ.pop("PYTHONUNBUFFERED", None)

# jsonargparse reads the docstrings of all classes for every parser, which takes half of the time of parsing a recipe.
docstring_parser.parse_from_object = functools.cache(docstring_parser.parse_from_object)


def pytest_collection_finish() -> None:
    """Exclude the imported modules and the tests, which remain until the end, from garbage collections."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _log_as_imported() -> None:
    """Reset the package's logger, which an earlier test of the command line has configured; `caplog` needs it."""
    log = logging.getLogger("gpdit_lightning")
    log.handlers, log.propagate = [], True
    log.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """`made_once(name, make)` returns a folder that `make(folder)` has filled, for all processes of pytest-xdist.

    For what takes seconds to make. The first process makes it, and the others wait. Tests must not change it.
    """
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def run(name: str, make: Callable[[Path], object]) -> Path:
        folder, complete = root / name, root / f"{name}.complete"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not complete.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                complete.touch()
        return folder

    return run


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real videos and images; tests that use it are skipped if it does not exist."""
    if not ASSETS.is_dir():
        pytest.skip("the shared test assets are not on this machine")
    return ASSETS


def _write_shards(directory: Path, counts: Counts, shard_size: int = 5, codec: CodecSpec = TINY_CODEC) -> Manifest:
    numbers = np.random.default_rng(0)
    with ShardSetWriter(directory, shard_size) as writer:
        for (split, kind, (frames, height, width)), count in counts.items():
            for place in range(count):
                latent = numbers.normal(size=(frames, codec.latent_channels, height, width))
                writer.write(split, kind, latent, {"source": f"{split}-{kind}-{place}"})
        shards = writer.close()
    manifest = Manifest(directory, codec, shards, preparation={"stride": 3}, validation={"held_out_by": "source"})
    manifest.save()
    return manifest


@pytest.fixture(scope="session")
def write_shards() -> Callable[..., Manifest]:
    """`write_shards(directory, {(split, kind, (F, h, w)): count}, shard_size, codec)` writes random latents."""
    return _write_shards


@pytest.fixture(scope="session")
def tiny_shards(made_once: MadeOnce) -> Path:
    """Images and clips of 3 latent frames, 4 channels of 8x8, some held out, in shards of 5. Do not change them."""
    counts: Counts = {
        ("train", "image", (1, 8, 8)): 12,
        ("train", "video", (3, 8, 8)): 11,
        ("validation", "image", (1, 8, 8)): 4,
        ("validation", "video", (3, 8, 8)): 4,
    }
    return made_once("tiny_shards", lambda folder: _write_shards(folder, counts))


@pytest.fixture(scope="session")
def tiny_config() -> GPDiTConfig:
    """An architecture that fits `tiny_shards` and trains in milliseconds."""
    return GPDiTConfig(size="tiny", layers=2, width=16, mlp_width=24, heads=2, latent_channels=4)


@pytest.fixture(scope="session")
def randomise() -> Callable[[GPDiT], GPDiT]:
    """`randomise(model)` sets all parameters randomly, since the zero output layer of a new model hides errors."""

    def run(model: GPDiT) -> GPDiT:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else noise / math.sqrt(parameter.shape[1]))
        return model

    return run


def _fit(
    stage: LightningModule,
    data: LightningDataModule,
    folder: Path,
    max_steps: int,
    callbacks: Sequence[Callback] = (),
    resume_from: Path | None = None,
    **settings: Any,
) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": max_steps,
        "accumulate_grad_batches": data.micro_batches_per_step,
        "default_root_dir": str(folder),
        "logger": False,
        "callbacks": list(callbacks),
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": None,
        "use_distributed_sampler": False,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
    }
    trainer = Trainer(**defaults | settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*resuming from a checkpoint that ended before the epoch ended.*")
        trainer.fit(stage, data, ckpt_path=resume_from, weights_only=True)
    return trainer


@pytest.fixture(scope="session")
def fit() -> Callable[..., Trainer]:
    """`fit(stage, data, folder, max_steps, callbacks, resume_from, **settings)` trains as the command line does."""
    return _fit
