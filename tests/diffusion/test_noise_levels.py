import math

import pytest
import torch

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
        shifted = NoiseSchedule(shift=shift).theta(t)
        torch.testing.assert_close(shifted.tan(), shift * NoiseSchedule().theta(t).tan(), rtol=1e-12, atol=0)


def test_more_noise_at_every_higher_level() -> None:
    for shift in SHIFTS:
        theta = NoiseSchedule(shift=shift).theta(torch.linspace(0, 1, 1001, dtype=torch.float64))
        assert (theta.diff() > 0).all()


def test_shapes_are_kept() -> None:
    assert NoiseSchedule(shift=2.0).theta(torch.rand(2, 5)).shape == (2, 5)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan])
def test_a_shift_that_is_not_positive_is_refused(shift: float) -> None:
    with pytest.raises(InputError, match="must be positive"):
        NoiseSchedule(shift=shift)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(InputError, match="'sigmoid' is not known: choose cosine"):
        NoiseSchedule(name="sigmoid")  # type: ignore[arg-type]
