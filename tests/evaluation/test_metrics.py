"""Metrics compared with their definitions, SciPy and torchmetrics."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance

from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.metrics import (
    MAX_PSNR,
    FrechetDistance,
    bias_warning,
    frechet_distance,
    frechet_distance_of_features,
    inception_score,
    mean_and_deviation,
    mean_squared_error,
    precision_recall,
    psnr,
    ssim,
)


def features(samples: int, dimensions: int, seed: int, offset: float = 0.0) -> Tensor:
    """Return float64 features, skewed and correlated like real ones, at scales from 0.01 to 3."""
    normal = torch.randn(samples, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normal.cumsum(dim=1).abs() * torch.linspace(0.01, 3, dimensions) / dimensions**0.5 + offset


def mean_and_covariance(samples: Tensor) -> tuple[Tensor, Tensor]:
    return samples.mean(dim=0), samples.T.cov()


def distance_of_samples(one: Tensor, other: Tensor) -> float:
    """Return the Frechet distance without matrix roots: tr (S1 S2)^1/2 is the nuclear norm of X1 X2^T."""
    x, y = ((each - each.mean(dim=0)) / math.sqrt(len(each) - 1) for each in (one, other))
    shared = torch.linalg.svdvals(x @ y.T).sum()
    means = (one.mean(dim=0) - other.mean(dim=0)).square().sum()
    return float(means + x.square().sum() + y.square().sum() - 2 * shared)


def metric_of(real: Tensor, generated: Tensor, parts: int = 1) -> FrechetDistance:
    metric = FrechetDistance(real.shape[1])
    for is_real, samples in ((True, real), (False, generated)):
        for part in samples.tensor_split(parts):
            metric.update(part, real=is_real)
    return metric


def test_the_distance_equals_that_of_scipy() -> None:
    one, other = (
        mean_and_covariance(features(300, 20, seed=0)),
        mean_and_covariance(features(200, 20, seed=1, offset=0.3)),
    )
    root = scipy.linalg.sqrtm((one[1] @ other[1]).numpy())
    expected = (one[0] - other[0]).square().sum() + one[1].trace() + other[1].trace() - 2 * np.trace(root).real
    assert frechet_distance(*one, *other) == pytest.approx(float(expected), rel=1e-9)


def test_the_distance_of_diagonal_covariances_equals_the_closed_form() -> None:
    mean_1, mean_2 = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 3.5])
    deviation_1, deviation_2 = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.5, 3.0, 2.0])
    expected = (mean_1 - mean_2).square().sum() + (deviation_1 - deviation_2).square().sum()
    found = frechet_distance(mean_1, deviation_1.square().diag(), mean_2, deviation_2.square().diag())
    assert found == pytest.approx(float(expected), abs=1e-12)


def test_the_distance_is_exact_for_singular_covariances() -> None:
    one, other = features(40, 256, seed=0), features(60, 256, seed=1, offset=0.1)
    expected = distance_of_samples(one, other)
    assert frechet_distance(*mean_and_covariance(one), *mean_and_covariance(other)) == pytest.approx(expected, abs=1e-9)
    assert metric_of(one, other).compute().item() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("samples", [10, 2000])
def test_the_distance_of_equal_samples_is_zero(samples: int) -> None:
    one = features(samples, 100, seed=0)
    assert metric_of(one, one).compute().item() < 1e-9
    constant = torch.ones(5, 3)
    assert metric_of(constant, constant).compute().item() == 0.0


def test_the_distance_equals_that_of_torchmetrics_for_many_samples() -> None:
    one, other = features(500, 16, seed=0), features(400, 16, seed=1, offset=0.2)

    class Features(torch.nn.Identity):
        num_features = 16

    reference = FrechetInceptionDistance(Features())
    reference.update(one, real=True)
    reference.update(other, real=False)
    assert metric_of(one, other).compute().item() == pytest.approx(reference.compute().item(), rel=1e-8)


def test_updates_in_parts_and_merged_states_give_the_same_distance() -> None:
    one, other = features(70, 32, seed=0), features(90, 32, seed=1)
    whole = metric_of(one, other).compute().item()
    assert metric_of(one, other, parts=7).compute().item() == pytest.approx(whole, rel=1e-10)
    first, second = metric_of(one[:20], other[:60]), metric_of(one[20:], other[60:])
    first.merge_state(second)
    assert first.compute().item() == pytest.approx(whole, rel=1e-10)


def test_real_features_are_kept_for_several_comparisons() -> None:
    one, other, third = (features(30, 8, seed=seed) for seed in range(3))
    metric = FrechetDistance(8, reset_real_features=False)
    metric.update(one, real=True)
    for samples in (other, third):
        metric.update(samples, real=False)
        assert metric.compute().item() == pytest.approx(distance_of_samples(one, samples), rel=1e-9)
        metric.reset()


def test_too_few_samples_give_an_error_or_a_warning() -> None:
    with pytest.raises(InputError, match="a Frechet distance needs 2 samples"):
        metric_of(features(1, 4, seed=0), features(9, 4, seed=0)).compute()
    with pytest.raises(InputError, match="not finite"):
        metric_of(features(9, 4, seed=0) / 0, features(9, 4, seed=0)).compute()
    assert bias_warning("FVD", 401, 400) is None
    assert "FVD of 400 samples in 400 dimensions" in (bias_warning("FVD", 400, 400) or "")
    for samples in (400, 401):  # one more sample than dimensions gives full rank, as the warning assumes
        drawn = torch.randn(samples, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert (torch.linalg.matrix_rank(drawn.T.cov(), hermitian=True) == 400) == (samples == 401)


def test_the_inception_score_equals_its_definition() -> None:
    classes = F.softmax(3 * features(200, 7, seed=0), dim=1)
    classes[0] = torch.eye(7)[2]  # probability 1 for one class, 0 for the others
    mean = classes.mean(dim=0)
    divergence = torch.special.xlogy(classes, classes / mean).sum(dim=1).mean()
    score, deviation = inception_score(classes, splits=1)
    assert score == pytest.approx(float(divergence.exp()), rel=1e-12)
    assert deviation is None


def test_the_inception_score_is_between_one_and_the_number_of_classes() -> None:
    assert inception_score(torch.eye(8).repeat(4, 1), splits=1)[0] == pytest.approx(8.0)
    assert inception_score(torch.full((32, 8), 1 / 8))[0] == pytest.approx(1.0)


def test_splits_are_equal_and_leave_the_global_generator_unchanged() -> None:
    classes = F.softmax(features(25, 5, seed=0), dim=1)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = inception_score(classes, splits=10)
    assert torch.equal(torch.rand(1), expected)
    assert inception_score(classes, splits=10) == first
    assert inception_score(classes, splits=10, seed=1) != first
    assert inception_score(classes.flip(0), splits=25)[0] == pytest.approx(1.0)  # a single sample equals its mean
    with pytest.raises(InputError, match="needs at least 26 samples"):
        inception_score(classes, splits=26)


@pytest.fixture(scope="module")
def clips() -> tuple[Tensor, Tensor]:
    """Two videos and their ground truth, uint8 (2, 3, 3, 14, 17); the first frame of the second one is exact."""
    drawn = torch.Generator().manual_seed(0)
    ground_truth = torch.randint(0, 256, (2, 3, 3, 14, 17), generator=drawn, dtype=torch.uint8)
    change = torch.randint(-40, 41, ground_truth.shape, generator=drawn, dtype=torch.int16)
    videos = (ground_truth + change).clamp(0, 255).byte()
    videos[1, 0] = ground_truth[1, 0]
    return videos, ground_truth


def test_psnr_is_averaged_over_frames(clips: tuple[Tensor, Tensor]) -> None:
    videos, ground_truth = clips
    expected = []
    for video, true in zip(videos, ground_truth, strict=True):
        errors = [
            np.mean((frame.double() - other.double()).square().numpy())
            for frame, other in zip(video, true, strict=True)
        ]
        decibels = [MAX_PSNR if error == 0 else 10 * math.log10(255**2 / error) for error in errors]
        expected.append(sum(decibels) / len(decibels))
    assert psnr(videos, ground_truth).tolist() == pytest.approx(expected, rel=1e-6)
    assert psnr(ground_truth, ground_truth).tolist() == [MAX_PSNR] * 2


def ssim_of_images(x: np.ndarray, y: np.ndarray) -> float:
    """Return the SSIM of two images (H, W), window by window."""
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = (each[top : top + 11, left : left + 11] for each in (x, y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            both = (window * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            values.append(
                (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
            )
    return float(np.mean(values))


def test_ssim_equals_its_definition(clips: tuple[Tensor, Tensor]) -> None:
    videos, ground_truth = clips
    expected = [
        np.mean(
            [
                ssim_of_images(x.double().numpy(), y.double().numpy())
                for x, y in zip(video.flatten(0, 1), true.flatten(0, 1), strict=True)
            ]
        )
        for video, true in zip(videos, ground_truth, strict=True)
    ]
    assert ssim(videos, ground_truth).tolist() == pytest.approx(expected, abs=1e-5)
    assert ssim(ground_truth, ground_truth).tolist() == pytest.approx([1.0, 1.0], abs=1e-6)


def test_scores_of_a_video_are_independent_of_batch_composition(clips: tuple[Tensor, Tensor]) -> None:
    for metric in (psnr, ssim):
        assert torch.equal(metric(*clips)[1:], metric(*(clip[1:] for clip in clips)))


def test_videos_of_another_shape_or_below_the_window_are_refused(clips: tuple[Tensor, Tensor]) -> None:
    videos, ground_truth = clips
    for metric in (psnr, ssim):
        with pytest.raises(InputError, match=r"videos of shape \(2, 3, 3, 14, 16\) cannot be compared"):
            metric(videos[..., :16], ground_truth)
    with pytest.raises(InputError, match="frames are 14x10, smaller than SSIM's window"):
        ssim(videos[..., :10], ground_truth[..., :10])


def fraction_covered(samples: np.ndarray, centres: np.ndarray, neighbours: int) -> float:
    radii = [sorted(np.linalg.norm(centres - centre, axis=1))[neighbours] for centre in centres]
    hits = [
        any(np.linalg.norm(sample - centre) <= radius for centre, radius in zip(centres, radii, strict=True))
        for sample in samples
    ]
    return sum(hits) / len(hits)


@pytest.mark.parametrize("max_distances", [1, 500, 2**24])
def test_precision_and_recall_equal_their_definition(max_distances: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpdit_lightning.evaluation.metrics.MAX_DISTANCES", max_distances)
    real, generated = features(60, 6, seed=0, offset=50), features(45, 6, seed=1, offset=50.2)
    expected = (
        fraction_covered(generated.numpy(), real.numpy(), 2),
        fraction_covered(real.numpy(), generated.numpy(), 2),
    )
    assert precision_recall(real.float(), generated.float(), neighbours=2) == pytest.approx(expected, abs=1e-12)
    assert 0.1 < expected[0] < 0.9
    assert 0.1 < expected[1] < 0.9


def test_equal_samples_are_in_balls_of_radius_zero() -> None:
    still = torch.rand(3, 64, generator=torch.Generator().manual_seed(0)).repeat(5, 1) + 100
    assert precision_recall(still, still[:12]) == (1.0, 1.0)
    assert precision_recall(still, still[:12] + 0.01) == (0.0, 0.0)
    with pytest.raises(InputError, match="need 4 samples, but there are 3"):
        precision_recall(still, still[:3])


def test_mean_and_deviation_over_seeds() -> None:
    mean, deviation = mean_and_deviation([1.0, 2.0, 6.0])
    assert mean == 3.0
    assert deviation == pytest.approx(math.sqrt(7))
    assert mean_and_deviation([4.0]) == (4.0, None)


@pytest.mark.parametrize("samples", [(5, 40), (7, 9), (50, 40)])
def test_the_distance_of_features_is_that_of_their_moments(samples: tuple[int, int]) -> None:
    """With fewer samples than dimensions in both sets, one of them, or none (10 dimensions)."""
    first, second = (features(count, 10, seed=count, offset=count / 10) for count in samples)
    expected = frechet_distance(*mean_and_covariance(first), *mean_and_covariance(second))
    assert frechet_distance_of_features(first, second) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(InputError, match="needs 2 samples, but there are 1"):
        frechet_distance_of_features(first[:1], second)
    with pytest.raises(InputError, match="not finite"):
        frechet_distance_of_features(first, second * math.inf)


def test_the_mean_squared_error_is_that_of_each_video() -> None:
    truth = torch.zeros(2, 3, 3, 4, 4, dtype=torch.uint8)
    videos = truth.clone()
    videos[0, 0], videos[1] = 6, 2
    assert mean_squared_error(videos, truth).tolist() == [12, 4]
