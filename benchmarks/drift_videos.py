"""`python -m benchmarks.drift_videos --out FOLDER`: videos of digits that bounce between the sides of the frame.

A video has a constant velocity between two bounces, so a few frames determine all that follow: the truth of a
continuation of any length is known. `FOLDER/train` has short videos, `FOLDER/held_out` a few long ones, which show
other scans. Prepare both with the codec of the demo:

    python -m gpdit_lightning prepare --videos FOLDER/train --validation_videos FOLDER/held_out --codec pca_digits
        --video_sizes 64x64 --stride 3 --clip_frames 21 --out LATENTS
"""

import argparse
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from gpdit_lightning.cli.demo_videos import DIGIT, FPS, HELD_OUT_DIGITS, SIZE, load_digits, render
from gpdit_lightning.media.video_writer import write_video
from gpdit_lightning.progress import progress_bar

TRAINING_VIDEOS, TRAINING_FRAMES = 1200, 61
HELD_OUT_VIDEOS, HELD_OUT_FRAMES = 16, 2500  # 208 latent frames at stride 3
SPEEDS = 0.3, 0.6  # pixels per frame along each axis


def bouncing_path(frames: int, generator: np.random.Generator) -> np.ndarray:
    """Return a path (frames, 2) of a digit's corner (x, y) in pixels, reflected at the sides of the frame."""
    room = SIZE - DIGIT
    start, velocity = generator.uniform(0, room, 2), generator.uniform(*SPEEDS, 2) * generator.choice((-1, 1), 2)
    unfolded = (start + np.arange(frames)[:, None] * velocity) % (2 * room)
    return np.where(unfolded < room, unfolded, 2 * room - unfolded)


def write_bouncing_videos(folder: Path, count: int, frames: int, held_out: bool, seed: int = 0) -> None:
    """Write `count` mp4 files; held-out ones show other scans than those for training. Existing files are kept."""
    digits, _ = load_digits()
    digits = digits[-HELD_OUT_DIGITS:] if held_out else digits[:-HELD_OUT_DIGITS]
    for number in progress_bar(range(count), desc=f"drawing {folder.name}", unit="video"):
        path = folder / f"digit_{number:04d}.mp4"
        if not path.exists():
            generator = np.random.default_rng([seed, held_out, number])
            digit = digits[generator.integers(len(digits))]
            write_video(path, render(digit, bouncing_path(frames, generator), generator), Fraction(FPS))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the videos."""
    parser = argparse.ArgumentParser(allow_abbrev=False, prog="python -m benchmarks.drift_videos")
    parser.add_argument("--out", type=Path, required=True, help="folder of the videos")
    parser.add_argument("--videos", type=int, default=TRAINING_VIDEOS, help="number of videos for training")
    options = parser.parse_args(arguments)
    write_bouncing_videos(options.out / "train", options.videos, TRAINING_FRAMES, held_out=False)
    write_bouncing_videos(options.out / "held_out", HELD_OUT_VIDEOS, HELD_OUT_FRAMES, held_out=True)


if __name__ == "__main__":
    main()
