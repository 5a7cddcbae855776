"""The optimiser and its learning-rate schedule."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from gpdit_lightning.errors import InputError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule. GPDiT (5.1) names Adam and the learning rates; the other values are ours."""

    learning_rate: float = 1e-4
    """Peak learning rate (GPDiT 5.1: 1e-4; 2e-5 for long video)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay; at 0 AdamW is the paper's Adam."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises linearly from 0."""
    decay: Literal["constant", "cosine"] = "constant"
    """After the warm-up: stay, or fall to 0 along a half cosine at the last step of the run."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise InputError(f"optimizer.learning_rate is {self.learning_rate}; it must be positive.")
        if self.warmup_steps < 0:
            raise InputError(f"optimizer.warmup_steps is {self.warmup_steps}; it must not be negative.")


def learning_rate_factor(step: int, config: OptimizerConfig, max_steps: int) -> float:
    """Learning rate at an optimizer step relative to the peak."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, max_steps: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW over `parameters` and its schedule, to be stepped once per optimizer step.

    Raises:
        InputError: a cosine without an end.
    """
    if config.decay == "cosine" and max_steps <= 0:
        raise InputError("optimizer.decay is cosine but the run has no end: set trainer.max_steps.")
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    return optimizer, LambdaLR(optimizer, partial(learning_rate_factor, config=config, max_steps=max_steps))
