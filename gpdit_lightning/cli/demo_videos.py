"""Synthetic videos for `demo`: handwritten digits that move over a coloured background.

A video has one tint, which is added to the grey levels of the digit and of the background alike. So the colour of a
frame is the same everywhere, and its shape is in the brightness alone, which a linear codec represents with few
numbers.
"""

from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from gpdit_lightning.devices import available_cores
from gpdit_lightning.media.video_writer import write_video
from gpdit_lightning.progress import progress_bar
from gpdit_lightning.workers import WorkerLoader

SIZE = 64  # side of a frame in pixels
DIGIT = 32  # side of a digit in pixels
FPS = 24
FRAMES = 61  # per video: 21 at a stride of 3
MIN_PATH_LENGTH = 18  # pixels between the ends of a digit's path
BACKGROUND, INK = 0.2, 0.8  # brightness, of at most 1
MAX_TINT = 0.15  # added to or subtracted from the red, the green and the blue of all pixels
FEW_VIDEOS = 100  # up to so many are drawn without other processes, which take a second to start
HELD_OUT_DIGITS = 300  # of scikit-learn's 1,797 scanned digits: the last ones appear in held-out videos only


@cache
def load_digits() -> tuple[Tensor, Tensor]:
    """Return the digits of scikit-learn, enlarged: scans (1797, 1, DIGIT, DIGIT) in [0, 1] and digits (1797,)."""
    from sklearn.datasets import load_digits as load

    data = load()
    scans = torch.from_numpy(data.images).float()[:, None] / 16
    enlarged = F.interpolate(scans, size=(DIGIT, DIGIT), mode="bicubic", antialias=True).clamp(0, 1)
    return enlarged, torch.from_numpy(data.target)


def random_path(generator: np.random.Generator) -> np.ndarray:
    """Return a straight path (FRAMES, 2) of a digit's corner (x, y) in pixels, with the digit inside the frame."""
    while True:
        ends = generator.uniform(0, SIZE - DIGIT, (2, 2))
        if np.linalg.norm(ends[1] - ends[0]) >= MIN_PATH_LENGTH:
            return ends[0] + np.linspace(0, 1, FRAMES)[:, None] * (ends[1] - ends[0])


def render(digit: Tensor, path: np.ndarray, generator: np.random.Generator) -> Tensor:
    """Return a video (T, 3, SIZE, SIZE), uint8, of a light digit (1, DIGIT, DIGIT) on a dark background.

    Args:
        digit: the scan.
        path: (T, 2) corner (x, y) of the digit in pixels in each frame.
        generator: draws the tint.
    """
    x, y = torch.from_numpy(path).float().T
    tint = torch.from_numpy(generator.uniform(-MAX_TINT, MAX_TINT, 3)).float().view(3, 1, 1)
    # The position of each pixel on the digit in grid_sample's coordinates [-1, 1], so that motion is in subpixels.
    pixels = torch.arange(SIZE) + 0.5
    columns = (pixels[None] - x[:, None]) / DIGIT * 2 - 1
    rows = (pixels[None] - y[:, None]) / DIGIT * 2 - 1
    grid = torch.stack((columns[:, None, :].expand(-1, SIZE, -1), rows[:, :, None].expand(-1, -1, SIZE)), dim=-1)
    mask = F.grid_sample(digit.expand(len(path), -1, -1, -1), grid, align_corners=False)
    return ((BACKGROUND + mask * (INK - BACKGROUND) + tint) * 255).round().byte()


def draw_video(number: int, held_out: bool, seed: int) -> tuple[Tensor, int]:
    """Return a video (FRAMES, 3, SIZE, SIZE), uint8, and its digit; held-out ones show other scans on other paths."""
    digits, values = load_digits()
    digits, values = (x[-HELD_OUT_DIGITS:] if held_out else x[:-HELD_OUT_DIGITS] for x in (digits, values))
    generator = np.random.default_rng([seed, held_out, number])
    choice = generator.integers(len(digits))
    return render(digits[choice], random_path(generator), generator), int(values[choice])


class _Videos(Dataset[int]):
    """Writes the mp4 file of a video when it is read, unless it exists."""

    def __init__(self, directory: Path, count: int, held_out: bool, seed: int) -> None:
        self.directory, self.count, self.held_out, self.seed = directory, count, held_out, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> int:
        path = self.directory / f"digit_{number:04d}.mp4"
        if not path.exists():
            write_video(path, draw_video(number, self.held_out, self.seed)[0], Fraction(FPS))
        return number


def write_videos(directory: Path, count: int, held_out: bool, seed: int) -> None:
    """Write `count` mp4 files, in one process per core; arguments as for `draw_video`. Existing files are kept."""
    videos = _Videos(directory, count, held_out, seed)
    written = WorkerLoader(videos, available_cores() if count > FEW_VIDEOS else 0)
    for _ in progress_bar(written, desc=f"drawing {directory.name}", unit="video", leave=False):
        pass
