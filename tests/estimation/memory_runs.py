"""Training runs that measure their memory, for test_requirements.py: python memory_runs.py FOLDER, with runs.json."""

import gc
import json
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
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

# Matrices of more than 1e5 elements, since ZeRO-3 does not shard smaller ones. They fill a bucket several times. The
# prefetch bucket, which ZeRO-3 copies, has the same size.
CONFIG = GPDiTConfig(size="tiny", layers=3, width=384, heads=6, mlp_width=1536, latent_channels=4)
BUCKET = 1_000_000
STEPS, MICRO_BATCHES, RANKS = 2, 2, 2

Storages = dict[int, torch.UntypedStorage]


def storages_of(tensors: Iterable[Any]) -> Storages:
    """Return the distinct storages of tensors; of a distributed tensor, the storage of this rank."""
    storages = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
            if storage.device.type != "meta":
                storages[storage._cdata] = storage
    return storages


def live_storages() -> Storages:
    """Return the storages of all tensors that Python's garbage collector lists."""
    gc.collect()
    return storages_of(instance for instance in gc.get_objects() if issubclass(type(instance), Tensor))


def bytes_of(storages: Storages) -> int:
    return sum(storage.nbytes() for storage in storages.values())


def optimizer_of(trainer: Trainer, module: LightningModule) -> Optimizer:
    """Return the torch optimizer, also if DeepSpeed wraps it."""
    sharding = sharded_strategy_of(module)
    return trainer.optimizers[0] if sharding is None else sharding.inner_optimizer


def whole_bytes(args: Sequence[Any]) -> int:
    """Return the bytes of the whole tensors of a collective: those of the larger one of its arguments."""
    arguments = [[t for t in tree_leaves(argument) if isinstance(t, Tensor)] for argument in args]
    return max(sum(tensor.nbytes for tensor in tensors) for tensors in arguments)


class LiveBytes(TorchDispatchMode):
    """Measures the peak memory of given tensors and of those that are allocated inside the context.

    Attributes:
        before: bytes of the given tensors.
        peak: most bytes at one time.
        sent: bytes of the whole tensors of collectives, by operator.
    """

    def __init__(self, storages: Storages) -> None:
        super().__init__()
        self.storages = {key: weakref.ref(storage) for key, storage in storages.items()}
        self.before = self.peak = bytes_of(storages)
        self.sent = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace == "c10d":
            self.sent[function.overloadpacket.__name__] += whole_bytes(args)
        given = storages_of(tree_leaves((args, kwargs)))
        for key, storage in storages_of(tree_leaves(result)).items():
            if key not in given:  # neither a view nor an in-place result
                self.storages[key] = weakref.ref(storage)
        alive = {key: storage for key, reference in self.storages.items() if (storage := reference()) is not None}
        self.peak = max(self.peak, bytes_of(alive))
        self.storages = {key: self.storages[key] for key in alive}
        return result


class MemoryMeter(Callback):
    """Measures the bytes of each part, and the peaks of the last backward pass and optimizer step.

    Attributes:
        measured: bytes of each part after the last optimizer step, of `gradients` and `others` before it, and the peaks
            `backward` and `step`; also the bytes of collectives in both, as `backward OPERATOR`.
    """

    def __init__(self, ema: EMA) -> None:
        self.ema = ema
        self.initial_storages = live_storages()  # of an earlier run in this process
        self.measured: dict[str, int] = {}
        self.recorder: LiveBytes | None = None

    def parts(self, trainer: Trainer, module: LightningModule) -> dict[str, Storages]:
        """Return the storages of each part; each storage belongs to one part only."""
        sharding, parameters = sharded_strategy_of(module), list(module.parameters())
        gradients: Iterable[Any] = [parameter.grad for parameter in parameters]
        if isinstance(sharding, ZeRO) and sharding.zero_stage_3:
            gradients = [sharding.zero_optimizer.grad_partitions_flat_buffer]
        elif isinstance(sharding, ZeRO):
            gradients = chain(*(group or () for group in sharding.zero_optimizer.averaged_gradients.values()))
        parts = {
            "weights": storages_of([*parameters, *(getattr(parameter, "ds_tensor", None) for parameter in parameters)]),
            "gradients": storages_of(gradients),
            "optimizer": storages_of(
                [
                    *(shard.storage for shard in (sharding.shards if sharding else {}).values()),
                    *chain(*(state.values() for state in optimizer_of(trainer, module).state.values())),
                ]
            ),
            "average": storages_of(self.ema.average.values()),
            "others": live_storages(),
        }
        known = set(self.initial_storages)
        for name, storages in parts.items():
            parts[name] = {key: storage for key, storage in storages.items() if key not in known}
            known |= set(storages)
        return parts

    def start_recording(self, module: LightningModule) -> None:
        # The collector may not list gradients that Python has not accessed yet.
        storages = live_storages() | storages_of(parameter.grad for parameter in module.parameters())
        self.recorder = LiveBytes({key: storages[key] for key in storages.keys() - self.initial_storages.keys()})
        self.recorder.__enter__()

    def stop_recording(self, name: str) -> None:
        """Store the peak and the communication since `start_recording`."""
        assert self.recorder is not None
        self.recorder.__exit__(None, None, None)
        self.measured[name] = self.recorder.peak
        self.measured |= {f"{name} {operator}": sent for operator, sent in self.recorder.sent.items()}
        self.recorder = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make Adam update all parameters at once, as it does on CUDA."""
        for group in optimizer_of(trainer, pl_module).param_groups:
            group["foreach"] = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == STEPS * MICRO_BATCHES - 1:
            self.start_recording(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == STEPS - 1:
            self.stop_recording("backward")
            parts = self.parts(trainer, pl_module)
            self.measured |= {"gradients": bytes_of(parts["gradients"]), "others": bytes_of(parts["others"])}
            self.start_recording(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == STEPS and self.recorder is not None:
            self.stop_recording("step")
            parts = self.parts(trainer, pl_module)
            self.measured |= {name: bytes_of(parts[name]) for name in ("weights", "optimizer", "average")}


def train(run: dict[str, Any], strategy: str | Strategy, devices: int) -> tuple[dict[str, int], int]:
    """Train on `run["shards"]` in `run["precision"]`; return the bytes of this rank, and the rank."""
    torch.manual_seed(0)
    images = SourceConfig([run["shards"]], batch_size=MICRO_BATCHES * RANKS, micro_batches=MICRO_BATCHES)
    data = LatentDataModule(images=images, max_ranks=RANKS)
    ema = EMA()
    meter = MemoryMeter(ema)
    register_strategies()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        precision=run["precision"],
        max_steps=STEPS,
        accumulate_grad_batches=data.micro_batches_per_step,
        callbacks=[ema, meter],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.fit(GPDiTStage(CONFIG), data)
    return meter.measured, trainer.global_rank


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    gc.freeze()  # hides the many objects of imported modules from `live_storages`
    folder = Path(sys.argv[1])
    for run in json.loads((folder / "runs.json").read_text()):
        strategy = run["strategy"]
        if strategy.startswith("zero"):
            strategy = ZeRO(stage=int(strategy[-1]), reduce_bucket_size=BUCKET)
            strategy.config["zero_optimization"]["stage3_prefetch_bucket_size"] = BUCKET
        measured, rank = train(run, strategy, RANKS)
        (folder / f"{run['name']}-{rank}.json").write_text(json.dumps(measured))
    shut_down_process_group()
