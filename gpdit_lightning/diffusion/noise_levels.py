"""Noise schedules: from a noise level t in [0, 1] to the angle theta of the rotation."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from gpdit_lightning.errors import InputError

ScheduleName = Literal["cosine", "linear"]
MIN_SHIFT, MAX_SHIFT = 1e-3, 1e3  # beyond, nearly all levels round to pure noise or to none
DDPM_STEPS, DDPM_BETAS = 1000, (1e-4, 2e-2)  # Ho et al., 2020, section 4


@dataclass(frozen=True)
class NoiseSchedule:
    """The function from noise levels to angles. Checkpoints and exported models store its two fields.

    Raises:
        InputError: the name is unknown, or the shift is outside [`MIN_SHIFT`, `MAX_SHIFT`].
    """

    name: ScheduleName = "cosine"
    """cosine: theta = t pi/2, so that sqrt(alpha_t) = cos(t pi/2). linear: the linear betas of DDPM over 1000 steps,
    with alpha-bar interpolated in t; its strongest noise is cos(theta) = 0.0064."""
    shift: float = 1.0
    """Resolution shift s: tan(theta') = s tan(theta). Above 1, more of the range of t is strong noise, as large frames
    need."""

    def __post_init__(self) -> None:
        if self.name not in get_args(ScheduleName):
            names = " or ".join(get_args(ScheduleName))
            raise InputError(f"noise schedule '{self.name}' is not known: choose {names}.")
        if not MIN_SHIFT <= self.shift <= MAX_SHIFT:
            raise InputError(
                f"schedule shift is {self.shift}: give a number from {MIN_SHIFT:g} to {MAX_SHIFT:g} (1 leaves the "
                "schedule as it is)."
            )

    def theta(self, t: Tensor) -> Tensor:
        """Return the angles in radians of noise levels `t` in [0, 1].

        Level 0 maps to 0 exactly. Level 1 maps to pi/2 exactly with `cosine`, and to less with `linear`.
        """
        if self.name == "linear":
            sin_squared, cos_squared = interpolated(t, _ddpm_variances(t.device, t.dtype))
            return torch.atan2(self.shift * sin_squared.sqrt(), cos_squared.sqrt())
        theta = t * (math.pi / 2)
        if self.shift == 1.0:
            return theta
        # atan2 instead of tan: finite at pure noise, where the cosine vanishes.
        return torch.atan2(self.shift * theta.sin(), (1 - t).mul(math.pi / 2).sin())


@cache
def _ddpm_variances(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return 1 - alpha-bar and alpha-bar after 0 to 1000 steps of DDPM: (2, 1001).

    The first is computed without the difference from 1, which would lose the digits of weak noise.
    """
    betas = torch.linspace(*DDPM_BETAS, DDPM_STEPS, dtype=torch.float64, device="cpu")  # MPS has no float64
    log_alpha_bar = torch.cat((torch.zeros(1, dtype=torch.float64, device="cpu"), (-betas).log1p().cumsum(0)))
    return torch.stack((-log_alpha_bar.expm1(), log_alpha_bar.exp())).to(device, dtype)


def interpolated(t: Tensor, values: Tensor) -> Tensor:
    """Interpolate rows of values (R, K + 1), given at t = 0, 1/K, ..., 1, linearly at `t`: (R, *t.shape)."""
    last = values.shape[1] - 1
    position = t * last
    index = position.long().clamp(0, last - 1)
    return torch.lerp(values[:, index], values[:, index + 1], position - index)
