"""From what networks see in videos to scores; torchmetrics where it has them."""

import warnings
from collections.abc import Iterator, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from gpdit_lightning.errors import InputError

MAX_PSNR = 100.0
"""PSNR of two frames that are equal, so that means stay finite; one level in one value at 256x256 makes 101."""
SSIM_WINDOW = 11
"""Side in pixels of SSIM's Gaussian window, sigma 1.5 (Wang et al., 2004)."""
MOST_DISTANCES = 2**24  # that are in memory at a time, 128 MiB


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, as over seeds; there is no deviation of one value."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def frechet_distance(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> float:
    """Squared Frechet distance of two Gaussians: |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1^1/2 S2 S1^1/2)^1/2).

    Exact for singular covariances too: with S = F F^T, the last trace is the nuclear norm of F1^T F2. Other ways take
    the roots of eigenvalues that are zero up to rounding, which makes 1e-16 a 1e-8, once for each missing dimension. Of
    50 samples in 1024 dimensions, at a distance of 1771, `torchmetrics` 1.9 is wrong by 1.5e-4, the roots of
    S1^1/2 S2 S1^1/2 by 7e-5, and this by 5e-13.

    Args:
        mean_1, mean_2: (d,).
        cov_1, cov_2: (d, d), symmetric.

    Raises:
        InputError: values that are not finite.
    """
    return _distance(_Gaussian.of(mean_1, cov_1), _Gaussian.of(mean_2, cov_2))


class _Gaussian(NamedTuple):
    """A mean (d,), and F (d, r) with F F^T = covariance, of rank r; float64."""

    mean: Tensor
    factor: Tensor

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor) -> Self:
        mean, covariance = mean.double(), covariance.double()
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise InputError(
                "features hold values that are not finite: check the weights and precision of the networks."
            )
        values, vectors = torch.linalg.eigh(covariance)
        seen = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        return cls(mean, vectors[:, seen] * values[seen].sqrt())


def _distance(first: _Gaussian, second: _Gaussian) -> float:
    shared = torch.linalg.matrix_norm(first.factor.T @ second.factor, "nuc")
    traces = first.factor.square().sum() + second.factor.square().sum()
    return max(0.0, ((first.mean - second.mean).square().sum() + traces - 2 * shared).item())


class _AsGiven(nn.Identity):
    """Stands where torchmetrics has the network, since what comes in are its features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


class FrechetDistance(FrechetInceptionDistance):
    """FID (Heusel et al., 2017) or FVD (Unterthiner et al., 2019) of features, in float64.

    `update(features (N, d), real=True)` adds to sums that make up mean and covariance in one pass; those of other
    processes add up to the same. `compute()` gives the distance in the precise way of :func:`frechet_distance`.

    Args:
        dimensions: d.
        options: of torchmetrics, as `reset_real_features=False` for one truth and several others.
    """

    def __init__(self, dimensions: int, **options: Any) -> None:
        super().__init__(_AsGiven(dimensions), **options)
        self._truth: _Gaussian | None = None  # one truth may serve several others

    def update(self, imgs: Tensor, real: bool) -> None:
        """Add features (N, d) to those of the truth or of the others."""
        if real:
            self._truth = None
        super().update(imgs, real)

    def reset(self) -> None:
        """Forget the others, and the truth unless `reset_real_features=False`."""
        if self.reset_real_features:
            self._truth = None
        super().reset()

    def compute(self) -> Tensor:
        """The distance, float64 ().

        Raises:
            InputError: fewer than two samples on a side, or features that are not finite.
        """
        self._truth = self._truth or self._gaussian("real")
        return torch.tensor(_distance(self._truth, self._gaussian("fake")), dtype=torch.float64)

    def _gaussian(self, side: str) -> _Gaussian:
        count = int(getattr(self, f"{side}_features_num_samples"))
        if count < 2:
            raise InputError(f"too few samples for a Frechet distance ({count}): evaluate on at least two videos.")
        mean = getattr(self, f"{side}_features_sum") / count
        squares = getattr(self, f"{side}_features_cov_sum")
        return _Gaussian.of(mean, (squares - count * mean.outer(mean)) / (count - 1))


def fewest_samples(dimensions: int) -> int:
    """Samples from which on a covariance can have full rank."""
    return dimensions + 1


def bias_warning(score: str, samples: int, dimensions: int) -> str | None:
    """A sentence where samples are fewer than a Frechet distance deserves."""
    if samples >= fewest_samples(dimensions):
        return None
    return (
        f"{score} is of {samples:,} samples in {dimensions:,} dimensions: fewer than {fewest_samples(dimensions):,} "
        "make it much too large, so compare it with scores of as many samples only."
    )


def inception_score(probabilities: Tensor, splits: int = 10, seed: int = 0) -> tuple[float, float | None]:
    """Inception Score (Salimans et al., 2016): exp of the mean KL from each sample's classes to those of all.

    Args:
        probabilities: (N, k), of each class.
        splits: equal parts of the samples, drawn at random, that are scored alone.
        seed: of the draw.

    Returns:
        Mean and sample standard deviation over the parts.

    Raises:
        InputError: fewer samples than parts.
    """
    if not 1 <= splits <= len(probabilities):
        raise InputError(
            f"too few samples for an Inception Score ({len(probabilities)} in {splits} parts): evaluate on more videos."
        )
    logits = probabilities.double().cpu().clamp(min=torch.finfo(torch.float64).tiny).log()  # 0 log 0 is 0
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.default_generator.manual_seed(seed)  # torchmetrics shuffles, and with it go the last digits
        warnings.simplefilter("ignore")  # features are kept in memory; one part has no deviation
        # Its own `splits` come out unequal: 11 samples in 10 parts would be 6 parts.
        return mean_and_deviation([_score_of_part(part) for part in logits[order].tensor_split(splits)])


def _score_of_part(logits: Tensor) -> float:
    metric = InceptionScore(nn.Identity(), splits=1)
    metric.update(logits)
    return metric.compute()[0].item()


def psnr(videos: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB: the mean over a video's frames of each one's, at most `MAX_PSNR`.

    Args:
        videos, truth: uint8 (B, T, 3, H, W).

    Returns:
        float32 (B,).

    Raises:
        InputError: shapes that differ.
    """
    _check_shapes(videos, truth)
    # One video at a time, so that its score is the same to the last bit in any company.
    return torch.stack(
        [
            peak_signal_noise_ratio(video.double(), true.double(), data_range=255.0, reduction="none", dim=(1, 2, 3))
            .clamp(max=MAX_PSNR)
            .mean()
            .float()
            for video, true in zip(videos, truth, strict=True)
        ]
    )


def ssim(videos: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity (Wang et al., 2004): the mean over frames, colours and places where the window fits.

    Args:
        videos, truth: uint8 (B, T, 3, H, W).

    Returns:
        float32 (B,).

    Raises:
        InputError: shapes that differ, or frames smaller than `SSIM_WINDOW`.
    """
    _check_shapes(videos, truth)
    height, width = truth.shape[-2:]
    if min(height, width) < SSIM_WINDOW:
        raise InputError(
            f"SSIM's window does not fit into frames of {height}x{width}: take a size from {SSIM_WINDOW}x{SSIM_WINDOW}."
        )
    margin = SSIM_WINDOW // 2
    scores = []
    for video, true in zip(videos, truth, strict=True):
        # All frames as the channels of one picture, which takes a twentieth of the time on a CPU.
        picture, true_picture = (clip.flatten(0, 1)[None].float() for clip in (video, true))
        _, places = structural_similarity_index_measure(picture, true_picture, data_range=255.0, return_full_image=True)
        # Without the edges, which torchmetrics makes up by reflection.
        scores.append(places[..., margin:-margin, margin:-margin].mean())
    return torch.stack(scores)


def _check_shapes(videos: Tensor, truth: Tensor) -> None:
    if videos.shape != truth.shape:
        raise InputError(
            f"videos of shape {tuple(videos.shape)} cannot be compared with a truth of {tuple(truth.shape)}: bring "
            "them to one size and length."
        )


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., 2019), which ACDiT reports in its Table 2.

    A set covers the balls around its samples that reach to their k-th nearest neighbours in the set. Precision is the
    share of generated samples that the real ones cover, recall that of real samples that the generated ones cover.

    Args:
        real: (N, d) features.
        generated: (M, d).
        neighbours: k.

    Raises:
        InputError: a set with no k-th neighbour.
    """
    fewest = min(len(real), len(generated))
    if fewest <= neighbours:
        raise InputError(
            f"too few samples for precision and recall ({fewest} with {neighbours} neighbours): evaluate on at least "
            f"{neighbours + 1}."
        )
    centre = real.double().mean(dim=0)  # which leaves more digits to the distances
    real, generated = real.double() - centre, generated.double() - centre
    return _covered(generated, real, neighbours), _covered(real, generated, neighbours)


def _covered(samples: Tensor, by: Tensor, neighbours: int) -> float:
    """The share of `samples` that the set `by` covers."""
    radii = torch.cat([rows.kthvalue(neighbours + 1, dim=1).values for rows in _distances(by, by)])  # 1 is itself
    # Rounding makes about 1e-8 of a distance of zero, and equal samples, as of a still video, have radii of zero.
    radii += 1e-6 * by.norm(dim=1).max()
    return sum(int((rows <= radii).any(dim=1).sum()) for rows in _distances(samples, by)) / len(samples)


def _distances(samples: Tensor, others: Tensor) -> Iterator[Tensor]:
    """(rows, M) at a time. By products of matrices, nine times faster than by differences."""
    for rows in samples.split(max(1, MOST_DISTANCES // len(others))):
        yield torch.cdist(rows, others, compute_mode="use_mm_for_euclid_dist")
