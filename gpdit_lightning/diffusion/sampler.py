"""The deterministic sampler: from pure noise back to data by small rotations."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from gpdit_lightning.diffusion.noise_levels import NoiseSchedule
from gpdit_lightning.diffusion.rotation import rotate_back
from gpdit_lightning.errors import InputError


@dataclass(frozen=True)
class RotationSampler:
    """First-order solver of the probability flow d noisy / d theta = velocity, from theta = pi/2 to 0.

    A step by the angle d is one of

    - `rotation` (DDIM): cos(d) noisy - sin(d) velocity. Exact where x0 is certain, as in a well-determined
      continuation; where the data leave x0 open it draws the spread in: unit Gaussian data come out scaled by
      cos(pi / (2 steps))^steps.
    - `tangent` (Euler): noisy - d velocity. Exact for unit Gaussian data, whose optimal velocity is zero; where x0 is
      certain it errs by the same order.

    The error of both falls as 1 / steps.

    Raises:
        InputError: fewer than one step or an unknown rule.
    """

    steps: int = 25
    """Number of steps, one network call each."""
    rule: Literal["rotation", "tangent"] = "rotation"
    """How a step is taken."""
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)
    """Steps are even in t; the schedule places them in theta."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"a sampler of {self.steps} steps cannot run: take at least 1.")
        if self.rule not in ("rotation", "tangent"):
            raise InputError(f"sampler rule '{self.rule}' is not known: choose rotation or tangent.")

    def angles(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The angles visited, from pi/2 to 0: (steps + 1,) radians."""
        return self.schedule.theta(torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)).to(dtype)

    def sample(self, velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor) -> Tensor:
        """Integrate from `noise` (B, ...) to data of the same shape.

        Args:
            velocity: maps (noisy (B, ...), theta (B,)) to the velocity (B, ...).
            noise: standard Gaussian.
        """
        x = noise
        precise = torch.promote_types(x.dtype, torch.float32)
        angles = self.angles(torch.float64).tolist()
        for theta, following in pairwise(angles):
            v = velocity(x, x.new_full((x.shape[0],), theta, dtype=precise))
            step = theta - following
            x = rotate_back(x, v, x.new_full((), step)) if self.rule == "rotation" else x - step * v
        return x
