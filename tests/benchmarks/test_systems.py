"""The figures of `benchmarks.systems`, and one small comparison."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.systems import RunResult, costs_of, error_ratios, option_parser, table
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.estimation.budget import RunCosts


def test_error_ratios_are_those_of_each_frame_over_all_videos() -> None:
    truth = torch.zeros(2, 4, 3, 2, 2, dtype=torch.uint8)
    truth[:, 2:] = torch.tensor([10, 20])[None, :, None, None, None]  # after a context of two black frames
    generated = truth[:, 2:].float() + torch.tensor([[5.0, 0.0], [5.0, 20.0]])[:, :, None, None, None]
    assert error_ratios(generated, truth, context=2) == pytest.approx([25 / 100, 200 / 400])


def test_frames_before_the_first_that_is_worse_than_repeating() -> None:
    results = [RunResult(1.0, 1.0, {}, ratios, 1.0, 1.0) for ratios in ([0.5, 0.9, 1.0, 0.5], [0.1], [2.0])]
    assert [result.frames_better for result in results] == [2, 1, 0]


def test_the_table_has_means_and_deviations_over_seeds() -> None:
    runs = [RunResult(8.0, loss, {"psnr": 20.0, "fvd": 900.0}, [0.5, 1.5], 0.5, 2e9) for loss in (0.2, 0.4)]
    _, _, row = table({"ACDiT": RunCosts(2_850_000, 7, 1e12, 2**30)}, {"ACDiT": runs}).splitlines()
    assert row.startswith("| ACDiT | 2.85M | 7 | 8 ± 0 | 1.00 GiB | 0.3 ± 0.14 | 20 ± 0 | 900 ± 0 | 1 ± 0 | 1 ± 0 |")


def test_steps_follow_from_the_flops_of_a_step(write_shards: Callable[..., Manifest], tmp_path: Path) -> None:
    folder = str(write_shards(tmp_path, {("train", "video", (7, 8, 8)): 8}).directory)
    options = option_parser().parse_args(["--data_dir", folder, "--videos", folder, "--steps", "100"])
    reference = costs_of("GPDiT of2", options)
    assert reference.steps == 100
    for name in options.systems:
        costs = costs_of(name, options, reference.flops)
        assert costs.flops == pytest.approx(100 * reference.step_flops, rel=0.02)
