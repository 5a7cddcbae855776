"""Distortions of the ground truth, and the checks of a distance."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gpdit_lightning.evaluation.metrics import FrechetDistance
from gpdit_lightning.evaluation.self_checks import (
    BLUR_LEVELS,
    NOISE_LEVELS,
    add_noise,
    assign_halves,
    check_distances,
    gaussian_blur,
)

NAMES = [f"Archery/v_Archery_g{number:02d}.avi" for number in range(400)]


@pytest.fixture(scope="module")
def videos() -> Tensor:
    """Moving grey squares on grey, uint8 (40, 2, 3, 32, 32)."""
    generator = torch.Generator().manual_seed(0)
    corners_and_sizes = torch.randint(0, 12, (40, 3), generator=generator)
    pixels = torch.full((40, 2, 3, 32, 32), 90, dtype=torch.uint8)
    for video, (top, left, size) in zip(pixels, corners_and_sizes.tolist(), strict=True):
        for shift, frame in enumerate(video):
            frame[:, top + shift : top + shift + 5 + size, left : left + 5 + size] = 200
    return pixels


def patch_features(videos: Tensor) -> Tensor:
    """Return means and deviations of 8x8 patches, (B, 32), in place of the features of a network."""
    patches = F.unfold(videos[:, 0, :1].float(), 8, stride=8)
    return torch.cat((patches.mean(dim=1), patches.std(dim=1)), dim=1)


def distance(one: Tensor, other: Tensor) -> float:
    metric = FrechetDistance(32)
    metric.update(patch_features(one), real=True)
    metric.update(patch_features(other), real=False)
    return metric.compute().item()


def test_noise_has_the_given_deviation() -> None:
    grey = torch.full((2, 4, 3, 32, 32), 128, dtype=torch.uint8)
    for level in NOISE_LEVELS:
        change = add_noise(grey, level, [1, 2]).double() - 128
        rounding = 1 / 12
        assert change.std().item() == pytest.approx(math.sqrt(level**2 + rounding), rel=0.02)
        assert abs(change.mean().item()) < 0.03 * level
    white = add_noise(torch.full_like(grey, 255), 8.0, [1, 2])
    assert white.min() > 200  # values are clamped to 8 bits and do not wrap around


def test_noise_depends_on_the_seed_but_not_on_batch_composition(videos: Tensor) -> None:
    together = add_noise(videos[:3], 16.0, [7, 8, 9])
    assert torch.equal(together[2:], add_noise(videos[2:3], 16.0, [9]))
    grey = torch.full((2, 1, 3, 16, 16), 128, dtype=torch.uint8)
    one, other = add_noise(grey, 16.0, [7, 8])
    assert not torch.equal(one, other)
    twice = add_noise(grey, 32.0, [7, 8])[0].double() - 128
    assert (twice - 2 * (one.double() - 128)).abs().max() <= 1.5  # the same noise at twice the level


@pytest.mark.parametrize("sigma", BLUR_LEVELS)
def test_a_blurred_edge_is_the_integral_of_a_gaussian(sigma: float) -> None:
    edge = torch.zeros(1, 1, 3, 40, 40, dtype=torch.uint8)
    edge[..., 20:] = 200
    for pixels in (edge, edge.mT):
        line = gaussian_blur(pixels, sigma)[0, 0, 0]
        line = line[20] if pixels is edge else line[:, 20]
        gaussian = [math.exp(-(step**2) / (2 * sigma**2)) for step in range(-100, 101)]
        expected = [200 * sum(gaussian[100 + 20 - column :]) / sum(gaussian) for column in range(40)]
        assert line.tolist() == pytest.approx(expected, abs=0.51)


def test_blur_keeps_uniform_frames_and_is_independent_of_batch_composition(videos: Tensor) -> None:
    uniform = torch.full((1, 2, 3, 8, 6), 77, dtype=torch.uint8)
    assert torch.equal(gaussian_blur(uniform, 4.0), uniform)
    assert torch.equal(gaussian_blur(videos[:5], 2.0)[3:], gaussian_blur(videos[3:5], 2.0))


def test_halves_are_about_equal_and_do_not_change_with_more_videos() -> None:
    halves = assign_halves(NAMES)
    assert set(halves) == {0, 1}
    assert 160 < sum(halves) < 240
    assert assign_halves(NAMES[100:]) == halves[100:]


def test_a_distance_between_meaningful_features_passes(videos: Tensor) -> None:
    seeds = list(range(40))
    checks = check_distances(
        distance(videos, videos),
        distance(videos[:20], videos[20:]),
        tuple((level, distance(videos, add_noise(videos, level, seeds))) for level in NOISE_LEVELS),
        tuple((sigma, distance(videos, gaussian_blur(videos, sigma))) for sigma in BLUR_LEVELS),
        videos=40,
    )
    assert checks.passed, checks.failures
    assert [level for level, _ in checks.by_distortion["noise"]] == list(NOISE_LEVELS)


RISING = ((8.0, 1.0), (16.0, 2.0), (32.0, 3.0))


@pytest.mark.parametrize(
    ("itself", "noise", "blur", "message"),
    [
        (1.0, RISING, RISING, "the distance of the ground truth to itself is 1"),
        (
            0.0,
            ((8.0, 2.0), (16.0, 1.0), (32.0, 3.0)),
            RISING,
            "the distance at noise 16 is 1, not larger than 2 at noise 8",
        ),
        (0.0, RISING, ((1.0, 1.0), (2.0, 1.0)), "the distance at blur 2 is 1, not larger than 1 at blur 1"),
        (0.0, RISING, ((1.0, 0.0),), "the distance at blur 1 is 0, not larger than 0 at blur 0"),
        (0.0, ((8.0, math.nan),), RISING, "the distance at noise 8 is nan"),
    ],
)
def test_a_distance_that_does_not_rise_fails(itself: float, noise: tuple, blur: tuple, message: str) -> None:
    checks = check_distances(itself, 10.0, noise, blur, videos=7)
    assert not checks.passed
    assert message in checks.failures[0]
    assert check_distances(1e-6, 10.0, RISING, RISING, videos=7).passed
