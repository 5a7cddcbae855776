"""Noise schedules: from a noise level t in [0, 1] to the angle theta of the rotation."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gpdit_lightning.errors import InputError


@dataclass(frozen=True)
class NoiseSchedule:
    """The function from noise levels to angles. Checkpoints and exported models store its two fields.

    Raises:
        InputError: the name is unknown, or the shift is not positive.
    """

    name: Literal["cosine"] = "cosine"
    """cosine: theta = t pi/2, so that sqrt(alpha_t) = cos(t pi/2)."""
    shift: float = 1.0
    """Resolution shift s: tan(theta') = s tan(theta). Above 1 more of the range of t is strong noise, for large
    frames."""

    def __post_init__(self) -> None:
        if self.name != "cosine":
            raise InputError(f"noise schedule '{self.name}' is not known: choose cosine.")
        if not self.shift > 0:
            raise InputError(f"schedule shift is {self.shift}; it must be positive (1 leaves the schedule as it is).")

    def theta(self, t: Tensor) -> Tensor:
        """Return the angles in radians of noise levels `t` in [0, 1]; 0 and 1 map to 0 and pi/2 exactly."""
        theta = t * (math.pi / 2)
        if self.shift == 1.0:
            return theta
        # atan2 instead of tan: finite at pure noise, where the cosine vanishes.
        return torch.atan2(self.shift * theta.sin(), (1 - t).mul(math.pi / 2).sin())
