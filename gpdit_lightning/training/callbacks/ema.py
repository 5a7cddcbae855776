"""Exponential moving average of the weights, in float32."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.tensor_files import TensorOnDisk
from gpdit_lightning.training.strategies.sharding import sharded_strategy_of


class EMA(Callback):
    """Exponential moving average of the weights, used for validation and saved in every checkpoint under `ema`.

    It holds one float32 tensor per trainable parameter or, under ZeRO and FSDP2, per shard of this rank. Lightning's
    weight averaging copies the whole module, and the copy is lost under DeepSpeed.

    Args:
        decay: decay of the average per optimizer step; at most (1 + n) / (10 + n) after n updates, so that the initial
            weights are forgotten.
        validate: whether validation uses the average instead of the training weights.
    """

    def __init__(self, decay: float = 0.9999, validate: bool = True) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"ema.decay is {decay}; it must lie in [0, 1).")
        self.decay, self.validate = decay, validate
        self.average: dict[str, Tensor] = {}
        self.updates = 0
        self._validating = ExitStack()
        self._last_step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Initialize the average with the current weights, or move a restored one to the device."""
        sharded = sharded_strategy_of(pl_module)
        if not self.average:
            self.average = {name: p.detach().clone().float() for name, p in _trainable(pl_module)}
        for name, values in self.average.items():
            if isinstance(values, TensorOnDisk):  # of a sharded strategy: this rank reads its shard only
                assert sharded is not None
                self.average[name] = sharded.shards[name].read(values)
        self.average = {name: self.average[name].to(p.device) for name, p in _trainable(pl_module)}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the step of a resumed run, which Lightning restores after `on_fit_start`."""
        self._last_step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Update the average after each optimizer step (not after each micro-batch)."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [p.detach().float() for _, p in _trainable(pl_module)]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)

    @contextmanager
    @torch.no_grad()
    def averaged(self, pl_module: LightningModule) -> Iterator[None]:
        """Use the averaged weights in the module during a block; without an average, change nothing."""
        if not self.average:
            yield
            return
        training_weights = [(parameter, parameter.detach().clone()) for _, parameter in _trainable(pl_module)]
        try:
            for name, parameter in _trainable(pl_module):
                parameter.copy_(self.average[name])
            _refresh(pl_module)
            yield
        finally:
            for parameter, weight in training_weights:
                parameter.copy_(weight)
            _refresh(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Use the averaged weights."""
        if self.validate:
            self._validating.enter_context(self.averaged(pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the training weights."""
        self._validating.close()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for validation."""
        self.on_validation_start(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for validation."""
        self.on_validation_end(trainer, pl_module)

    @torch.no_grad()
    def distance(self, pl_module: LightningModule) -> float:
        """Return |weights - average| / |weights|. A collective operation: all ranks must call it."""
        difference, size = [], []
        for name, parameter in _trainable(pl_module):  # one by one: a second copy of all weights might not fit
            weight = parameter.float()
            difference.append((weight - self.average[name]).norm())
            size.append(weight.norm())
        norms = torch.stack([torch.stack(difference).norm(), torch.stack(size).norm()])
        sharded = sharded_strategy_of(pl_module)
        if sharded is not None:
            norms = sharded.reduce(norms.square().to(sharded.root_device), reduce_op="sum").sqrt()
        return float(norms[0] / norms[1])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the average to a checkpoint."""
        sharded = sharded_strategy_of(pl_module)
        weights = self.average if sharded is None else sharded.slices(self.average)
        checkpoint["ema"] = {"weights": weights, "updates": self.updates}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the average from a checkpoint.

        Raises:
            InputError: the checkpoint has no average, or that of other parameters.
        """
        saved = checkpoint.get("ema", {"weights": {}, "updates": 0})
        parameters = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        for name in sorted(parameters.keys() ^ saved["weights"].keys()):
            owner, other = ("the model", "the average") if name in parameters else ("the average", "the model")
            raise InputError(f"{owner} of the checkpoint has {name}, but {other} does not: use another checkpoint.")
        self.average, self.updates = dict(saved["weights"]), saved["updates"]


def _trainable(module: LightningModule) -> list[tuple[str, Tensor]]:
    """Return the trainable parameters by name or, if they are sharded, this rank's float32 shard of each."""
    sharded = sharded_strategy_of(module)
    if sharded is not None:
        return list(sharded.master_weights().items())
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def _refresh(module: LightningModule) -> None:
    """Update the weights that the model computes with, if they are copies of sharded master weights."""
    sharded = sharded_strategy_of(module)
    if sharded is not None:
        sharded.refresh_weights()
