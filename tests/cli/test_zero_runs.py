"""ZeRO by one word of a recipe, on two processes, among runs that know nothing of it."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gpdit_lightning.cli import main
from gpdit_lightning.training.checkpoints import read_checkpoint
from tests.cli.test_several_ranks import STEPS, curves, finish, gone_back, one_rank, recorder, seen, train, weights

__all__ = ["one_rank", "recorder"]  # fixtures

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.fixture
def environment() -> Iterator[None]:
    """Lightning's launcher writes ranks into it, even for one process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


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


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"precision": "16-mixed"}, "trainer.precision is 16-mixed: with ZeRO take bf16-mixed or 32-true."),
        ({"gradient_clip_algorithm": "value"}, "leave out trainer.gradient_clip_algorithm"),
        ({"strategy": {"class_path": "gpdit_lightning.training.zero.ZeRO", "init_args": {"stage": 1}}}, "take 2 or 3"),
    ],
)
def test_what_zero_does_not_do_is_one_sentence(
    settings: dict[str, Any], sentence: str, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {
        "run_dir": str(tmp_path / "run"),
        "model": {"class_path": "GPDiTStage", "init_args": {"backbone": {"size": "tiny", "latent_channels": 4}}},
        "data": {"videos": {"manifests": [str(tiny_shards)], "batch_size": 2}},
        "trainer": {"accelerator": "cpu", "devices": 1, "strategy": "zero3", **settings},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", f"--config={tmp_path / 'recipe.yaml'}"]) != 0
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_a_chain_of_zero_and_others(tiny_shards: Path, tmp_path: Path) -> None:
    """ZeRO leaves its ranks as the next stage wants to find them."""
    recipes = []
    for place, strategy in enumerate(("zero3", "ddp", "zero2")):
        recipe = {
            "run_dir": f"${{runs}}/{place}",
            "model": {
                "class_path": "GPDiTStage",
                "init_args": {"backbone": {"size": "tiny", "layers": 1, "width": 24, "heads": 2, "latent_channels": 4}},
            },
            "data": {"max_ranks": 2, "videos": {"manifests": [str(tiny_shards)], "batch_size": 4}},
            "trainer": {"accelerator": "cpu", "devices": 2, "strategy": strategy, "max_steps": 2},
        }
        (tmp_path / f"{place}.yaml").write_text(yaml.safe_dump(recipe))
        recipes.append(f"{place}.yaml")
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump({"stages": recipes}))
    done = subprocess.run(
        [sys.executable, "-m", "gpdit_lightning", "chain", f"--config={tmp_path / 'chain.yaml'}", f"--runs={tmp_path}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ends = [read_checkpoint(tmp_path / str(place)) for place in range(3)]
    assert [end["global_step"] for end in ends] == [2, 2, 2]
    assert [end["gpdit"]["origin"] and end["gpdit"]["origin"]["step"] for end in ends] == [None, 2, 2]
