"""Whether a distance deserves trust: zero for the truth against itself, growing as the truth is spoilt."""

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
"""How far the truth may be from itself, relative to the distance of its halves."""

Ladder = tuple[tuple[float, float], ...]  # (level, distance) pairs


def add_noise(videos: Tensor, level: float, seeds: Sequence[int]) -> Tensor:
    """Videos with Gaussian noise, rounded and kept within 8 bits.

    The noise of a video depends on its seed alone, and grows with the level in strength only.

    Args:
        videos: uint8 (B, T, 3, H, W).
        level: standard deviation, in 8-bit levels.
        seeds: of each video.

    Returns:
        uint8 (B, T, 3, H, W).
    """
    results = []
    for video, seed in zip(videos, seeds, strict=True):
        noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(seed)).to(video.device)
        results.append(_rounded(video + level * noise))
    return torch.stack(results)


def gaussian_blur(videos: Tensor, sigma: float) -> Tensor:
    """Videos whose frames are blurred by a Gaussian, the pixels at the edges repeated beyond them.

    Args:
        videos: uint8 (B, T, 3, H, W).
        sigma: standard deviation in pixels.

    Returns:
        uint8 (B, T, 3, H, W).
    """
    reach = math.ceil(4 * sigma)
    places = torch.arange(-reach, reach + 1, device=videos.device)
    weights = torch.exp(-(places**2) / (2 * sigma**2))
    weights /= weights.sum()
    results = []
    for video in videos:  # one at a time, so that its result is the same in any company
        planes = F.pad(video.flatten(0, 1)[:, None].float(), (reach, reach, reach, reach), mode="replicate")
        across = F.conv2d(planes, weights.view(1, 1, 1, -1))
        results.append(_rounded(F.conv2d(across, weights.view(1, 1, -1, 1)).view(video.shape)))
    return torch.stack(results)


def _rounded(pixels: Tensor) -> Tensor:
    return pixels.round().clamp(0, 255).byte()


def assign_halves(names: Sequence[str]) -> list[int]:
    """To which half each video belongs, 0 or 1: by its name, so that it stays there when videos are added."""
    return [hashlib.sha256(name.encode()).digest()[0] % 2 for name in names]


@dataclass(frozen=True)
class SelfChecks:
    """What a distance says of truth alone."""

    itself: float
    """From the truth to itself."""
    halves: float
    """From one half of the truth to the other: what the choice of videos makes."""
    noise: Ladder
    """(level, distance) from the truth to itself with noise."""
    blur: Ladder
    """Likewise with blur."""
    videos: int
    """That were distorted."""
    failures: tuple[str, ...] = ()
    """What is not as it ought to be, a sentence each."""

    @property
    def ladders(self) -> dict[str, Ladder]:
        """By what spoils the truth."""
        return {"noise": self.noise, "blur": self.blur}

    @property
    def passed(self) -> bool:
        """Whether all is well."""
        return not self.failures


def check_distances(itself: float, between_halves: float, noise: Ladder, blur: Ladder, videos: int) -> SelfChecks:
    """The checks with their verdict.

    The truth must be no further from itself than `ZERO_TOLERANCE` of what its halves are from each other, and each
    step of a ladder further away than the one before, the first further than the truth from itself.

    Args:
        itself, between_halves: distances.
        noise, blur: (level, distance) pairs, levels rising.
        videos: that were distorted.
    """
    failures = []
    if not itself <= ZERO_TOLERANCE * between_halves:
        failures.append(f"truth is {itself:.3g} from itself where its halves are {between_halves:.3g} apart")
    for kind, ladder in (("noise", noise), ("blur", blur)):
        failures += [
            f"{kind} {level:g} is {distance:.6g} from the truth, no further than {kind} {before:g} at {nearer:.6g}"
            for (before, nearer), (level, distance) in pairwise([(0.0, itself), *ladder])
            if not distance > nearer
        ]
    return SelfChecks(itself, between_halves, tuple(noise), tuple(blur), videos, tuple(failures))
