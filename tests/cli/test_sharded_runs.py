"""ZeRO and FSDP2 on two processes: resumed by and from other strategies, refused settings, chains."""

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

from gpdit_lightning.checkpoints.files import LAST
from gpdit_lightning.checkpoints.reading import sha256_of_weights
from gpdit_lightning.cli import main
from gpdit_lightning.cli.recipe_cli import build_recipe
from gpdit_lightning.training.callbacks.stopping import shut_down_process_group
from gpdit_lightning.training.strategies.zero import ZeRO
from tests.checkpoints.content import read_checkpoint
from tests.cli.test_resume import assert_same, recipe
from tests.cli.test_several_ranks import (
    copy_run_at_step,
    finish,
    logged_scalars,
    one_rank,
    recorded_samples,
    recorder,
    train,
    weights,
)

__all__ = ["one_rank", "recorder"]  # fixtures

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
WITH_ZERO2, WITH_ZERO3 = (pytest.param(name, marks=needs_deepspeed) for name in ("zero2", "zero3"))
CLASS_OF_ZERO = "gpdit_lightning.training.strategies.zero.ZeRO"
HALF_OF_CUDA = {  # on a CPU Lightning replaces 16-mixed by bf16-mixed
    "class_path": "lightning.pytorch.plugins.MixedPrecision", "init_args": {"precision": "16-mixed", "device": "cuda"}
}  # fmt: skip
HEAD_ALONE = """
from gpdit_lightning.stages import GPDiTStage


class HeadAlone(GPDiTStage):
    def configure_model(self):
        super().configure_model()
        self.backbone.requires_grad_(False).output.requires_grad_(True)
"""


def run_verb(*arguments: str) -> str:
    """Run a verb that must succeed; return its output."""
    done = subprocess.run(
        [sys.executable, "-m", "gpdit_lightning", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def one_process() -> Iterator[None]:
    """Restores the environment, into which Lightning writes ranks, and the process group."""
    before = dict(os.environ)
    yield
    shut_down_process_group()
    os.environ.clear()
    os.environ.update(before)


def assert_follows(folder: Path, log: str, step: int, one_rank: Path) -> None:
    """The samples and noise of all steps from `step` on, and the result, are those of the run on one rank."""
    assert recorded_samples(folder, log) == {
        at: samples for at, samples in recorded_samples(one_rank, "uninterrupted").items() if at[0] >= step
    }
    found, expected = weights(folder / "run"), weights(one_rank / "run")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    for tag, values in logged_scalars(one_rank / "run").items():
        assert logged_scalars(folder / "run")[tag] == pytest.approx(values, rel=1e-4, abs=1e-6), tag


@pytest.mark.parametrize("strategy", [WITH_ZERO3, pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_sharded_ranks_resume_a_run_of_one_process(
    strategy: str, one_rank: Path, tiny_shards: Path, recorder: Path, tmp_path: Path
) -> None:
    copy_run_at_step(tmp_path, one_rank, 2)
    finish(train(tmp_path, tiny_shards, recorder, 2, "rest", strategy=strategy))
    assert_follows(tmp_path, "rest", 2, one_rank)


@pytest.mark.slow
@needs_deepspeed
def test_a_run_changes_its_strategy_and_number_of_ranks(
    one_rank: Path, tiny_shards: Path, recorder: Path, tmp_path: Path
) -> None:
    before = tmp_path
    for step, strategy, ranks in ((0, "fsdp2", 2), (1, "auto", 1), (2, "zero3", 2), (4, "ddp", 2), (5, "zero2", 2)):
        folder = tmp_path / strategy
        if step:
            copy_run_at_step(folder, before, step)
        finish(train(folder, tiny_shards, recorder, ranks, "rest", strategy=strategy))
        assert_follows(folder, "rest", step, one_rank)
        before = folder


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        pytest.param(
            {"strategy": "zero3", "precision": "16-mixed"},
            "trainer.precision is 16-mixed: with ZeRO or FSDP2 use bf16-mixed or 32-true.",
            marks=needs_deepspeed,
        ),
        (
            {"strategy": "fsdp2", "plugins": [HALF_OF_CUDA]},
            "trainer.precision is 16-mixed: with ZeRO or FSDP2 use bf16-mixed or 32-true.",
        ),
        (
            {"strategy": "fsdp2", "precision": "16-true"},
            "trainer.precision is 16-true: with ZeRO or FSDP2 use bf16-mixed or 32-true.",
        ),
        pytest.param(
            {"strategy": "zero3", "gradient_clip_algorithm": "value"},
            "DeepSpeed clips gradients by their norm only: leave out trainer.gradient_clip_algorithm.",
            marks=needs_deepspeed,
        ),
        (
            {"strategy": "fsdp2", "gradient_clip_algorithm": "value"},
            "FSDP2 clips gradients by their norm only: leave out trainer.gradient_clip_algorithm.",
        ),
        pytest.param(
            {"strategy": {"class_path": CLASS_OF_ZERO, "init_args": {"stage": 1}}},
            "ZeRO's stage is 1: use 2 or 3.",
            marks=needs_deepspeed,
        ),
        (
            {"strategy": "deepspeed_stage_1"},
            "trainer.strategy is deepspeed_stage_1: use one of zero2, zero2_offload, zero3, zero3_offload.",
        ),
    ],
)
def test_unsupported_settings_are_refused(
    settings: dict[str, Any], sentence: str, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = recipe(tiny_shards, tmp_path / "run")
    given["trainer"] |= {"devices": 1, **settings}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given))
    assert main(["fit", f"--config={tmp_path / 'recipe.yaml'}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {sentence}"


@needs_deepspeed
@pytest.mark.usefixtures("one_process")
def test_zero3_refuses_compiled_blocks(tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = recipe(tiny_shards, tmp_path / "run")
    given["model"]["init_args"]["backbone"]["compile"] = True
    given["trainer"] |= {"devices": 1, "strategy": "zero3"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given))
    assert main(["fit", f"--config={tmp_path / 'recipe.yaml'}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("set it to false, or use zero2, fsdp2 or ddp.")


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("strategy", [WITH_ZERO2, "fsdp2"])
def test_frozen_parameters_are_refused(
    strategy: str,
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "frozen.py").write_text(HEAD_ALONE)
    monkeypatch.syspath_prepend(tmp_path)
    given = recipe(tiny_shards, tmp_path / "run")
    given["model"]["class_path"] = "frozen.HeadAlone"
    given["trainer"] |= {"devices": 1, "strategy": strategy}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given))
    assert main(["fit", f"--config={tmp_path / 'recipe.yaml'}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: ZeRO and FSDP2 train all parameters, but backbone.patch_embedding.weight is frozen: "
        "use trainer.strategy ddp."
    )
    assert main(["fit", f"--config={tmp_path / 'recipe.yaml'}", "--trainer.strategy=ddp"]) == 0


@needs_deepspeed
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("name", "stage", "offload"),
    [
        ("deepspeed", 2, False),
        ("deepspeed_stage_2", 2, False),
        ("deepspeed_stage_2_offload", 2, True),
        ("deepspeed_stage_3", 3, False),
        ("deepspeed_stage_3_offload", 3, True),
    ],
)
def test_lightnings_names_for_deepspeed_select_zero(
    name: str, stage: int, offload: bool, tiny_shards: Path, tmp_path: Path
) -> None:
    """Lightning's DeepSpeedStrategy divides accumulated gradients twice."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(tiny_shards, tmp_path / "run")))
    arguments = [f"--config={tmp_path / 'recipe.yaml'}", "--trainer.devices=1", f"--trainer.strategy={name}"]
    strategy = build_recipe("fit", arguments).trainer.strategy
    assert isinstance(strategy, ZeRO)
    assert strategy.stage == stage
    assert isinstance(strategy.config, dict)
    config = strategy.config["zero_optimization"]
    assert (config["stage"], "offload_optimizer" in config) == (stage, offload)
    assert ("offload_param" in config) == (offload and stage == 3)


@pytest.mark.slow
@needs_deepspeed
def test_each_stage_of_a_chain_equals_a_run_of_its_own(tiny_shards: Path, tmp_path: Path) -> None:
    """A strategy leaves nothing in the process that changes the next stage."""
    strategies = ("zero3", "fsdp2", "zero2", "ddp", "zero3")
    recipes = []
    for number, strategy in enumerate(strategies):
        given = recipe(tiny_shards, Path(f"${{runs}}/{number}"), max_ranks=2)
        given["trainer"] |= {"devices": 2, "strategy": strategy, "max_steps": 2}
        (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump(given))
        recipes.append(f"{number}.yaml")
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump({"stages": recipes}))
    chain = ("chain", f"--config={tmp_path / 'chain.yaml'}", f"--runs={tmp_path / 'chain'}")
    run_verb(*chain)
    for number in range(1, len(strategies)):
        stage, before = tmp_path / "chain" / str(number), tmp_path / "chain" / str(number - 1)
        sha256 = sha256_of_weights(before / "checkpoints" / LAST)
        assert read_checkpoint(stage)["gpdit"]["origin"] == {"path": str(before), "step": 2, "sha256": sha256}
        begin = f"--model.init_args.initial_weights={before}"
        run_verb("fit", f"--config={tmp_path / f'{number}.yaml'}", f"--runs={tmp_path / 'alone'}", begin)
        assert_same(read_checkpoint(stage), read_checkpoint(tmp_path / "alone" / str(number)))
    assert run_verb(*chain).count("finished at step 2") == len(strategies)
