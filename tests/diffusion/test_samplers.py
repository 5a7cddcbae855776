"""Against closed forms. Where scalar data are a mixture of N(m_k, s_k^2) with weights w_k, noisy = cos x0 + sin eps is,
in component k, Gaussian with mean m_k cos and variance V_k = s_k^2 cos^2 + sin^2, and its covariance with
v = -sin x0 + cos eps is (1 - s_k^2) sin cos. So the optimal velocity is, with r_k = P(k | noisy) by Bayes' rule,

    E[v | noisy] = sum_k r_k [-m_k sin + (1 - s_k^2) sin cos / V_k (noisy - m_k cos)].

The flow d noisy / d theta = E[v | noisy] carries one mixture into the other, and on a line paths do not cross: it keeps
the quantile, so that it takes the noise u to F_0^-1(Phi(u)), with F_theta the mixture's distribution function.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from gpdit_lightning.diffusion import (
    SAMPLERS,
    AdamsSampler,
    DPMSolver2M,
    FreshNoise,
    Guidance,
    NoiseSchedule,
    RotationSampler,
    Sampler,
    StochasticSampler,
    TangentSampler,
    make_sampler,
    register_sampler,
    samplers,
    velocity_of,
)
from gpdit_lightning.diffusion.samplers import VelocityAt
from gpdit_lightning.errors import InputError

NOISE = torch.linspace(-2.5, 2.5, 11, dtype=torch.float64)[:, None]
SCHEDULES = [NoiseSchedule(), NoiseSchedule(shift=3.0)]
LINEAR = NoiseSchedule("linear")  # begins below pi/2


class Mixture(NamedTuple):
    weights: list[float]
    means: list[float]
    stds: list[float]

    def _at(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, means and variances of the noisy components: (..., K) for theta (..., 1)."""
        weights, means, stds = (torch.tensor(values, dtype=torch.float64) for values in self)
        return weights, means * theta.cos(), stds**2 * theta.cos() ** 2 + theta.sin() ** 2

    def velocity(self, noisy: Tensor, theta: Tensor) -> Tensor:
        """E[v | noisy] for noisy (B, 1), theta (B,)."""
        theta = theta[:, None]
        weights, centres, variances = self._at(theta)
        offsets = noisy - centres
        log_likelihoods = weights.log() - offsets**2 / (2 * variances) - variances.log() / 2
        means, stds = (torch.tensor(values, dtype=torch.float64) for values in self[1:])
        slopes = (1 - stds**2) * theta.sin() * theta.cos() / variances
        return (log_likelihoods.softmax(1) * (slopes * offsets - means * theta.sin())).sum(1, keepdim=True)

    def cumulative(self, noisy: Tensor, theta: float) -> Tensor:
        """F_theta of noisy (B, 1)."""
        weights, centres, variances = self._at(torch.tensor([theta], dtype=torch.float64))
        return (weights * torch.special.ndtr((noisy - centres) / variances.sqrt())).sum(1, keepdim=True)

    def quantile(self, probability: Tensor, theta: float = 0.0) -> Tensor:
        """F_theta^-1 of (B, 1) by bisection."""
        low, high = torch.full_like(probability, -20), torch.full_like(probability, 20)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.cumulative(middle, theta) < probability
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return low


def gaussian(mean: float, std: float) -> Mixture:
    return Mixture([1.0], [mean], [std])


TWO_BUMPS = Mixture([0.35, 0.65], [-0.6, 0.8], [0.7, 0.4])


def even_quantiles(count: int) -> Tensor:
    """Quantiles of the standard Gaussian at equal parts of its mass: (count, 1)."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64)[:, None] + 0.5) / count)


def shuffled(noise: Tensor, seed: int = 0) -> Callable[[int], Tensor]:
    """Fresh noise: the same values in another random order, which has less variance than Gaussian draws."""
    generator = torch.Generator().manual_seed(seed)
    return lambda number: noise[torch.randperm(len(noise), generator=generator)]


def error(sampler: Sampler, data: Mixture = TWO_BUMPS) -> float:
    """Mean distance of the end points of NOISE from those of the flow."""
    exact = data.quantile(torch.special.ndtr(NOISE))
    return (sampler.sample(data.velocity, NOISE) - exact).abs().mean().item()


def order(steps: list[int], errors: list[float]) -> float:
    """Minus the slope of log error against log steps, by least squares."""
    x, y = torch.tensor(steps).double().log(), torch.tensor(errors).double().log()
    return -((x - x.mean()) @ y / (x - x.mean()).square().sum()).item()


def test_the_optimal_velocity_is_the_regression_on_the_noisy_value() -> None:
    """Guards the closed form above by least squares on a large sample."""
    generator, theta = torch.Generator().manual_seed(0), 1.1
    eps = torch.randn(2, 200_000, 1, generator=generator, dtype=torch.float64)
    component = torch.multinomial(torch.tensor(TWO_BUMPS.weights), 200_000, replacement=True, generator=generator)
    means, stds = (torch.tensor(values, dtype=torch.float64)[component, None] for values in TWO_BUMPS[1:])
    x0 = means + stds * eps[1]
    noisy = math.cos(theta) * x0 + math.sin(theta) * eps[0]
    velocity = -math.sin(theta) * x0 + math.cos(theta) * eps[0]
    residual = velocity - TWO_BUMPS.velocity(noisy, torch.tensor([theta], dtype=torch.float64))
    for feature in (torch.ones_like(noisy), noisy, noisy**2, (3 * noisy).tanh()):
        assert abs((residual * feature).mean().item()) < 0.01


# What is exact.


@pytest.mark.parametrize("schedule", [*SCHEDULES, LINEAR])
def test_tangent_steps_reproduce_unit_gaussian_data_exactly(schedule: NoiseSchedule) -> None:
    for steps in (1, 25):
        assert torch.equal(TangentSampler(steps, schedule).sample(gaussian(0, 1).velocity, NOISE), NOISE)


def test_tangent_steps_integrate_a_constant_velocity_exactly() -> None:
    sampled = TangentSampler(4, SCHEDULES[1]).sample(lambda noisy, theta: 0 * noisy + 0.7, NOISE)
    torch.testing.assert_close(sampled, NOISE - 0.7 * math.pi / 2, rtol=0, atol=1e-14)


def test_rotation_steps_shrink_unit_gaussian_data_by_a_known_factor() -> None:
    for steps in (1, 2, 4, 25):
        factor = math.cos(math.pi / (2 * steps)) ** steps
        sampled = RotationSampler(steps).sample(gaussian(0, 1).velocity, NOISE)
        torch.testing.assert_close(sampled, factor * NOISE, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", ["rotation", "dpm2m", "stochastic"])
def test_certain_data_are_reproduced_exactly(name: str) -> None:
    for steps in (1, 2, 3, 25):
        for schedule in (*SCHEDULES, LINEAR):
            sampler = make_sampler(name, steps, schedule)
            sampled = sampler.sample(gaussian(1.7, 0).velocity, NOISE, shuffled(NOISE))
            torch.testing.assert_close(sampled, torch.full_like(NOISE, 1.7), rtol=0, atol=1e-13)


def test_dpm2m_with_up_to_three_steps_is_the_rotation() -> None:
    for steps in (1, 2, 3):
        expected = RotationSampler(steps).sample(TWO_BUMPS.velocity, NOISE)
        sampled = DPMSolver2M(steps).sample(TWO_BUMPS.velocity, NOISE)
        torch.testing.assert_close(sampled, expected, rtol=0, atol=1e-14)


def test_the_stochastic_sampler_without_fresh_noise_is_the_rotation() -> None:
    expected = RotationSampler(9, SCHEDULES[1]).sample(TWO_BUMPS.velocity, NOISE)
    assert torch.equal(StochasticSampler(9, SCHEDULES[1], eta=0).sample(TWO_BUMPS.velocity, NOISE), expected)


@pytest.mark.parametrize("theta", [0.4, math.pi / 2])
def test_an_ancestral_step_is_the_posterior_of_the_forward_process(theta: float) -> None:
    """Given x0 = m, noisy at theta is rho times noisy at theta' < theta plus independent noise, rho = cos / cos'. So
    the two have covariance rho sin'^2, and conditioning one Gaussian on the other gives

        mean m cos' + rho sin'^2 / sin^2 (noisy - m cos), variance sin'^2 - rho^2 sin'^4 / sin^2.
    """
    m, following = 1.7, 0.3
    cos, sin, cos_after, sin_after = math.cos(theta), math.sin(theta), math.cos(following), math.sin(following)
    rho = cos / cos_after
    mean = m * cos_after + rho * sin_after**2 / sin**2 * (NOISE - m * cos)
    std = math.sqrt(sin_after**2 - rho**2 * sin_after**4 / sin**2)
    step = [
        StochasticSampler().integrate(gaussian(m, 0).velocity, NOISE, [theta, following], lambda _, z=z: z + 0 * NOISE)
        for z in (torch.tensor(0.0), torch.tensor(1.0))
    ]
    torch.testing.assert_close(step[0], mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(step[1], mean + std, rtol=0, atol=1e-14)


# How fast the rest converges.


# A narrow Gaussian, a wide one, and two, over either schedule.
PROBLEMS = pytest.mark.parametrize(
    ("data", "schedule"),
    [(gaussian(1.3, 0.3), SCHEDULES[0]), (gaussian(-0.7, 1.8), SCHEDULES[1]), (TWO_BUMPS, SCHEDULES[1])],
)


@pytest.mark.parametrize(("name", "limit"), [("rotation", 1e-2), ("tangent", 1e-2), ("adams", 1e-4), ("dpm2m", 1e-3)])
def test_the_flow_from_the_first_angle_of_the_linear_schedule(name: str, limit: float) -> None:
    sampler = make_sampler(name, 512, LINEAR)
    exact = TWO_BUMPS.quantile(TWO_BUMPS.cumulative(NOISE, sampler.angles(torch.float64)[0].item()))
    assert (sampler.sample(TWO_BUMPS.velocity, NOISE) - exact).abs().mean() < limit


@PROBLEMS
@pytest.mark.parametrize("name", ["rotation", "tangent"])
def test_rotation_and_tangent_are_of_first_order(name: str, data: Mixture, schedule: NoiseSchedule) -> None:
    steps = [16, 32, 64, 128, 256]
    errors = [error(make_sampler(name, count, schedule), data) for count in steps]
    assert errors[-1] > 1e-5
    assert abs(order(steps, errors) - 1) < 0.1


@PROBLEMS
def test_adams_is_of_second_order(data: Mixture, schedule: NoiseSchedule) -> None:
    steps = [32, 64, 128, 256]
    errors = [error(AdamsSampler(count, schedule), data) for count in steps]
    assert abs(order(steps, errors) - 2) < 0.15


def test_adams_is_exact_for_a_velocity_linear_in_theta() -> None:
    """For all step sizes, except for its first step, which is Euler's: the integral of theta is known."""
    angles = [1.5, 1.4, 1.1, 0.3, 0.0]
    end = AdamsSampler().integrate(lambda x, theta: theta[:, None].expand_as(x), NOISE, angles)
    first = (1.5 - 1.4) * 1.5
    torch.testing.assert_close(end, NOISE - first - 1.4**2 / 2, rtol=0, atol=1e-14)


@pytest.mark.parametrize("data", [gaussian(-0.7, 1.8), TWO_BUMPS])
def test_dpm2m_is_of_second_order_over_even_steps_in_lambda(data: Mixture) -> None:
    """Where the paper proves it, between two angles of finite lambda."""
    first, last = 1.5, 0.1
    start = data.quantile(torch.special.ndtr(NOISE), first)
    exact = data.quantile(torch.special.ndtr(NOISE), last)
    steps, errors = [16, 32, 64, 128, 256], []
    for count in steps:
        tangents = torch.logspace(
            math.log2(math.tan(first)), math.log2(math.tan(last)), count + 1, 2, dtype=torch.float64
        )
        end = DPMSolver2M().integrate(data.velocity, start, tangents.atan().tolist())
        errors.append((end - exact).abs().mean().item())
    assert abs(order(steps, errors) - 2) < 0.15


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_error_of_dpm2m_is_a_logarithm_over_the_square_of_the_steps(schedule: NoiseSchedule) -> None:
    """Each doubling then adds the same to steps^2 error."""
    scaled = [steps**2 * error(DPMSolver2M(steps, schedule)) for steps in (256, 512, 1024)]
    assert (scaled[2] - scaled[1]) / (scaled[1] - scaled[0]) == pytest.approx(1, abs=0.1)


def test_dpm2m_in_10_steps_is_closer_than_rotation_in_25() -> None:
    assert error(DPMSolver2M(10)) < error(RotationSampler(25))


def test_adams_in_8_steps_is_closer_than_rotation_in_25() -> None:
    assert error(AdamsSampler(8)) < error(RotationSampler(25))


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_have_the_distribution_of_the_data(name: str) -> None:
    noise = even_quantiles(5000)
    exact = TWO_BUMPS.quantile(torch.special.ndtr(noise))
    for steps in (4, 8, 25, 50):
        sampled = make_sampler(name, steps, NoiseSchedule()).sample(TWO_BUMPS.velocity, noise, shuffled(noise))
        assert (sampled.sort(0).values - exact).abs().mean() < 2 / steps


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_stochastic_samples_converge_in_distribution_at_first_order(eta: float) -> None:
    """By the distance between sorted samples and quantiles, on average (Wasserstein's)."""
    noise = even_quantiles(40_000)
    exact = TWO_BUMPS.quantile(torch.special.ndtr(noise))
    errors = []
    for steps in (16, 64):
        sampled = StochasticSampler(steps, eta=eta).sample(TWO_BUMPS.velocity, noise, shuffled(noise))
        errors.append((sampled.sort(0).values - exact).abs().mean().item())
    assert abs(order([16, 64], errors) - 1) < 0.25


@pytest.mark.parametrize(("eta", "mean", "std"), [(0.5, 1.3, 0.3), (1.0, -0.7, 1.8)])
def test_stochastic_samples_of_gaussian_data_have_the_mean_and_a_spread_of_first_order(
    eta: float, mean: float, std: float
) -> None:
    """The sample is linear in all the noise it is given. Clip 0 gets none, each other clip a unit of one of the draws:
    clip 0 is the mean, and the squares of what the others add to it sum to the variance, with nothing left to chance.
    """
    steps, errors = [256, 512, 1024], []
    for count in steps:
        units = torch.eye(count + 1, dtype=torch.float64)[:, 1:, None]
        sampled = StochasticSampler(count, eta=eta).sample(
            gaussian(mean, std).velocity, units[:, 0], lambda number, units=units: units[:, number + 1]
        )
        assert sampled[0].item() == pytest.approx(mean, abs=1e-12)
        errors.append(abs((sampled[1:] - sampled[0]).norm().item() - std))
    assert errors[-1] > 1e-5
    assert abs(order(steps, errors) - 1) < 0.1


# Against diffusers.


@pytest.mark.parametrize("steps", [3, 14, 15])  # below 15, diffusers' last step is of first order
def test_dpm2m_agrees_with_diffusers_step_by_step(steps: int) -> None:
    """On its angles, of which the first lies below pi/2. Its arithmetic is in float32."""
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        prediction_type="v_prediction",
        lower_order_final=True,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(steps)
    angles = scheduler.sigmas.double().atan().tolist()
    assert angles[0] < math.pi / 2
    x = NOISE
    for step, timestep in enumerate(scheduler.timesteps):
        velocity = TWO_BUMPS.velocity(x, torch.full((len(x),), angles[step], dtype=torch.float64))
        x = scheduler.step(velocity, timestep, x).prev_sample
        ours = DPMSolver2M().integrate(TWO_BUMPS.velocity, NOISE, angles[: step + 2])
        torch.testing.assert_close(ours, x, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("steps", "eta"), [(10, 0.3), (50, 1.0)])
def test_stochastic_steps_agree_with_diffusers(steps: int, eta: float) -> None:
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(steps)
    angles = [*scheduler.alphas_cumprod[scheduler.timesteps].sqrt().acos().tolist(), 0.0]
    fresh = torch.randn(steps, *NOISE.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = NOISE
    for theta, timestep, noise in zip(angles, scheduler.timesteps, fresh, strict=False):
        velocity = TWO_BUMPS.velocity(x, torch.full((len(x),), theta, dtype=torch.float64))
        x = scheduler.step(velocity, timestep, x, eta, variance_noise=noise).prev_sample
    ours = StochasticSampler(eta=eta).integrate(TWO_BUMPS.velocity, NOISE, angles, fresh.__getitem__)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-10)


ALPHA_BARS = (1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)).cumprod(0)


def noise_in(noisy: Tensor, theta: Tensor) -> Tensor:
    """An untrained network's epsilon, which depends on the angle and is not linear."""
    theta = theta[:, None]
    return (1.3 * noisy + 0.4 * (3 * theta).cos()).tanh() * (1 + theta.sin()) + 0.1 * (2 * noisy).cos()


def implied_velocity(noisy: Tensor, theta: Tensor) -> Tensor:
    return velocity_of(noise_in(noisy, theta), noisy, theta, "epsilon")


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_epsilon_with_the_linear_schedule_agrees_with_ddim_at_every_step(steps: int) -> None:
    """DDPM's schedule from its strongest noise, cos(theta) = 0.0064, where x0 is 157 times an error of epsilon."""
    scheduler = DDIMScheduler(
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=2e-2,
        timestep_spacing="trailing",
        steps_offset=0,
        set_alpha_to_one=True,
        clip_sample=False,
        prediction_type="epsilon",
    )
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = ALPHA_BARS, torch.ones((), dtype=torch.float64)
    scheduler.set_timesteps(steps)
    angles = RotationSampler(steps, LINEAR).angles(torch.float64)
    assert angles[0].cos().item() == pytest.approx(0.00635, rel=1e-2)
    x = NOISE
    for step, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(noise_in(x, angles[step].expand(len(x))), timestep, x).prev_sample
        ours = RotationSampler(steps, LINEAR).integrate(implied_velocity, NOISE, angles[: step + 2].tolist())
        torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-10)
    assert torch.equal(ours, RotationSampler(steps, LINEAR).sample(implied_velocity, NOISE))


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_epsilon_with_the_linear_schedule_agrees_with_dpm_solver_at_every_step(steps: int) -> None:
    """In float64: the methods of the updates are called, since `step` itself rounds the sample to float32."""
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=2e-2,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        timestep_spacing="trailing",
        final_sigmas_type="zero",
        prediction_type="epsilon",
    )
    scheduler.set_timesteps(steps)
    sigmas = ((1 - ALPHA_BARS) / ALPHA_BARS).sqrt()[scheduler.timesteps]
    torch.testing.assert_close(scheduler.sigmas[:-1].double(), sigmas, rtol=1e-4, atol=0)
    scheduler.sigmas = torch.cat((sigmas, sigmas.new_zeros(1)))
    angles = DPMSolver2M(steps, LINEAR).angles(torch.float64)
    x, x0s = NOISE, list[Tensor]()
    for step in range(steps):
        scheduler._step_index = step
        epsilon = noise_in(x, angles[step].expand(len(x)))
        x0s.append(scheduler.convert_model_output(epsilon, sample=x))
        if step in (0, steps - 1):
            x = scheduler.dpm_solver_first_order_update(x0s[-1], sample=x)
        else:
            x = scheduler.multistep_dpm_solver_second_order_update(x0s[-2:], sample=x)
        ours = DPMSolver2M(steps, LINEAR).integrate(implied_velocity, NOISE, angles[: step + 2].tolist())
        torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-10)
    assert torch.equal(ours, DPMSolver2M(steps, LINEAR).sample(implied_velocity, NOISE))


# The interface.


def test_angles_decrease_from_pure_noise_to_clean_by_the_schedule() -> None:
    for schedule in SCHEDULES:
        sampler = RotationSampler(steps=8, schedule=schedule)
        angles = sampler.angles(torch.float64)
        assert angles.shape == (9,)
        assert angles[0] == math.pi / 2
        assert angles[-1] == 0
        torch.testing.assert_close(angles, schedule.theta(1 - torch.arange(9, dtype=torch.float64) / 8))
        assert sampler.angles().dtype == torch.float32


def test_float64_stays_on_the_cpu_whatever_the_default_device_is() -> None:
    """MPS has no float64. Values on the meta device, taken for another default device, could not be read."""
    with torch.device("meta"):
        assert RotationSampler().angles(torch.float64).tolist()[0] == math.pi / 2
        assert Guidance(most_level=0.5).applies_at(0.3, NoiseSchedule())


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_network_is_called_once_per_step_with_one_precise_angle_per_clip(name: str) -> None:
    sampler = make_sampler(name, 5, NoiseSchedule())
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        thetas: list[Tensor] = []

        def velocity(noisy: Tensor, theta: Tensor, dtype: torch.dtype = dtype, thetas: list = thetas) -> Tensor:
            assert theta.shape == (2,)
            assert noisy.dtype == dtype
            thetas.append(theta)
            return torch.zeros_like(noisy, dtype=torch.float32)

        noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
        sampled = sampler.sample(velocity, noise, lambda number: torch.zeros(2, 3, 4, 4))
        assert sampled.dtype == dtype
        assert sampled.shape == noise.shape
        angles = sampler.angles(torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(torch.stack(thetas), angles[:-1, None].expand(5, 2))


def test_only_the_stochastic_sampler_uses_fresh_noise_once_per_step_but_the_last() -> None:
    for name in SAMPLERS:
        steps: list[int] = []

        def fresh_noise(number: int, steps: list = steps) -> Tensor:
            steps.append(number)
            return torch.zeros_like(NOISE)

        make_sampler(name, 4, NoiseSchedule()).sample(TWO_BUMPS.velocity, NOISE, fresh_noise)
        assert steps == ([0, 1, 2] if name == "stochastic" else []), name


def test_samplers_are_made_by_name() -> None:
    assert make_sampler("rotation", 25, NoiseSchedule()) == RotationSampler()
    assert make_sampler("dpm2m", 7, NoiseSchedule(shift=2)) == DPMSolver2M(steps=7, schedule=NoiseSchedule(shift=2))


@dataclass(frozen=True)
class OneJump(Sampler):
    """A custom sampler: the implied x0 at the first angle, for every number of steps."""

    def solve(self, velocity: VelocityAt, x: Tensor, angles: Sequence[float], fresh: FreshNoise | None) -> Tensor:
        return math.cos(angles[0]) * x - math.sin(angles[0]) * velocity(x, angles[0])


def test_a_custom_sampler_by_its_import_path_and_by_a_registered_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "SAMPLERS", dict(SAMPLERS))
    register_sampler("one_jump", OneJump)
    for name in ("one_jump", f"{OneJump.__module__}.OneJump"):
        sampler = make_sampler(name, 3, SCHEDULES[1])
        assert isinstance(sampler, OneJump)
        expected = RotationSampler(1).sample(TWO_BUMPS.velocity, NOISE)
        torch.testing.assert_close(sampler.sample(TWO_BUMPS.velocity, NOISE), expected)


class WithoutSolve(Sampler):
    pass


@dataclass(frozen=True, kw_only=True)
class WithRequiredField(OneJump):
    order: int


def sampler_returning(function: Callable[..., Any]) -> Sampler:
    """A custom sampler whose `solve` is a function of velocity, x, angles and fresh."""
    return type("Faulty", (Sampler,), {"solve": lambda self, *arguments: function(*arguments)})()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda velocity, x, angles, fresh: None, r"returns NoneType for noise of torch.float64 \(11, 1\) on cpu"),
        (lambda velocity, x, angles, fresh: x[:5], r"returns torch.float64 \(5, 1\) on cpu for noise of"),
        (lambda velocity, x, angles, fresh: x.float(), r"returns torch.float32 \(11, 1\)"),
        (lambda velocity, x, angles, fresh: x.to("meta"), r"returns .* on meta for"),
        (lambda velocity, x, angles: x, r"failed \(TypeError: .*takes 3 .*\): its method solve"),
        (lambda velocity, x, angles, fresh: x / len(0), r"failed \(TypeError: .*fresh\(step number\) is noise"),
        (lambda velocity, x, angles, fresh: velocity(x[:5], 1.0), r"x of shape \(5, 1\): keep the shape \(11, 1\)"),
    ],
)
def test_faults_of_a_custom_sampler_are_reported_with_its_import_path(function: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"^sampler '\S*Faulty' .*{message}"):
        sampler_returning(function).sample(TWO_BUMPS.velocity, NOISE, shuffled(NOISE))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: make_sampler(f"{__name__}.WithoutSolve", 5, NoiseSchedule()),
            "does not define solve, which",
        ),
        (lambda: register_sampler("mine", WithoutSolve), "sampler 'mine' does not define solve"),
        (lambda: register_sampler("mine", OneJump()), "sampler 'mine' is not a subclass of .*Sampler"),  # type: ignore[arg-type]
        (
            lambda: make_sampler(f"{__name__}.WithRequiredField", 5, NoiseSchedule()),
            "WithRequiredField' failed .*'order'.* give its other fields defaults",
        ),
        (lambda: RotationSampler(steps=0), "number of sampler steps is 0"),
        (lambda: StochasticSampler(steps=-3), "number of sampler steps is -3"),
        (lambda: make_sampler("heun", 5, NoiseSchedule()), "'heun' is not known: choose one of rotation, tangent"),
        (lambda: make_sampler("math.tan", 5, NoiseSchedule()), "'math.tan' is not a subclass of .*Sampler"),
        (lambda: register_sampler("adams", OneJump), "sampler 'adams' is built in"),
        (lambda: StochasticSampler(eta=1.1), "eta is 1.1; choose it from 0"),
        (lambda: StochasticSampler(eta=-0.1), "eta is -0.1"),
        (lambda: RotationSampler().sample(lambda x, _: x[:1], NOISE), r"velocity has shape \(1, 1\)"),
        (lambda: StochasticSampler().sample(TWO_BUMPS.velocity, NOISE), "give fresh_noise"),
    ],
)
def test_invalid_samplers_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
