"""ZeRO by one word of a recipe, on two processes, among runs that know nothing of it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cli.test_several_ranks import STEPS, curves, finish, gone_back, one_rank, recorder, seen, train, weights

__all__ = ["one_rank", "recorder"]  # fixtures

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def validated(recipe: Path, recorder: Path, *options: str) -> float:
    """What `validate` prints as val/loss."""
    done = subprocess.run(
        [sys.executable, "-m", "gpdit_lightning", "validate", f"--config={recipe}", *options],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(recorder)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return next(float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("val/loss "))


def test_zero_goes_on_where_one_process_stopped_and_one_process_evaluates_it(
    one_rank: Path, tiny_shards: Path, recorder: Path, tmp_path: Path
) -> None:
    gone_back(tmp_path, one_rank, 2)
    finish(train(tmp_path, tiny_shards, recorder, 2, "rest", strategy="zero3"))
    assert seen(tmp_path, "rest") == {at: samples for at, samples in seen(one_rank, "whole").items() if at[0] >= 2}
    expected = weights(one_rank / "run")
    for name, value in weights(tmp_path / "run").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    for tag, values in curves(one_rank / "run").items():
        assert curves(tmp_path / "run")[tag] == pytest.approx(values, rel=1e-4, abs=1e-6), tag
    loss = curves(tmp_path / "run")["val/loss"][STEPS]
    assert validated(tmp_path / "rest.yaml", recorder) == pytest.approx(loss, abs=2e-5)
    alone = ("--trainer.strategy=auto", "--trainer.devices=1")
    assert validated(tmp_path / "rest.yaml", recorder, *alone) == pytest.approx(loss, abs=2e-5)
