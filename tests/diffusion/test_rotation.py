import math

import pytest
import torch
from torch import Tensor

from gpdit_lightning.diffusion import rotate_back, rotate_to
from gpdit_lightning.errors import InputError


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return x0, eps


def test_values_of_the_forward_process() -> None:
    x0, eps = pair(2, 1, 1, 1)
    for angle in (0.0, 0.3, math.pi / 4, 1.2, math.pi / 2):
        sample = rotate_to(x0, eps, torch.full((2,), angle, dtype=torch.float64))
        torch.testing.assert_close(sample.noisy, math.cos(angle) * x0 + math.sin(angle) * eps, rtol=0, atol=1e-15)
        torch.testing.assert_close(sample.velocity, -math.sin(angle) * x0 + math.cos(angle) * eps, rtol=0, atol=1e-15)
        assert (sample.theta == angle).all()


def test_angle_zero_is_clean_and_a_right_angle_is_noise() -> None:
    x0, eps = pair(1, 3, 2, 2)
    clean, noise = torch.zeros(1, dtype=torch.float64), torch.full((1,), math.pi / 2, dtype=torch.float64)
    assert torch.equal(rotate_to(x0, eps, clean).noisy, x0)
    assert torch.equal(rotate_to(x0, eps, clean).velocity, eps)
    torch.testing.assert_close(rotate_to(x0, eps, noise).noisy, eps, rtol=0, atol=1e-15)
    torch.testing.assert_close(rotate_to(x0, eps, noise).velocity, -x0, rtol=0, atol=1e-15)


def test_rotation_by_theta_returns_clean_data() -> None:
    x0, eps = pair(2, 5, 3, 4, 4)
    for theta in (0.0, 0.7, math.pi / 2):
        noisy, velocity, _ = rotate_to(x0, eps, torch.full((2, 5), theta, dtype=torch.float64))
        torch.testing.assert_close(rotate_back(noisy, velocity, theta), x0, rtol=0, atol=1e-14)


def test_the_rotation_is_orthogonal() -> None:
    x0, eps = pair(2, 5, 3, 4, 4)
    noisy, velocity, _ = rotate_to(x0, eps, torch.full((2, 5), 0.7, dtype=torch.float64))
    torch.testing.assert_close(noisy.square() + velocity.square(), x0.square() + eps.square())
    # Each row has unit length and the rows are orthogonal: rotating unit vectors shows the matrix.
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    angle = torch.tensor([0.7], dtype=torch.float64)
    columns = [torch.stack(rotate_to(*unit, angle)[:2]).flatten() for unit in ((one, zero), (zero, one))]
    matrix = torch.stack(columns, dim=1)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-15)
    assert torch.linalg.det(matrix) == pytest.approx(1)


def test_two_steps_with_the_exact_velocity_are_one_step() -> None:
    x0, eps = pair(3, 2, 4, 4)
    start, first, second = 1.3, 0.4, 0.65

    def at(angle: float) -> tuple[Tensor, Tensor]:
        return rotate_to(x0, eps, torch.full((3,), angle, dtype=torch.float64))[:2]

    middle = rotate_back(*at(start), first)
    torch.testing.assert_close(middle, at(start - first)[0], rtol=0, atol=1e-14)
    twice = rotate_back(middle, at(start - first)[1], second)
    once = rotate_back(*at(start), first + second)
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-14)


def test_angles_broadcast_over_the_trailing_dimensions() -> None:
    x0, eps = pair(2, 3, 4, 4, 4)
    theta = torch.arange(6, dtype=torch.float64).reshape(2, 3) / 5
    noisy = rotate_to(x0, eps, theta).noisy
    for clip in range(2):
        torch.testing.assert_close(rotate_to(x0[clip], eps[clip], theta[clip]).noisy, noisy[clip])  # (B,) and a frame
        for frame in range(3):
            alone = rotate_to(x0[clip, frame], eps[clip, frame], theta[clip, frame]).noisy
            torch.testing.assert_close(alone, noisy[clip, frame])


def test_noise_of_another_shape_is_refused() -> None:
    x0, eps = pair(2, 3, 4, 4, 4)
    with pytest.raises(InputError, match=r"eps has shape \(1, 3, 4, 4, 4\); it must be that of x0"):
        rotate_to(x0, eps[:1], torch.zeros(2, 3))


def test_latents_keep_their_dtype() -> None:
    x0, eps = (values.to(torch.bfloat16) for values in pair(2, 1, 2, 2))
    sample = rotate_to(x0, eps, torch.tensor([0.1, 1.5], dtype=torch.float32))
    assert sample.noisy.dtype == sample.velocity.dtype == torch.bfloat16
    assert sample.theta.dtype == torch.float32
