"""From pure noise back to data: solvers over falling angles, behind one interface.

In the letters of the papers alpha = cos(theta), sigma = sin(theta) and lambda = log(alpha / sigma) = -log tan(theta):
minus infinity at pure noise, infinity at clean data. Coefficients are Python floats, whatever the dtype.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from gpdit_lightning.diffusion.noise_levels import NoiseSchedule
from gpdit_lightning.errors import InputError

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(noisy (B, ...), theta (B,)) -> velocity (B, ...)."""
FreshNoise = Callable[[int], Tensor]
"""The number of a step, from 0 -> standard Gaussian noise shaped like the sample."""
VelocityAt = Callable[[Tensor, float], Tensor]
"""A `Velocity` at one angle for all clips."""


@dataclass(frozen=True)
class Sampler(ABC):
    """Follows d noisy / d theta = velocity, or a random process of the same marginals, from theta = pi/2 to 0.

    Raises:
        InputError: fewer than one step.
    """

    name: ClassVar[str]
    """What commands and recipes call it."""
    steps: int = 25
    """Number of steps, one network call each."""
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)
    """Steps are even in t; the schedule places them in theta."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"a sampler of {self.steps} steps cannot run: take at least 1.")

    def angles(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The angles visited, from pi/2 to 0: (steps + 1,) radians."""
        return self.schedule.theta(torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)).to(dtype)

    def sample(self, velocity: Velocity, noise: Tensor, fresh_noise: FreshNoise | None = None) -> Tensor:
        """From `noise` (B, ...) to data of the same shape and dtype, over `angles()`; the rest as in `integrate`."""
        return self.integrate(velocity, noise, self.angles(torch.float64).tolist(), fresh_noise)

    def integrate(
        self, velocity: Velocity, noise: Tensor, angles: Sequence[float], fresh_noise: FreshNoise | None = None
    ) -> Tensor:
        """From the sample at the first of the falling `angles` to the one at the last, of the same shape and dtype.

        Args:
            velocity: asked once per step, with angles in float32 or better.
            noise: (B, ...), standard Gaussian where the angles begin at pi/2.
            angles: in radians.
            fresh_noise: for stochastic samplers, asked once per step that adds noise.

        Raises:
            InputError: a stochastic sampler without `fresh_noise`.
        """
        precise = torch.promote_types(noise.dtype, torch.float32)

        def velocity_at(x: Tensor, theta: float) -> Tensor:
            return velocity(x, x.new_full((x.shape[0],), theta, dtype=precise)).to(x.dtype)

        return self._solve(velocity_at, noise, angles, fresh_noise)

    @abstractmethod
    def _solve(self, velocity: VelocityAt, x: Tensor, angles: Sequence[float], fresh: FreshNoise | None) -> Tensor: ...


def _turned(x: Tensor, velocity: Tensor, angle: float) -> Tensor:
    """The rotation by `angle` towards the clean end: a step of DDIM, and by the whole of theta the implied x0."""
    return math.cos(angle) * x - math.sin(angle) * velocity


@dataclass(frozen=True)
class RotationSampler(Sampler):
    """DDIM (Song et al., 2021, equation 12 without noise): a step by the angle d is cos(d) noisy - sin(d) velocity.

    The default, for continuations that their context all but settles: exact where x0 is certain. Where the data leave
    x0 open it draws the spread in: unit Gaussian data come out scaled by cos(pi / (2 steps))^steps. The error falls as
    1 / steps.
    """

    name = "rotation"

    def _solve(self, velocity: VelocityAt, x: Tensor, angles: Sequence[float], fresh: FreshNoise | None) -> Tensor:
        for theta, following in pairwise(angles):
            x = _turned(x, velocity(x, theta), theta - following)
        return x


@dataclass(frozen=True)
class TangentSampler(Sampler):
    """Euler's method in theta: a step by the angle d is noisy - d velocity.

    For data that leave x0 open, where the spread of the samples matters: exact for unit Gaussian data, whose optimal
    velocity is zero. Everywhere else, certain x0 included, the error falls as 1 / steps.
    """

    name = "tangent"

    def _solve(self, velocity: VelocityAt, x: Tensor, angles: Sequence[float], fresh: FreshNoise | None) -> Tensor:
        for theta, following in pairwise(angles):
            x = x - (theta - following) * velocity(x, theta)
        return x


@dataclass(frozen=True)
class AdamsSampler(Sampler):
    """The two-step method of Adams and Bashforth in theta: a velocity as a straight line through its last two values.

    For few network calls with a trained network, whose velocity changes evenly with theta: there 8 of its steps came
    as close to the flow as 25 rotations (docs/generation.md). Its first step is Euler's. The error falls as
    1 / steps^2.
    """

    name = "adams"

    def _solve(self, velocity: VelocityAt, x: Tensor, angles: Sequence[float], fresh: FreshNoise | None) -> Tensor:
        past: Tensor | None = None
        last_step = math.inf
        for theta, following in pairwise(angles):
            step, v = theta - following, velocity(x, theta)
            x = x - step * v
            if past is not None:
                x = x - step * step / (2 * last_step) * (v - past)
            past, last_step = v, step
        return x


def _half_log_snr(theta: float) -> float:
    # math.pi / 2 lies below pi/2 and has a finite tangent.
    if theta >= math.pi / 2:
        return -math.inf
    return -math.log(math.tan(theta)) if theta > 0 else math.inf


@dataclass(frozen=True)
class DPMSolver2M(Sampler):
    """DPM-Solver++ (2M) (Lu et al., 2022, algorithm 2): x0 as a straight line in lambda through its last two values.

    For few network calls: exact, like the rotation, where x0 is certain, and elsewhere closer to the flow; for data of
    two Gaussians 10 steps come closer than 25 rotations. Where lambda is infinite its steps are rotations: the first
    two from pure noise and the last to clean data. The error falls as 1 / steps^2 over even steps in lambda, and as
    log(steps) / steps^2 over even steps in t, which are long in lambda near both ends.
    """

    name = "dpm2m"

    def _solve(self, velocity: VelocityAt, x: Tensor, angles: Sequence[float], fresh: FreshNoise | None) -> Tensor:
        past: Tensor | None = None
        last_stride = math.inf
        for theta, following in pairwise(angles):
            stride = _half_log_snr(following) - _half_log_snr(theta)
            # The paper's alpha (1 - exp(-h)), in a form that is finite at both ends.
            weight = math.sin(theta - following) / math.sin(theta)
            x0 = _turned(x, velocity(x, theta), theta)
            x = math.sin(following) / math.sin(theta) * x + weight * x0
            if past is not None and following > 0:
                x = x + weight * stride / (2 * last_stride) * (x0 - past)
            past, last_stride = x0, stride
        return x


@dataclass(frozen=True)
class StochasticSampler(Sampler):
    """DDIM with fresh noise in place of a part of the implied one (Song et al., 2021, equations 12 and 16).

    For many steps and an imperfect network: what it got wrong early is forgotten with the noise that is replaced
    (Karras et al., 2022, section 4). Exact where x0 is certain. The error of the distribution falls as 1 / steps.

    Raises:
        InputError: `eta` outside [0, 1].
    """

    name = "stochastic"
    eta: float = 1.0
    """Scale of the fresh noise: 1 = ancestral steps (DDPM: Ho et al., 2020), 0 = the rotation, which needs none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise InputError(f"eta is {self.eta}: choose it from 0, no fresh noise, to 1, as much as DDPM adds.")

    def _solve(self, velocity: VelocityAt, x: Tensor, angles: Sequence[float], fresh: FreshNoise | None) -> Tensor:
        if self.eta > 0 and fresh is None:
            raise InputError("the stochastic sampler adds noise at every step: give fresh_noise, or set eta to 0.")
        for number, (theta, following) in enumerate(pairwise(angles)):
            ratio = math.tan(following) / math.tan(theta)
            sigma, share = math.sin(following), self.eta * math.sqrt(1 - ratio**2)
            # A rotation that leaves out a part of the implied noise, sin(theta) x + cos(theta) velocity.
            left_out = sigma * (1 - math.sqrt(1 - share**2))
            on_x = math.cos(theta - following) - left_out * math.sin(theta)
            on_velocity = math.sin(theta - following) + left_out * math.cos(theta)
            x = on_x * x - on_velocity * velocity(x, theta)
            if fresh is not None and sigma * share > 0:
                x = x + sigma * share * fresh(number).to(x)
        return x


SAMPLERS: dict[str, type[Sampler]] = {
    sampler.name: sampler for sampler in (RotationSampler, TangentSampler, AdamsSampler, DPMSolver2M, StochasticSampler)
}


def make_sampler(name: str, steps: int, schedule: NoiseSchedule) -> Sampler:
    """The sampler that commands and recipes call `name`.

    Raises:
        InputError: an unknown name or fewer than one step.
    """
    if name not in SAMPLERS:
        raise InputError(f"sampler '{name}' is not known: choose one of {', '.join(SAMPLERS)}.")
    return SAMPLERS[name](steps, schedule)
