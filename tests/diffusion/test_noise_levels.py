import math

import pytest
import torch
from diffusers import DDPMScheduler

from gpdit_lightning.diffusion import NoiseSchedule
from gpdit_lightning.errors import InputError

SHIFTS = [0.3, 1.0, 3.0, 12.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_are_exactly_clean_and_pure_noise(dtype: torch.dtype) -> None:
    for shift in SHIFTS:
        theta = NoiseSchedule(shift=shift).theta(torch.tensor([0.0, 1.0], dtype=dtype))
        assert theta.dtype == dtype
        assert theta[0] == 0
        assert theta[1] == torch.tensor(math.pi / 2, dtype=dtype)


def test_cosine_is_linear_in_the_level() -> None:
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    theta = NoiseSchedule().theta(t)
    torch.testing.assert_close(theta, t * math.pi / 2)
    torch.testing.assert_close(theta.cos().square(), (t * math.pi / 2).cos().square())  # alpha_t of the cosine schedule


def test_the_shift_multiplies_the_tangent() -> None:
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    for shift in SHIFTS:
        for name in ("cosine", "linear"):
            shifted, unshifted = NoiseSchedule(name, shift).theta(t), NoiseSchedule(name).theta(t)
            torch.testing.assert_close(shifted.tan(), shift * unshifted.tan(), rtol=1e-11, atol=0)


def test_more_noise_at_every_higher_level() -> None:
    for shift in SHIFTS:
        for name in ("cosine", "linear"):
            theta = NoiseSchedule(name, shift).theta(torch.linspace(0, 1, 1501, dtype=torch.float64))
            assert (theta.diff() > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_is_the_schedule_of_ddpm(dtype: torch.dtype) -> None:
    """Against the product of 1 - beta, from the weakest noise, where 1 - alpha-bar is small, to the strongest."""
    alpha_bar, products = 1.0, []
    for step in range(1000):
        alpha_bar *= 1 - (1e-4 + (2e-2 - 1e-4) * step / 999)
        products.append(alpha_bar)
    expected = torch.tensor(products, dtype=torch.float64).sqrt().acos()
    theta = NoiseSchedule("linear").theta((torch.arange(1, 1001, dtype=torch.float64) / 1000).to(dtype))
    assert theta.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(theta.double(), expected, rtol=tolerance, atol=0)
    assert theta[-1].cos().item() == pytest.approx(0.00635, abs=1e-5)
    diffusers = DDPMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=2e-2).alphas_cumprod
    torch.testing.assert_close(theta.double().cos().square(), diffusers.double(), rtol=1e-4, atol=1e-6)


def test_linear_between_the_steps_of_ddpm() -> None:
    linear = NoiseSchedule("linear")
    alpha_bar = linear.theta(torch.tensor([0.0, 0.001, 0.0004, 0.5, 0.501, 0.5005], dtype=torch.float64)).cos().square()
    assert linear.theta(torch.zeros(1)) == 0
    torch.testing.assert_close(alpha_bar[2], 0.6 * alpha_bar[0] + 0.4 * alpha_bar[1])
    torch.testing.assert_close(alpha_bar[5], (alpha_bar[3] + alpha_bar[4]) / 2)


def test_shapes_are_kept() -> None:
    for name in ("cosine", "linear"):
        assert NoiseSchedule(name, shift=2.0).theta(torch.rand(2, 5)).shape == (2, 5)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, 1e-300, 9e-4, 1001, 1e300, math.inf])
def test_a_shift_outside_its_bounds_is_refused(shift: float) -> None:
    with pytest.raises(InputError, match=r"give a number from 0\.001 to 1000"):
        NoiseSchedule(shift=shift)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(InputError, match="'sigmoid' is not known: choose cosine or linear"):
        NoiseSchedule(name="sigmoid")  # type: ignore[arg-type]
