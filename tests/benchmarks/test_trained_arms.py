"""The tables of `benchmarks.trained_arms` and `benchmarks.attention_variants`."""

import argparse

import pytest
import torch

from benchmarks.attention_variants import TrainingPass, measure
from benchmarks.trained_arms import Continued, probe_table, psnr, table
from gpdit_lightning.cli.ablation_report import interval


def test_psnr_is_a_mean_over_frames_then_videos() -> None:
    truth = torch.full((2, 3, 3, 4, 4), 100, dtype=torch.uint8)
    errors = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    generated = truth + errors[:, :, None, None, None]
    expected = (20 * torch.log10(255 / errors)).mean(dim=1).mean()
    assert psnr(generated, truth) == pytest.approx(float(expected), rel=1e-5)


def test_rows_are_compared_with_the_first_one_run_by_run() -> None:
    first = [Continued(20.0, [ratio] * 4, 900.0) for ratio in (1.0, 2.0, 4.0)]  # large differences between seeds
    better = [Continued(21.0, [ratio] * 3 + [ratio - 0.4], 800.0) for ratio in (1.0, 2.02, 3.98)]
    lines = table({"of2": first, "of": better}).splitlines()
    assert lines[0].endswith("| FVD | error ratio | less the first row | 95 % interval | at frame 1 | at frame 4 |")
    assert "| of2 | 3 | 20 ± 0 | 900 ± 0 | 2.33 ± 1.5 | - | - |" in lines[2]
    bounds = interval([-0.1, -0.08, -0.12])
    assert bounds is not None
    assert f"| -0.1 | [{bounds[0]:+.3g}, {bounds[1]:+.3g}] |" in lines[3]
    assert "FVD" not in table({"of2": [Continued(20.0, [1.0])]})
    probe = probe_table({"of2": [[0.5, 0.7], [0.5, 0.9]], "of": [[0.25, 0.5]]}, 0.25).splitlines()
    assert probe[2:] == ["| of2 | 0.5 ± 0 | 0.8 ± 0.14 |", "| of | 0.25 | 0.5 |"]


def test_kept_memory_grows_with_the_frames_and_products_are_those_of_the_mask() -> None:
    options = argparse.Namespace(size="tiny", frame="16x16", clips=1, repeats=1, device="cpu")
    costs = measure(5, options)
    # Query-key pairs of blocks: clean 0..3 to the blocks that they attend to, noisy 0..4 to these and themselves. The
    # clean queries of the last of the four layers are not computed.
    assert costs["of"].attention_flops / costs["of2"].attention_flops == pytest.approx(
        (3 * 4 + 4 * 15) / (3 * 10 + 4 * 15)
    )
    assert costs["of"].seconds > 0
    assert TrainingPass("of2", 3, options).kept_bytes() < costs["of2"].kept
