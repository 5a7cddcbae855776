"""Synthetic videos for `demo`: handwritten digits that move over a coloured background."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpdit_lightning.media.video_writer import write_video
from gpdit_lightning.progress import progress_bar

SIZE = 64  # side of a frame in pixels
DIGIT = 32  # side of a digit in pixels
FPS = 24
FRAMES = 61  # per video: 21 at a stride of 3
MIN_PATH_LENGTH = 18  # pixels between the ends of a digit's path
HELD_OUT_DIGITS = 300  # of scikit-learn's 1,797 scanned digits: the last ones appear in held-out videos only


def load_digits() -> Tensor:
    """Return the handwritten digits of scikit-learn, enlarged: (1797, 1, DIGIT, DIGIT) in [0, 1]."""
    from sklearn.datasets import load_digits as load

    scans = torch.from_numpy(load().images).float()[:, None] / 16
    return F.interpolate(scans, size=(DIGIT, DIGIT), mode="bicubic", antialias=True).clamp(0, 1)


def random_path(generator: np.random.Generator) -> np.ndarray:
    """Return a straight path (FRAMES, 2) of a digit's corner (x, y) in pixels, with the digit inside the frame."""
    while True:
        ends = generator.uniform(0, SIZE - DIGIT, (2, 2))
        if np.linalg.norm(ends[1] - ends[0]) >= MIN_PATH_LENGTH:
            return ends[0] + np.linspace(0, 1, FRAMES)[:, None] * (ends[1] - ends[0])


def render(digit: Tensor, generator: np.random.Generator) -> Tensor:
    """Return a video (FRAMES, 3, SIZE, SIZE), uint8, of a light digit (1, DIGIT, DIGIT) on a dark colour."""
    x, y = torch.from_numpy(random_path(generator)).float().T
    background = torch.from_numpy(generator.uniform(0, 0.35, 3)).float()[None, :, None, None]
    ink = float(generator.uniform(0.75, 1.0))
    # The position of each pixel on the digit in grid_sample's coordinates [-1, 1], so that motion is in subpixels.
    pixels = torch.arange(SIZE) + 0.5
    columns = (pixels[None] - x[:, None]) / DIGIT * 2 - 1
    rows = (pixels[None] - y[:, None]) / DIGIT * 2 - 1
    grid = torch.stack((columns[:, None, :].expand(-1, SIZE, -1), rows[:, :, None].expand(-1, -1, SIZE)), dim=-1)
    mask = F.grid_sample(digit.expand(FRAMES, -1, -1, -1), grid, align_corners=False)
    return ((background + mask * (ink - background)) * 255).round().byte()


def write_videos(directory: Path, count: int, held_out: bool, seed: int) -> None:
    """Write `count` mp4 files; held-out ones show other digits on other paths. Existing files are kept."""
    digits = load_digits()
    digits = digits[-HELD_OUT_DIGITS:] if held_out else digits[:-HELD_OUT_DIGITS]
    for number in progress_bar(range(count), desc=f"drawing {directory.name}", unit="video", leave=False):
        path = directory / f"digit_{number:04d}.mp4"
        if path.exists():
            continue
        generator = np.random.default_rng([seed, held_out, number])
        write_video(path, render(digits[generator.integers(len(digits))], generator), Fraction(FPS))
