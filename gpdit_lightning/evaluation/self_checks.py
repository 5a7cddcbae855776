"""Checks of a distance: zero from the ground truth to itself, and rising as the ground truth is corrupted."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

NOISE_LEVELS = (8.0, 16.0, 32.0)
"""Standard deviations of Gaussian noise, in 8-bit levels."""
BLUR_LEVELS = (1.0, 2.0, 4.0)
"""Standard deviations of a Gaussian blur, in pixels."""
ZERO_TOLERANCE = 1e-6
"""Largest distance from the ground truth to itself, relative to the distance between its halves."""

LevelDistances = tuple[tuple[float, float], ...]  # (level, distance) pairs


def add_noise(videos: Tensor, level: float, seeds: Sequence[int]) -> Tensor:
    """Add Gaussian noise, then round and clamp to 8 bits.

    The noise of a video depends on its seed alone; the level scales it.

    Args:
        videos: uint8 (B, T, 3, H, W).
        level: standard deviation, in 8-bit levels.
        seeds: one per video.

    Returns:
        uint8 (B, T, 3, H, W).
    """
    results = []
    for video, seed in zip(videos, seeds, strict=True):
        noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(seed)).to(video.device)
        results.append(_to_uint8(video + level * noise))
    return torch.stack(results)


def gaussian_blur(videos: Tensor, sigma: float) -> Tensor:
    """Blur each frame with a Gaussian; the outermost pixels are repeated beyond the edges.

    Args:
        videos: uint8 (B, T, 3, H, W).
        sigma: standard deviation in pixels.

    Returns:
        uint8 (B, T, 3, H, W).
    """
    radius = math.ceil(4 * sigma)
    offsets = torch.arange(-radius, radius + 1, device=videos.device)
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    weights /= weights.sum()
    results = []
    for video in videos:  # one at a time, so that the result is independent of batch composition to the last bit
        planes = F.pad(video.flatten(0, 1)[:, None].float(), (radius,) * 4, mode="replicate")
        rows = F.conv2d(planes, weights.view(1, 1, 1, -1))
        results.append(_to_uint8(F.conv2d(rows, weights.view(1, 1, -1, 1)).view(video.shape)))
    return torch.stack(results)


def _to_uint8(pixels: Tensor) -> Tensor:
    return pixels.round().clamp(0, 255).byte()


def assign_halves(names: Sequence[str]) -> list[int]:
    """Return the half of each video, 0 or 1. It depends on the name only, so adding videos does not change it."""
    return [hashlib.sha256(name.encode()).digest()[0] % 2 for name in names]


@dataclass(frozen=True)
class SelfChecks:
    """Distances of the ground truth to itself and to its distorted variants, and the checks that fail."""

    itself: float
    """From the ground truth to itself."""
    halves: float
    """From one half of the ground truth to the other: the effect of the selection of videos."""
    noise: LevelDistances
    """(level, distance) from the ground truth to the same videos with noise."""
    blur: LevelDistances
    """(level, distance) from the ground truth to the same videos with blur."""
    videos: int
    """Number of videos that were distorted."""
    failures: tuple[str, ...] = ()
    """One sentence for each failed check."""

    @property
    def by_distortion(self) -> dict[str, LevelDistances]:
        """(level, distance) pairs by kind of distortion."""
        return {"noise": self.noise, "blur": self.blur}

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failures


def check_distances(
    itself: float, halves: float, noise: LevelDistances, blur: LevelDistances, videos: int
) -> SelfChecks:
    """Check that the distance of the ground truth to itself is zero and that distances rise with the distortion.

    The distance to itself may be at most `ZERO_TOLERANCE` times the distance between the halves. The distance at each
    level of a distortion must exceed the distance at the previous level; at the first level, the distance to itself.

    Args:
        itself, halves: distance of the ground truth to itself, and distance between its halves.
        noise, blur: (level, distance) pairs, in the order of rising levels.
        videos: number of videos that were distorted.
    """
    failures = []
    if not itself <= ZERO_TOLERANCE * halves:
        failures.append(
            f"the distance of the ground truth to itself is {itself:.3g}, while that between its halves is {halves:.3g}"
        )
    for kind, distances in (("noise", noise), ("blur", blur)):
        failures += [
            f"the distance at {kind} {level:g} is {distance:.6g}, not larger than {previous_distance:.6g} at {kind} "
            f"{previous:g}"
            for (previous, previous_distance), (level, distance) in pairwise([(0.0, itself), *distances])
            if not distance > previous_distance
        ]
    return SelfChecks(itself, halves, tuple(noise), tuple(blur), videos, tuple(failures))
