"""Scores of features, class probabilities and pixels, computed by torchmetrics where it provides them."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from gpdit_lightning.errors import InputError

MAX_PSNR = 100.0
"""PSNR in dB of two equal frames, which keeps means finite. A single difference of one level at 256x256 is 101 dB."""
SSIM_WINDOW = 11
"""Side in pixels of SSIM's Gaussian window, sigma 1.5 (Wang et al., 2004)."""
MAX_DISTANCES = 2**24  # distances in memory at a time, 128 MiB


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation; the deviation of a single value is None."""
    return fmean(values), stdev(values) if len(values) > 1 else None


MAX_MOMENT = 1e100  # beyond the squares of all float32 numbers, so that distances are finite
ROUNDING = 1e-3  # part of the largest covariance by which others may be inexact


def frechet_distance(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> float:
    """Return the squared Frechet distance of Gaussians: |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1^1/2 S2 S1^1/2)^1/2).

    The method is exact for singular covariances too: with S = F F^T, the last trace is the nuclear norm of F1^T F2.
    Other methods take square roots of eigenvalues that are zero up to rounding, so that 1e-16 becomes 1e-8 for each
    missing dimension. For 50 samples in 1024 dimensions, at a distance of 1771, the error of `torchmetrics` 1.9 is
    1.5e-4, the error with the roots of S1^1/2 S2 S1^1/2 is 7e-5, and the error of this method is 5e-13.

    Args:
        mean_1, mean_2: (d,), on any device.
        cov_1, cov_2: (d, d), symmetric, on any device.

    Raises:
        InputError: a value is not finite.
    """
    cov_1, mean_2, cov_2 = (moment.to(mean_1.device) for moment in (cov_1, mean_2, cov_2))
    return _distance(_Gaussian.from_moments(mean_1, cov_1), _Gaussian.from_moments(mean_2, cov_2))


def frechet_distance_of_features(first: Tensor, second: Tensor) -> float:
    """Return the squared Frechet distance of Gaussians with the moments of two sets of features.

    It is :func:`frechet_distance` up to rounding. The centred features of a set of fewer samples than dimensions are a
    factor of its covariance, so that no (d, d) matrix is decomposed.

    Args:
        first, second: (N, d) and (M, d), on any device; at least two samples each.

    Raises:
        InputError: a set has fewer than two samples, or a feature is not finite.
    """
    return _distance(*(_Gaussian.from_features(features) for features in (first, second.to(first.device))))


class _Gaussian(NamedTuple):
    """Mean (d,) and factor F (d, r) of a covariance F F^T of rank r; float64."""

    mean: Tensor
    factor: Tensor

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Tensor) -> Self:
        mean, covariance = _float64(mean), _float64(covariance)
        _check_finite(mean, covariance)
        values, vectors = torch.linalg.eigh(covariance)
        nonzero = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        return cls(mean, vectors[:, nonzero] * values[nonzero].sqrt())

    @classmethod
    def from_features(cls, features: Tensor) -> Self:
        samples, dimensions = features.shape
        _check_samples(samples)
        features = _float64(features)
        _check_finite(features)
        mean = features.mean(dim=0)
        factor = (features - mean).T / (samples - 1) ** 0.5
        return cls(mean, factor) if samples <= dimensions else cls.from_moments(mean, factor @ factor.T)


def _check_finite(*values: Tensor) -> None:
    if not all(value.isfinite().all() for value in values):
        raise InputError(
            "the features contain values that are not finite: check the weights and precision of the networks."
        )


def _check_samples(count: int) -> None:
    if count < 2:
        raise InputError(f"a Frechet distance needs 2 samples, but there are {count}: evaluate on more videos.")


def _distance(first: _Gaussian, second: _Gaussian) -> float:
    overlap = torch.linalg.matrix_norm(first.factor.T @ second.factor, "nuc")
    traces = first.factor.square().sum() + second.factor.square().sum()
    return max(0.0, ((first.mean - second.mean).square().sum() + traces - 2 * overlap).item())


class Moments(NamedTuple):
    """Mean (d,) and covariance (d, d) of features, float64, with the number of samples; None if it is unknown."""

    mean: Tensor
    covariance: Tensor
    samples: int | None = None

    @classmethod
    def of(cls, parts: Iterable[Tensor]) -> Self:
        """Return the moments of features, which are given in parts (rows, d), on one device.

        The sums are those of deviations from the mean of the first part, so that they lose no digits where the mean is
        large relative to the spread.

        Raises:
            InputError: there are fewer than two samples, or a feature is not finite.
        """
        count, shift, total, squares = 0, None, None, None
        for part in parts:
            values = _float64(part)
            shift = values.mean(dim=0) if shift is None else shift
            deviations = values - shift
            count += len(values)
            total = deviations.sum(dim=0) + (0 if total is None else total)
            squares = deviations.T @ deviations + (0 if squares is None else squares)
        _check_samples(count)
        assert shift is not None
        assert total is not None
        assert squares is not None
        mean = total / count
        moments = cls(shift + mean, (squares - count * mean.outer(mean)) / (count - 1), count)
        _check_finite(moments.mean, moments.covariance)
        return moments

    def distance(self, other: "Moments") -> float:
        """Return the squared Frechet distance of Gaussians with these moments, as :func:`frechet_distance`."""
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)


def moments_problem(mean: Tensor, covariance: Tensor) -> str:
    """Return why two tensors of a file, float64, are not the moments of features; empty if they may be.

    Args:
        mean: should be (d,).
        covariance: should be (d, d).
    """
    if mean.ndim != 1 or len(mean) < 1 or covariance.shape != (len(mean), len(mean)):
        return f"a mean {tuple(mean.shape)} and a covariance {tuple(covariance.shape)}, not (d,) and (d, d)"
    largest = covariance.abs().max()
    if not max(mean.abs().max(), largest) <= MAX_MOMENT:  # also if one is NaN
        return f"moments that are not finite or beyond {MAX_MOMENT:g}"
    if (
        covariance - covariance.T
    ).abs().max() > ROUNDING * largest or covariance.diagonal().min() < -ROUNDING * largest:
        return "a covariance that is not symmetric or has a negative variance"
    return ""


class _PrecomputedFeatures(nn.Identity):
    """Replaces the network of torchmetrics: the inputs are already features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


class FrechetDistance(FrechetInceptionDistance):
    """Metric for FID (Heusel et al., 2017) or FVD (Unterthiner et al., 2019) of given features, in float64.

    `update(features (N, d), real=True)` accumulates the sums that determine mean and covariance. `compute()` returns
    the distance by the exact method of :func:`frechet_distance`. Features may be on any device.

    Args:
        dimensions: d.
        options: of the metric of torchmetrics, such as `reset_real_features=False` for several comparisons with the
            same real features.
    """

    def __init__(self, dimensions: int, **options: Any) -> None:
        super().__init__(_PrecomputedFeatures(dimensions), **options)
        self._real: _Gaussian | None = None  # kept for further comparisons with the same real features

    def update(self, imgs: Tensor, real: bool) -> None:
        """Add features (N, d) of real or of generated samples."""
        if real:
            self._real = None
        super().update(imgs.to(self.device), real)

    def reset(self) -> None:
        """Drop the generated features, and the real ones unless `reset_real_features=False`."""
        if self.reset_real_features:
            self._real = None
        super().reset()

    def compute(self) -> Tensor:
        """Return the distance, float64 ().

        Raises:
            InputError: there are fewer than two real or two generated samples, or a feature is not finite.
        """
        self._real = self._real or self._gaussian("real")
        return torch.tensor(_distance(self._real, self._gaussian("fake")), dtype=torch.float64)

    def _gaussian(self, kind: str) -> _Gaussian:
        count = int(getattr(self, f"{kind}_features_num_samples"))
        _check_samples(count)
        mean = getattr(self, f"{kind}_features_sum") / count
        squares = getattr(self, f"{kind}_features_cov_sum")
        return _Gaussian.from_moments(mean, (squares - count * mean.outer(mean)) / (count - 1))


def bias_warning(score: str, samples: int, dimensions: int) -> str | None:
    """Return a warning about a Frechet distance of too few samples; None if the covariance can have full rank."""
    full_rank = dimensions + 1
    if samples >= full_rank:
        return None
    return (
        f"{score} of {samples:,} samples in {dimensions:,} dimensions is far too large, as for any number below "
        f"{full_rank:,}: compare it only with scores of the same number of samples."
    )


def inception_score(probabilities: Tensor, splits: int = 10, seed: int = 0) -> tuple[float, float | None]:
    """Return the Inception Score (Salimans et al., 2016).

    It is the exponential of the mean KL divergence from the class probabilities of a sample to their mean.

    Args:
        probabilities: (N, k) class probabilities.
        splits: number of random splits of equal size, each of which is scored separately.
        seed: of the random splits.

    Returns:
        Mean and sample standard deviation over the splits.

    Raises:
        InputError: there are fewer samples than splits.
    """
    if not 1 <= splits <= len(probabilities):
        raise InputError(
            f"an Inception Score in {splits} splits needs at least {splits} samples, but there are "
            f"{len(probabilities)}: evaluate on more videos."
        )
    logits = probabilities.cpu().double().clamp(min=torch.finfo(torch.float64).tiny).log()  # 0 log 0 is 0
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.default_generator.manual_seed(seed)  # torchmetrics shuffles the samples, which changes the last digits
        warnings.simplefilter("ignore")  # about features kept in memory and the deviation of a single split
        # The splits of torchmetrics are unequal: it would divide 11 samples into 6 splits instead of 10.
        return mean_and_deviation([_score_of_split(split) for split in logits[order].tensor_split(splits)])


def _score_of_split(logits: Tensor) -> float:
    metric = InceptionScore(nn.Identity(), splits=1)
    metric.update(logits)
    return metric.compute()[0].item()


def psnr(videos: Tensor, ground_truth: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB: the mean over the frames of each video, each at most `MAX_PSNR`.

    Args:
        videos, ground_truth: uint8 (B, T, 3, H, W), on any device.

    Returns:
        float32 (B,), on the device of `videos`.

    Raises:
        InputError: the shapes differ.
    """
    return _score_each(videos, ground_truth, _psnr_of_video)


def _psnr_of_video(video: Tensor, true: Tensor) -> Tensor:
    of_frames = peak_signal_noise_ratio(
        _float64(video), _float64(true), data_range=255.0, reduction="none", dim=(1, 2, 3)
    )
    return of_frames.clamp(max=MAX_PSNR).mean().float()


def mean_squared_error(videos: Tensor, ground_truth: Tensor) -> Tensor:
    """Return the mean squared error of each video in 8-bit levels; shapes and errors as for :func:`psnr`."""
    return _score_each(videos, ground_truth, lambda video, true: (video.float() - true.float()).square().mean())


def ssim(videos: Tensor, ground_truth: Tensor) -> Tensor:
    """Return the structural similarity (Wang et al., 2004), averaged over frames, colours and positions of the window.

    The window lies inside the frame at all positions. Shapes are as for :func:`psnr`.

    Raises:
        InputError: the shapes differ, or frames are smaller than `SSIM_WINDOW`.
    """
    return _score_each(videos, ground_truth, _ssim_of_video)


def _ssim_of_video(video: Tensor, true: Tensor) -> Tensor:
    height, width = true.shape[-2:]
    if min(height, width) < SSIM_WINDOW:
        raise InputError(
            f"the frames are {height}x{width}, smaller than SSIM's window: use at least {SSIM_WINDOW}x{SSIM_WINDOW}."
        )
    margin = SSIM_WINDOW // 2
    # All frames are the channels of one image, which is 20 times faster on a CPU.
    image, true_image = (clip.flatten(0, 1)[None].float() for clip in (video, true))
    _, similarity = structural_similarity_index_measure(image, true_image, data_range=255.0, return_full_image=True)
    # The edges are left out, since torchmetrics pads them by reflection.
    return similarity[..., margin:-margin, margin:-margin].mean()


def _score_each(videos: Tensor, ground_truth: Tensor, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the score of each video (T, 3, H, W) against its ground truth, on the device of the videos."""
    _check_shapes(videos, ground_truth)
    # One video at a time, so that its score is independent of batch composition to the last bit.
    pairs = zip(videos, ground_truth.to(videos.device), strict=True)
    return torch.stack([score(video, true) for video, true in pairs])


def _check_shapes(videos: Tensor, ground_truth: Tensor) -> None:
    if videos.shape != ground_truth.shape:
        raise InputError(
            f"videos of shape {tuple(videos.shape)} cannot be compared with a ground truth of shape "
            f"{tuple(ground_truth.shape)}: give both the same size and number of frames."
        )


def _float64(values: Tensor) -> Tensor:
    """Convert to float64, on the CPU if the device lacks float64 (MPS)."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Return improved precision and recall (Kynkäänniemi et al., 2019), which ACDiT reports in its Table 2.

    The manifold of a set is estimated by balls around its samples; the radius of a ball is the distance to the k-th
    nearest neighbour within the set. Precision is the fraction of generated samples in the manifold of the real ones,
    and recall is the fraction of real samples in the manifold of the generated ones.

    Args:
        real: (N, d) features, on any device.
        generated: (M, d), on any device.
        neighbours: k.

    Raises:
        InputError: a set has at most k samples.
    """
    samples = min(len(real), len(generated))
    if samples <= neighbours:
        raise InputError(
            f"precision and recall with {neighbours} neighbours need {neighbours + 1} samples, but there are "
            f"{samples}: evaluate on more videos."
        )
    real, generated = _float64(real), _float64(generated.to(real.device))
    centre = real.mean(dim=0)  # centring reduces the rounding error of the distances
    real, generated = real - centre, generated - centre
    return _fraction_covered(generated, real, neighbours), _fraction_covered(real, generated, neighbours)


def _fraction_covered(samples: Tensor, centres: Tensor, neighbours: int) -> float:
    """Return the fraction of samples in the manifold that balls around the centres estimate."""
    # Each centre is also its nearest neighbour, at distance zero, hence + 1.
    radii = torch.cat([rows.kthvalue(neighbours + 1, dim=1).values for rows in _distances(centres, centres)])
    # Rounding turns a distance of zero into about 1e-8, while the radii of equal samples (still videos) are zero.
    radii += 1e-6 * centres.norm(dim=1).max()
    covered = torch.cat([(rows <= radii).any(dim=1) for rows in _distances(samples, centres)])
    return covered.sum().item() / len(samples)


def _distances(samples: Tensor, others: Tensor) -> Iterator[Tensor]:
    """Yield distances (rows, M), some rows at a time. Matrix products are nine times faster than differences."""
    for rows in samples.split(max(1, MAX_DISTANCES // len(others))):
        yield torch.cdist(rows, others, compute_mode="use_mm_for_euclid_dist")
