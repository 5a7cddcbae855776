"""The figures of `benchmarks.drift`, and the paths of its videos."""

import numpy as np
import pytest
import torch

from benchmarks.drift import DriftCurves, drift_curves, table
from benchmarks.drift_videos import SPEEDS, bouncing_path
from gpdit_lightning.cli.demo_videos import DIGIT, SIZE


def test_curves_of_frames_with_known_errors_and_statistics() -> None:
    """Frames that are shifted by 1, then doubled; the truth of the third is not known."""
    truth = torch.randn(4, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    context = truth[:, 0] + 2.0
    curves = drift_curves(torch.cat((truth[:, :1] + 1.0, 2 * truth[:, 1:], truth[:, :1]), dim=1), context, truth)
    repeated = [4.0, float((context - truth[:, 1]).square().mean())]
    assert curves.ratios == pytest.approx([1 / repeated[0], float(truth[:, 1].square().mean()) / repeated[1]])
    real = torch.cat((context[:, None], truth), dim=1).numpy()
    for frame, values in enumerate((truth[:, 0] + 1, 2 * truth[:, 1], truth[:, 0])):
        expected = np.mean(
            [
                (values[:, c].mean() - real[:, :, c].mean()) ** 2
                + (values[:, c].std() - real[:, :, c].std(ddof=1)) ** 2
                for c in range(3)
            ]
        )
        assert curves.distances[frame] == pytest.approx(float(expected), rel=1e-9)


def test_numbers_of_curves() -> None:
    curves = DriftCurves([0.2, 0.9, 1.0, 0.5], [0.5 + 0.04 * frame for frame in range(50)])
    assert curves.frames_better == 2
    assert curves.growth == pytest.approx(4.0)
    assert DriftCurves([0.5] * 7, [0.0, 0.0]).frames_better == 7
    assert table({"plain": [curves]}).splitlines()[-1].startswith("| plain | 2 | 0.65 | 2.28 | 4 |")


def test_paths_bounce_with_constant_speed() -> None:
    path = bouncing_path(500, np.random.default_rng(0))
    assert path.min() >= 0
    assert path.max() <= SIZE - DIGIT
    speeds = np.abs(np.diff(path, axis=0))
    assert (np.isclose(speeds, np.median(speeds, axis=0)).mean(axis=0) > 0.97).all()  # all but the bounces
    assert ((SPEEDS[0] <= np.median(speeds, axis=0)) & (np.median(speeds, axis=0) <= SPEEDS[1])).all()
    assert (np.diff(np.sign(np.diff(path, axis=0)), axis=0) != 0).sum(axis=0).min() > 4
