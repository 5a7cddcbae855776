"""Against closed forms. For scalar data N(m, s^2), noisy = cos x0 + sin eps is Gaussian with mean m cos and variance
V = s^2 cos^2 + sin^2, and its covariance with v = -sin x0 + cos eps is (1 - s^2) sin cos, so the optimal velocity is

    E[v | noisy] = -m sin + (1 - s^2) sin cos / V (noisy - m cos).

The flow d noisy / d theta = E[v | noisy] keeps (noisy - m cos) / sqrt(V): it takes the noise u to m + s u.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gpdit_lightning.diffusion import NoiseSchedule, RotationSampler
from gpdit_lightning.errors import InputError

NOISE = torch.linspace(-2.5, 2.5, 11, dtype=torch.float64)[:, None]
RULES = ["rotation", "tangent"]


def optimal_velocity(mean: float, std: float) -> Callable[[Tensor, Tensor], Tensor]:
    def velocity(noisy: Tensor, theta: Tensor) -> Tensor:
        cos, sin = theta[:, None].cos(), theta[:, None].sin()
        variance = std**2 * cos**2 + sin**2
        return -mean * sin + (1 - std**2) * sin * cos / variance * (noisy - mean * cos)

    return velocity


def sampled(mean: float, std: float, **settings: Any) -> Tensor:
    return RotationSampler(**settings).sample(optimal_velocity(mean, std), NOISE)


def error(mean: float, std: float, **settings: Any) -> float:
    return (sampled(mean, std, **settings) - (mean + std * NOISE)).abs().max().item()


def test_the_optimal_velocity_is_the_regression_on_the_noisy_value() -> None:
    """Guards the closed form above by least squares on a large sample."""
    mean, std, theta = 0.8, 0.4, 1.1
    x0, eps = torch.randn(2, 200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0 = mean + std * x0
    noisy = math.cos(theta) * x0 + math.sin(theta) * eps
    velocity = -math.sin(theta) * x0 + math.cos(theta) * eps
    residual = velocity - optimal_velocity(mean, std)(noisy, torch.tensor([theta], dtype=torch.float64))
    assert abs(residual.mean().item()) < 0.01
    assert abs((residual * noisy).mean().item()) < 0.01


@pytest.mark.parametrize("steps", [1, 4, 25])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_tangent_steps_reproduce_unit_gaussian_data_exactly(steps: int, shift: float) -> None:
    assert torch.equal(sampled(0, 1, steps=steps, rule="tangent", schedule=NoiseSchedule(shift=shift)), NOISE)


@pytest.mark.parametrize("steps", [1, 2, 4, 25])
def test_rotation_steps_shrink_unit_gaussian_data_by_a_known_factor(steps: int) -> None:
    factor = math.cos(math.pi / (2 * steps)) ** steps
    torch.testing.assert_close(sampled(0, 1, steps=steps, rule="rotation"), factor * NOISE, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("steps", [1, 2, 3, 25])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_rotation_steps_reproduce_certain_data_exactly(steps: int, shift: float) -> None:
    assert error(1.7, 0, steps=steps, rule="rotation", schedule=NoiseSchedule(shift=shift)) < 1e-13


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.5), (1.3, 0.3), (-0.7, 1.8)])
def test_the_error_halves_when_the_steps_double(rule: str, shift: float, mean: float, std: float) -> None:
    few, many = (error(mean, std, steps=steps, rule=rule, schedule=NoiseSchedule(shift=shift)) for steps in (256, 512))
    assert few > 1e-5
    assert 1.8 < few / many < 2.2


def test_the_default_is_rotation_in_25_steps() -> None:
    assert torch.equal(sampled(0.5, 0.6), sampled(0.5, 0.6, steps=25, rule="rotation", schedule=NoiseSchedule()))


@pytest.mark.parametrize("shift", [1.0, 4.0])
def test_angles_fall_from_pure_noise_to_clean_as_the_schedule_places_them(shift: float) -> None:
    sampler = RotationSampler(steps=8, schedule=NoiseSchedule(shift=shift))
    angles = sampler.angles(torch.float64)
    assert angles.shape == (9,)
    assert angles[0] == math.pi / 2
    assert angles[-1] == 0
    torch.testing.assert_close(angles, NoiseSchedule(shift=shift).theta(1 - torch.arange(9, dtype=torch.float64) / 8))
    assert sampler.angles().dtype == torch.float32


def test_the_network_is_asked_once_per_step_with_one_angle_per_clip() -> None:
    asked: list[Tensor] = []

    def velocity(noisy: Tensor, theta: Tensor) -> Tensor:
        assert theta.shape == (2,)
        assert theta.dtype == noisy.dtype == torch.float32
        asked.append(theta)
        return torch.zeros_like(noisy)

    sampler = RotationSampler(steps=5)
    sampler.sample(velocity, torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(torch.stack(asked), sampler.angles()[:-1, None].expand(5, 2))


@pytest.mark.parametrize("steps", [0, -3])
def test_fewer_than_one_step_is_refused(steps: int) -> None:
    with pytest.raises(InputError, match=f"a sampler of {steps} steps cannot run"):
        RotationSampler(steps=steps)


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(InputError, match="'heun' is not known: choose rotation or tangent"):
        RotationSampler(rule="heun")  # type: ignore[arg-type]
