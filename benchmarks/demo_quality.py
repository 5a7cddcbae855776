"""`python -m benchmarks.demo_quality`: the quality of the demo's model on new held-out videos.

Run `python -m gpdit_lightning demo` first. The videos show digits that the training videos do not show. Two figures:
the error of the continuations relative to that of repeating the last context frame, and how often a classifier names
the digit in the last generated frame, relative to the same frame of the ground truth after the codec. The classifier is
a logistic regression on the digits of other videos after the codec. It sees the digit centred, so its position has no
effect.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from gpdit_lightning.checkpoints.reading import load_trained_model
from gpdit_lightning.cli.demo import CONTEXT, continue_clips, squared_errors, through_codec
from gpdit_lightning.cli.demo_videos import SIZE, draw_video
from gpdit_lightning.codecs import Codec, load_codec_from_spec

TRAINING_VIDEOS, HELD_OUT_VIDEOS = 1200, 256
TRAINING_SEED = 7  # not that of the demo
CROP = 16  # pixels along a side of the classifier's input, two frame pixels apart


def last_digits(videos: Tensor) -> np.ndarray:
    """Return the centred digits of the last frames of videos (B, T, 3, SIZE, SIZE): (B, CROP * CROP) of norm 1."""
    gray = videos[:, -1].float().mean(dim=1)
    ink = (gray - gray.flatten(1).median(dim=1).values[:, None, None]).relu()
    weights = torch.where(ink > 25, ink, 0.0)
    total = weights.sum(dim=(1, 2)).clamp_min(1e-6)
    pixels, offsets = torch.arange(SIZE) + 0.5, 2 * (torch.arange(CROP) + 0.5) - CROP
    x, y = ((weights.sum(dim=axis) * pixels).sum(dim=1) / total for axis in (1, 2))
    columns, rows = ((centre[:, None] + offsets) / SIZE * 2 - 1 for centre in (x, y))
    grid = torch.stack((columns[:, None, :].expand(-1, CROP, -1), rows[:, :, None].expand(-1, -1, CROP)), dim=-1)
    smooth = F.avg_pool2d(ink[:, None], 3, stride=1, padding=1)
    return F.normalize(F.grid_sample(smooth, grid, align_corners=False).flatten(1)).numpy()


def draw_clips(count: int, held_out: bool, seed: int, stride: int) -> tuple[Tensor, np.ndarray]:
    """Return every stride-th frame of new videos, (count, T, 3, SIZE, SIZE), and their digits (count,)."""
    videos, digits = zip(*(draw_video(number, held_out, seed) for number in range(count)), strict=True)
    return torch.stack([video[::stride] for video in videos]), np.array(digits)


def train_classifier(codec: Codec, stride: int) -> LogisticRegression:
    """Return a classifier of the digits in the last frames of training videos after the codec."""
    videos, digits = draw_clips(TRAINING_VIDEOS, held_out=False, seed=TRAINING_SEED, stride=stride)
    return LogisticRegression(C=50.0, max_iter=1000).fit(last_digits(through_codec(codec, videos)), digits)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both figures."""
    parser = argparse.ArgumentParser(allow_abbrev=False, prog="python -m benchmarks.demo_quality", description=__doc__)
    parser.add_argument("--checkpoint", default="runs/demo/stage3_long_video", help="model of the demo")
    parser.add_argument("--videos", type=int, default=HELD_OUT_VIDEOS, help="number of held-out videos")
    options = parser.parse_args(arguments)

    model = load_trained_model(options.checkpoint)
    codec = load_codec_from_spec(model.codec)
    stride = model.geometry.stride
    clips, digits = draw_clips(options.videos, held_out=True, seed=0, stride=stride)
    generated, decoded = continue_clips(model, codec, clips), through_codec(codec, clips)
    repeated = squared_errors(clips[:, CONTEXT - 1 : CONTEXT], clips)
    print(f"error relative to repeating the last context frame, {len(clips)} held-out videos")
    for name, videos in (("generated", generated), ("codec alone", decoded)):
        error = squared_errors(videos, clips)
        print(f"{name:>12}: mean {error.mean() / repeated.mean():.3f}, worst frame {(error / repeated).max():.2f}")
    classifier = train_classifier(codec, stride)
    of_generated, of_decoded = (
        float((classifier.predict(last_digits(v)) == digits).mean()) for v in (generated, decoded)
    )
    print(
        f"digits named in the last frame of {len(clips)} videos: {of_generated:.1%} of the generated ones, "
        f"{of_decoded:.1%} of the ground truth after the codec, ratio {of_generated / of_decoded:.3f}"
    )


if __name__ == "__main__":
    main()
