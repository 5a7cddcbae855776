"""The optimizer and its learning-rate schedule."""

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
    """AdamW and its schedule. Adam and the learning rates are those of GPDiT (5.1); the other values are ours."""

    learning_rate: float = 1e-4
    """Peak learning rate (GPDiT 5.1: 1e-4; 2e-5 for long video)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moments of the gradient."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay; with 0 AdamW is the paper's Adam."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises linearly; the first step has 1 / warmup_steps of the peak."""
    decay: Literal["constant", "cosine", "wsd"] = "constant"
    """After the warm-up: `constant`; `cosine`, a half cosine until the end of the run; or `wsd` (warm-up, stable,
    decay), constant and then a linear decay over the last `decay_steps` (MiniCPM, arXiv:2404.06395, with the linear
    cool-down of Hägele et al., arXiv:2405.18392), so that a longer run can start from any checkpoint of the stable
    part."""
    decay_steps: int = 0
    """Optimizer steps at the end of the run over which `wsd` decays."""
    final_learning_rate_fraction: float = 0.0
    """Final learning rate of `cosine` and `wsd`, relative to the peak."""

    def __post_init__(self) -> None:
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise InputError(f"optimizer.learning_rate is {self.learning_rate}; it must be positive and finite.")
        if self.warmup_steps < 0:
            raise InputError(f"optimizer.warmup_steps is {self.warmup_steps}; it must not be negative.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"optimizer.betas is {list(self.betas)}; both must lie in [0, 1).")
        if not self.eps > 0:
            raise InputError(f"optimizer.eps is {self.eps}; it must be positive.")
        if not self.weight_decay >= 0:
            raise InputError(f"optimizer.weight_decay is {self.weight_decay}; it must not be negative.")
        if self.decay == "wsd" and self.decay_steps < 1:
            raise InputError(
                f"optimizer.decay is wsd but decay_steps is {self.decay_steps}: set the number of steps at the end of "
                "the run over which the learning rate decays."
            )
        if not 0 <= self.final_learning_rate_fraction <= 1:
            raise InputError(
                f"optimizer.final_learning_rate_fraction is {self.final_learning_rate_fraction}; it must lie between 0 "
                "and 1."
            )


def learning_rate_factor(step: int, config: OptimizerConfig, max_steps: int) -> float:
    """Return the learning rate at an optimizer step, relative to the peak."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return 1.0
    remaining = max(0, max_steps - step)
    if config.decay == "cosine":
        decay = 0.5 * (1 - math.cos(math.pi * remaining / max(1, max_steps - config.warmup_steps)))
    else:
        decay = min(1.0, remaining / config.decay_steps)
    floor = config.final_learning_rate_fraction
    return floor + (1 - floor) * decay


def apply_config(config: OptimizerConfig, optimizer: torch.optim.Optimizer, scheduler: LambdaLR) -> list[str]:
    """Replace the restored settings of an optimizer by those of a recipe.

    The learning rate is computed again; it is bit-equal if the recipe did not change.

    Returns:
        a sentence for each setting that changed.
    """
    settings = {
        "initial_lr": config.learning_rate,
        "betas": tuple(config.betas),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    changed = []
    for name, value in settings.items():
        before = optimizer.param_groups[0][name]
        if (tuple(before) if name == "betas" else before) != value:
            label = "learning_rate" if name == "initial_lr" else name
            changed.append(f"optimizer.{label} is {value} from now on; it was {before}")
    for group in optimizer.param_groups:
        group |= settings
        group["lr"] = config.learning_rate * scheduler.lr_lambdas[0](scheduler.last_epoch)
    scheduler.base_lrs = [config.learning_rate] * len(optimizer.param_groups)
    return changed


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, max_steps: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Return AdamW over `parameters` and its schedule, which advances once per optimizer step.

    Raises:
        InputError: the schedule decays but the run has no end, or the decay does not fit into the run.
    """
    if config.decay != "constant" and max_steps <= 0:
        raise InputError(f"optimizer.decay is {config.decay} but the run has no end: set trainer.max_steps.")
    if config.decay == "wsd" and config.warmup_steps + config.decay_steps > max_steps:
        raise InputError(
            f"optimizer.warmup_steps = {config.warmup_steps} and decay_steps = {config.decay_steps} do not fit into "
            f"trainer.max_steps = {max_steps}: shorten them, or train for more steps."
        )
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    return optimizer, LambdaLR(optimizer, partial(learning_rate_factor, config=config, max_steps=max_steps))
