"""Samplers: solvers from pure noise to data over decreasing angles, with one interface.

In the notation of the papers alpha = cos(theta), sigma = sin(theta) and lambda = log(alpha / sigma) = -log tan(theta):
minus infinity at pure noise, infinity at clean data. Coefficients are Python floats for every dtype.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from gpdit_lightning.diffusion.noise_levels import NoiseSchedule
from gpdit_lightning.diffusion.rotation import rotate_back
from gpdit_lightning.errors import InputError
from gpdit_lightning.imports import (
    check_part,
    import_path,
    is_import_path,
    report_custom_errors,
    resolve,
    value_summary,
)

MAX_STEPS = 100_000

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(noisy (B, ...), theta (B,)) -> velocity (B, ...)."""
FreshNoise = Callable[[int], Tensor]
"""number of a step, from 0 -> standard Gaussian noise with the shape of the sample."""
VelocityAt = Callable[[Tensor, float], Tensor]
"""(noisy (B, ...), one theta for all clips) -> velocity (B, ...)."""

SOLVE = (
    "its method solve(velocity, x, angles, fresh) must return a tensor with the shape, dtype and device of x; "
    "velocity(x, angle) is the network and fresh(step number) is noise"
)
"""Description of a custom sampler's method, for messages."""


@dataclass(frozen=True)
class Sampler(ABC):
    """Solves d noisy / d theta = velocity, or a random process of the same marginals, from pure noise to theta = 0.

    A custom sampler is a frozen dataclass that inherits from this class and defines `solve`. Options accept its import
    path, or a name registered by :func:`register_sampler`.

    Raises:
        InputError: fewer than one step, or more than `MAX_STEPS`.
    """

    steps: int = 25
    """Number of steps, with one network call each."""
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)
    """Maps the steps, which are evenly spaced in t, to theta."""

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MAX_STEPS:
            raise InputError(f"the number of sampler steps is {self.steps}; give a number from 1 to {MAX_STEPS}.")

    def angles(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the angles between the steps, from that of t = 1 to 0: (steps + 1,) radians, on the CPU."""
        t = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64, device="cpu")  # MPS has no float64
        return self.schedule.theta(t).to(dtype)

    def sample(self, velocity: Velocity, noise: Tensor, fresh_noise: FreshNoise | None = None) -> Tensor:
        """Integrate from `noise` (B, ...) to data of the same shape and dtype over `angles()`; see `integrate`."""
        return self.integrate(velocity, noise, self.angles(torch.float64).tolist(), fresh_noise)

    def integrate(
        self, velocity: Velocity, noise: Tensor, angles: Sequence[float], fresh_noise: FreshNoise | None = None
    ) -> Tensor:
        """Integrate from the sample at the first angle to the sample at the last, of the same shape and dtype.

        Args:
            velocity: the network, called once per step, with angles in float32 or better.
            noise: (B, ...), the sample at the first angle; standard Gaussian at that of t = 1.
            angles: decreasing, in radians.
            fresh_noise: for stochastic samplers, called once per step that adds noise.

        Raises:
            InputError: a stochastic sampler has no `fresh_noise`, the velocity has another shape than the sample, or a
                custom sampler fails or returns a tensor of another shape, dtype or device.
        """
        precise = torch.promote_types(noise.dtype, torch.float32)

        def velocity_at(x: Tensor, theta: float) -> Tensor:
            if x.shape != noise.shape:
                raise InputError(
                    f"sampler '{import_path(self)}' calls velocity(x, angle) with x of shape {tuple(x.shape)}: keep "
                    f"the shape {tuple(noise.shape)} of the noise."
                )
            result = velocity(x, x.new_full((x.shape[0],), theta, dtype=precise))
            if result.shape != x.shape:  # broadcast, it would be the velocity of other samples
                raise InputError(
                    f"the velocity has shape {tuple(result.shape)}; it must be that of the sample, {tuple(x.shape)}."
                )
            return result.to(x.dtype)

        if type(self).__module__ == __name__:
            return self.solve(velocity_at, noise, angles, fresh_noise)
        path = import_path(self)
        with report_custom_errors("sampler", path, SOLVE):
            result = self.solve(velocity_at, noise, angles, fresh_noise)
        expected, actual = value_summary(noise), value_summary(result)
        if actual != expected:
            raise InputError(f"sampler '{path}' returns {actual} for noise of {expected}: {SOLVE}.")
        return result

    @abstractmethod
    def solve(self, velocity: VelocityAt, x: Tensor, angles: Sequence[float], fresh: FreshNoise | None) -> Tensor:
        """Run the steps of the method.

        Args:
            velocity: the network at one angle.
            x: (B, ...), the sample at the first angle.
            angles: decreasing, in radians; each step is from one angle to the next.
            fresh: noise for stochastic methods.

        Returns:
            the sample at the last angle, of the shape and dtype of `x`.
        """


@dataclass(frozen=True)
class RotationSampler(Sampler):
    """DDIM (Song et al., 2021, equation 12 without noise): a step by the angle d is cos(d) noisy - sin(d) velocity.

    The default, for continuations that their context nearly determines: exact if x0 is certain. If x0 is uncertain, it
    reduces the variance: unit Gaussian data are scaled by cos(pi / (2 steps))^steps. The error decreases as
    1 / steps.
    """

    def solve(self, velocity: VelocityAt, x: Tensor, angles: Sequence[float], fresh: FreshNoise | None) -> Tensor:
        """x <- cos(d) x - sin(d) velocity."""
        for theta, theta_next in pairwise(angles):
            x = rotate_back(x, velocity(x, theta), theta - theta_next)
        return x


@dataclass(frozen=True)
class TangentSampler(Sampler):
    """Euler's method in theta: a step by the angle d is noisy - d velocity.

    For data with uncertain x0, if the variance of the samples matters: exact for unit Gaussian data, whose optimal
    velocity is zero. For all other data, also with certain x0, the error decreases as 1 / steps.
    """

    def solve(self, velocity: VelocityAt, x: Tensor, angles: Sequence[float], fresh: FreshNoise | None) -> Tensor:
        """x <- x - d velocity."""
        for theta, theta_next in pairwise(angles):
            x = x - (theta - theta_next) * velocity(x, theta)
        return x


@dataclass(frozen=True)
class AdamsSampler(Sampler):
    """The two-step method of Adams and Bashforth in theta: the velocity is linear in theta through its last two values.

    For few network calls with a trained network, whose velocity changes smoothly with theta: 8 of its steps came as
    close to the flow as 25 rotations (docs/generation.md). Its first step is Euler's. The error decreases as
    1 / steps^2.
    """

    def solve(self, velocity: VelocityAt, x: Tensor, angles: Sequence[float], fresh: FreshNoise | None) -> Tensor:
        """x <- x - d velocity - d^2 / (2 d_last) (velocity - velocity_last)."""
        last_v: Tensor | None = None
        last_step = math.inf
        for theta, theta_next in pairwise(angles):
            step, v = theta - theta_next, velocity(x, theta)
            x = x - step * v
            if last_v is not None:
                x = x - step * step / (2 * last_step) * (v - last_v)
            last_v, last_step = v, step
        return x


def _half_log_snr(theta: float) -> float:
    # The number math.pi / 2 is less than pi/2 and has a finite tangent.
    if theta >= math.pi / 2:
        return -math.inf
    return -math.log(math.tan(theta)) if theta > 0 else math.inf


@dataclass(frozen=True)
class DPMSolver2M(Sampler):
    """DPM-Solver++ (2M) (Lu et al., 2022, algorithm 2): x0 is linear in lambda through its last two values.

    For few network calls: exact, like the rotation, if x0 is certain, and otherwise closer to the flow; for data of two
    Gaussians 10 steps come closer than 25 rotations. Steps at infinite lambda are rotations: the first two from pure
    noise and the last to clean data. The error decreases as 1 / steps^2 over even steps in lambda, and as
    log(steps) / steps^2 over even steps in t, which are long in lambda near both ends.
    """

    def solve(self, velocity: VelocityAt, x: Tensor, angles: Sequence[float], fresh: FreshNoise | None) -> Tensor:
        """x <- sigma' / sigma x + alpha' (1 - exp(-h)) (x0 + h / (2 h_last) (x0 - x0_last)), h the step in lambda."""
        last_x0: Tensor | None = None
        last_stride = math.inf
        for theta, theta_next in pairwise(angles):
            stride = _half_log_snr(theta_next) - _half_log_snr(theta)
            # alpha' (1 - exp(-h)) in a form that is finite at both ends.
            weight = math.sin(theta - theta_next) / math.sin(theta)
            x0 = rotate_back(x, velocity(x, theta), theta)
            x = math.sin(theta_next) / math.sin(theta) * x + weight * x0
            if last_x0 is not None and theta_next > 0:
                x = x + weight * stride / (2 * last_stride) * (x0 - last_x0)
            last_x0, last_stride = x0, stride
        return x


@dataclass(frozen=True)
class StochasticSampler(Sampler):
    """DDIM with fresh noise in place of a part of the implied noise (Song et al., 2021, equations 12 and 16).

    For many steps and an imperfect network: replacing noise removes the errors of earlier steps (Karras et al., 2022,
    section 4). Exact if x0 is certain. The error of the distribution decreases as 1 / steps.

    Raises:
        InputError: `eta` is outside [0, 1].
    """

    eta: float = 1.0
    """Scale of the fresh noise: 1 = ancestral steps (DDPM: Ho et al., 2020), 0 = the rotation, which needs none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise InputError(f"eta is {self.eta}; choose it from 0 (no fresh noise) to 1 (as much as DDPM adds).")

    def solve(self, velocity: VelocityAt, x: Tensor, angles: Sequence[float], fresh: FreshNoise | None) -> Tensor:
        """x <- the rotation, with a part of the implied noise replaced by fresh noise."""
        if self.eta > 0 and fresh is None:
            raise InputError("the stochastic sampler adds noise at every step: give fresh_noise, or set eta to 0.")
        for number, (theta, theta_next) in enumerate(pairwise(angles)):
            ratio = math.tan(theta_next) / math.tan(theta)
            sigma, share = math.sin(theta_next), self.eta * math.sqrt(1 - ratio**2)
            # The implied noise is sin(theta) x + cos(theta) velocity.
            removed = sigma * (1 - math.sqrt(1 - share**2))
            x_weight = math.cos(theta - theta_next) - removed * math.sin(theta)
            velocity_weight = math.sin(theta - theta_next) + removed * math.cos(theta)
            x = x_weight * x - velocity_weight * velocity(x, theta)
            if fresh is not None and sigma * share > 0:
                x = x + sigma * share * fresh(number).to(x)
        return x


SAMPLERS: dict[str, type[Sampler]] = {
    "rotation": RotationSampler,
    "tangent": TangentSampler,
    "adams": AdamsSampler,
    "dpm2m": DPMSolver2M,
    "stochastic": StochasticSampler,
}
BUILT_IN = tuple(SAMPLERS)


def register_sampler(name: str, sampler: type[Sampler]) -> None:
    """Register a custom sampler under a name for options in this process; an import path needs no registration.

    Raises:
        InputError: the name is that of a built-in sampler, or the class is no complete subclass of :class:`Sampler`.
    """
    if name in BUILT_IN:
        raise InputError(f"sampler '{name}' is built in: register yours under another name.")
    check_part(sampler, name, "sampler", Sampler)
    SAMPLERS[name] = sampler


def check_sampler_name(name: str, option: str) -> None:
    """Raise `InputError` if the value of an option is neither a name in `SAMPLERS` nor an import path.

    The class at an import path is imported when it is used.
    """
    if not is_import_path(name):
        resolve(name, SAMPLERS, option, base=Sampler)


def make_sampler(name: str, steps: int, schedule: NoiseSchedule) -> Sampler:
    """Return the sampler with a name in `SAMPLERS`, or of the class at an import path such as `my_package.MySampler`.

    Raises:
        InputError: the name is neither known nor the import path of a subclass of :class:`Sampler`, the class cannot be
            constructed from steps and schedule, or there is fewer than one step.
    """
    kind = resolve(name, SAMPLERS, "sampler", base=Sampler)
    with report_custom_errors(
        "sampler", import_path(kind), "it is called with (steps, schedule); give its other fields defaults"
    ):
        return kind(steps, schedule)
