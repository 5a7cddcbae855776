"""Runs for test_needs.py that count their bytes, several in one launch: python memory_runs.py FOLDER with runs.json."""

import gc
import json
import sys
import warnings
import weakref
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpdit_lightning import GPDiTConfig
from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.stages import GPDiTStage
from gpdit_lightning.training.callbacks.ema import EMA
from gpdit_lightning.training.callbacks.stopping import shut_down_process_group
from gpdit_lightning.training.strategies import register_strategies
from gpdit_lightning.training.strategies.sharding import sharded_strategy_of
from gpdit_lightning.training.strategies.zero import ZeRO

# Matrices of more than 1e5 elements, since ZeRO-3 leaves smaller ones whole, and a bucket that they fill several times;
# and no more gathered ahead than that, of which ZeRO-3 makes a copy on the way.
CONFIG = GPDiTConfig(size="tiny", layers=3, width=384, heads=6, mlp_width=1536, latent_channels=4)
BUCKET = 1_000_000
STEPS, MICRO_BATCHES, RANKS = 2, 2, 2

Storages = dict[int, torch.UntypedStorage]


def storages_of(tensors: Iterable[Any]) -> Storages:
    """The memory behind tensors, each piece once; of a distributed tensor this rank's."""
    found = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
            if storage.device.type != "meta":
                found[storage._cdata] = storage
    return found


def live() -> Storages:
    """The memory behind all tensors of this process that Python knows of."""
    gc.collect()
    return storages_of(thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))


def bytes_of(storages: Storages) -> int:
    return sum(storage.nbytes() for storage in storages.values())


def optimizer_of(trainer: Trainer, module: LightningModule) -> Optimizer:
    """torch's, also where DeepSpeed has its own around it."""
    sharding = sharded_strategy_of(module)
    return trainer.optimizers[0] if sharding is None else sharding.inner_optimizer


class LiveBytes(TorchDispatchMode):
    """The most bytes that some tensors and those that come into being inside took at one time.

    Attributes:
        before: bytes of the given ones.
        peak: the most there ever were.
    """

    def __init__(self, storages: Storages) -> None:
        super().__init__()
        self.storages = {key: weakref.ref(storage) for key, storage in storages.items()}
        self.before = self.peak = bytes_of(storages)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = storages_of(tree_leaves((args, kwargs)))
        for key, storage in storages_of(tree_leaves(result)).items():
            if key not in given:  # neither a view nor written in place
                self.storages[key] = weakref.ref(storage)
        alive = {key: storage for key, kept in self.storages.items() if (storage := kept()) is not None}
        self.peak = max(self.peak, bytes_of(alive))
        self.storages = {key: self.storages[key] for key in alive}
        return result


class Count(Callback):
    """Bytes of each part after the last optimizer step, of gradients before it, and the most of backward and step."""

    def __init__(self, ema: EMA) -> None:
        self.ema = ema
        self.others_before = live()  # what is left of another run
        self.found: dict[str, int] = {}
        self.watching: LiveBytes | None = None

    def parts(self, trainer: Trainer, module: LightningModule) -> dict[str, Storages]:
        """What each part lies in; nothing is counted twice."""
        sharding, parameters = sharded_strategy_of(module), list(module.parameters())
        gradients: Iterable[Any] = [parameter.grad for parameter in parameters]
        if isinstance(sharding, ZeRO) and sharding.zero_stage_3:
            gradients = [sharding.zero_optimizer.grad_partitions_flat_buffer]
        elif isinstance(sharding, ZeRO):
            gradients = chain(*(group or () for group in sharding.zero_optimizer.averaged_gradients.values()))
        found = {
            "weights": storages_of([*parameters, *(getattr(parameter, "ds_tensor", None) for parameter in parameters)]),
            "gradients": storages_of(gradients),
            "optimizer": storages_of(
                [
                    *(shard.storage for shard in (sharding.shards if sharding else {}).values()),
                    *chain(*(state.values() for state in optimizer_of(trainer, module).state.values())),
                ]
            ),
            "average": storages_of(self.ema.average.values()),
            "others": live(),
        }
        known = set(self.others_before)
        for name, storages in found.items():
            found[name] = {key: storage for key, storage in storages.items() if key not in known}
            known |= set(storages)
        return found

    def watch(self, module: LightningModule) -> None:
        now = live() | storages_of(parameter.grad for parameter in module.parameters())  # which Python may not know yet
        self.watching = LiveBytes({key: now[key] for key in now.keys() - self.others_before.keys()})
        self.watching.__enter__()

    def most(self) -> int:
        assert self.watching is not None
        self.watching.__exit__(None, None, None)
        peak, self.watching = self.watching.peak, None
        return peak

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have Adam take all parameters at once, as it does on CUDA."""
        for group in optimizer_of(trainer, pl_module).param_groups:
            group["foreach"] = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == STEPS * MICRO_BATCHES - 1:
            self.watch(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == STEPS - 1:
            self.found["backward"] = self.most()
            parts = self.parts(trainer, pl_module)
            self.found |= {"gradients": bytes_of(parts["gradients"]), "others": bytes_of(parts["others"])}
            self.watch(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == STEPS and self.watching is not None:
            self.found["step"] = self.most()
            parts = self.parts(trainer, pl_module)
            self.found |= {name: bytes_of(parts[name]) for name in ("weights", "optimizer", "average")}


def train(run: dict[str, Any], strategy: str | Strategy, devices: int) -> tuple[dict[str, int], int]:
    """Train as `run` says; returns this rank's bytes, and its number."""
    torch.manual_seed(0)
    images = SourceConfig([run["shards"]], batch_size=MICRO_BATCHES * RANKS, micro_batches=MICRO_BATCHES)
    data = LatentDataModule(images=images, max_ranks=RANKS)
    ema = EMA()
    count = Count(ema)
    register_strategies()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        precision=run["precision"],
        max_steps=STEPS,
        accumulate_grad_batches=data.micro_batches_per_step,
        callbacks=[ema, count],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.fit(GPDiTStage(CONFIG), data)
    return count.found, trainer.global_rank


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    gc.freeze()  # hundreds of thousands of things from imports, none of them a run's tensor: `live` need not see them
    place = Path(sys.argv[1])
    for described in json.loads((place / "runs.json").read_text()):
        spread = described["strategy"]
        if spread.startswith("zero"):
            spread = ZeRO(stage=int(spread[-1]), reduce_bucket_size=BUCKET)
            spread.config["zero_optimization"]["stage3_prefetch_bucket_size"] = BUCKET
        found, rank = train(described, spread, RANKS)
        (place / f"{described['name']}-{rank}.json").write_text(json.dumps(found))
    shut_down_process_group()
