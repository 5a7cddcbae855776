"""Stops a run before a broken gradient reaches the weights."""

import math
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer


class NonFiniteError(ArithmeticError):
    """Loss or gradient is infinite or not a number."""


class Health(Callback):
    """Checks the gradient norm before every optimizer step and keeps it for the log.

    Attributes:
        gradient_norm: of the last optimizer step, before clipping.
    """

    def __init__(self) -> None:
        self.gradient_norm = 0.0
        self._keys: list[str] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember which samples the coming gradient is made of."""
        self._keys += batch.keys

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure the gradient.

        Raises:
            NonFiniteError: naming the step and the samples; the weights are still those of the step before.
        """
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.gradient_norm = float(torch.nn.utils.get_total_norm(gradients))
        keys, self._keys = self._keys, []
        if not math.isfinite(self.gradient_norm):
            raise NonFiniteError(
                f"the gradient of optimizer step {trainer.global_step} is {self.gradient_norm}; the weights were left "
                f"as they were. Samples: {', '.join(keys[:16])}{' ...' if len(keys) > 16 else ''}. The last checkpoint "
                "is whole: look at these samples, or go on from it with a lower learning rate or clipping."
            )
