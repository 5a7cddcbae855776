"""Moving pictures for `demo`: handwritten digits that drift over a coloured ground and bounce, as real mp4 files."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from gpdit_lightning.media.video import write_video

SIZE = 64  # pixels, both ways
DIGIT = 28  # side of a digit in pixels
FPS = 24
SPEED = (1.0, 2.0)  # pixels per movie frame, slowest and fastest
HELD_OUT_DIGITS = 300  # of scikit-learn's 1,797 scanned digits, the last ones appear in held-out movies only


def load_digits() -> Tensor:
    """The handwritten digits inside scikit-learn's wheel, enlarged and smoothed: (1797, 1, DIGIT, DIGIT) in [0, 1]."""
    from sklearn.datasets import load_digits as load

    scans = torch.from_numpy(load().images).float()[:, None] / 16
    return F.interpolate(scans, size=(DIGIT, DIGIT), mode="bicubic", antialias=True).clamp(0, 1)


def bounce(start: float, speed: float, frames: int, room: float) -> np.ndarray:
    """Positions in [0, room] of a point that moves at `speed` per frame and turns at the ends: (frames,)."""
    along = (start + speed * np.arange(frames)) % (2 * room)
    return np.where(along > room, 2 * room - along, along)


def render(digit: Tensor, numbers: np.random.Generator, frames: int) -> Tensor:
    """One movie of a digit (1, DIGIT, DIGIT) on a random path in random colours: (frames, 3, SIZE, SIZE) uint8."""
    room = SIZE - DIGIT
    direction, speed = numbers.uniform(0, 2 * math.pi), numbers.uniform(*SPEED)
    x, y = (
        bounce(numbers.uniform(0, 2 * room), speed * turn(direction), frames, room) for turn in (math.cos, math.sin)
    )
    ground, ink = (
        torch.from_numpy(numbers.uniform(low, high, 3)).float()[None, :, None, None]
        for low, high in ((0, 0.35), (0.5, 1.0))
    )
    # Where each pixel of the frame falls on the digit, in grid_sample's [-1, 1]: subpixel motion without jitter.
    pixels = torch.arange(SIZE) + 0.5
    columns = (pixels[None] - torch.from_numpy(x).float()[:, None]) / DIGIT * 2 - 1
    rows = (pixels[None] - torch.from_numpy(y).float()[:, None]) / DIGIT * 2 - 1
    grid = torch.stack((columns[:, None, :].expand(-1, SIZE, -1), rows[:, :, None].expand(-1, -1, SIZE)), dim=-1)
    mask = F.grid_sample(digit.expand(frames, -1, -1, -1), grid, align_corners=False)
    return ((ground + mask * (ink - ground)) * 255).round().byte()


def write_movies(directory: Path, count: int, seconds: float, held_out: bool, seed: int) -> None:
    """Write `count` movies; held-out ones show other digits on other paths.

    Movies that are already there are kept.
    """
    digits = load_digits()
    digits = digits[-HELD_OUT_DIGITS:] if held_out else digits[:-HELD_OUT_DIGITS]
    for number in tqdm(range(count), desc=f"drawing {directory.name}", unit="movie", leave=False):
        path = directory / f"digit_{number:04d}.mp4"
        if path.exists():
            continue
        numbers = np.random.default_rng([seed, held_out, number])
        movie = render(digits[numbers.integers(len(digits))], numbers, round(seconds * FPS))
        write_video(path, movie, Fraction(FPS))
