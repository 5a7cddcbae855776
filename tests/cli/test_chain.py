"""Chains: each stage starts from the averaged weights of its predecessor, after any interruption."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gpdit_lightning.checkpoints.files import LAST, last_checkpoint
from gpdit_lightning.checkpoints.reading import sha256_of_weights
from gpdit_lightning.cli import main
from gpdit_lightning.data.manifest import Manifest
from tests.checkpoints.content import read_checkpoint

BACKBONE = {"size": "tiny", "layers": 1, "width": 24, "heads": 2, "mlp_width": 48, "latent_channels": 4}
STEPS = 4
DAMAGED = f"step-{STEPS}.ckpt/training.ckpt has another sha256 than when it was written"


@pytest.fixture
def shards(write_shards: Callable[..., Manifest], tmp_path: Path) -> Path:
    counts = {("train", "image", (1, 8, 8)): 8, ("train", "video", (3, 8, 8)): 8, ("train", "sequence", (6, 8, 8)): 8}
    return write_shards(tmp_path / "shards", counts).directory


@pytest.fixture
def chain(shards: Path, tmp_path: Path) -> Path:
    """A chain of all four stages over random shards."""
    sources: dict[str, dict[str, Any]] = {
        "ImageWarmupStage": {"images": {}},
        "MixedStage": {"images": {}, "videos": {}},
        "LongVideoStage": {"videos": {"least_frames": 2}},
        "FewShotStage": {"sequences": {}},
    }
    recipes = []
    for stage, data in sources.items():
        for source in data.values():
            source |= {"manifests": [str(shards)], "batch_size": 4}
        recipe = {
            "run_dir": f"${{runs}}/{stage}",
            "model": {
                "class_path": stage,
                "init_args": {"backbone": BACKBONE, "optimizer": {"learning_rate": 1e-2}},
            },
            "data": {"max_ranks": 2, **data},
            "trainer": {
                "accelerator": "cpu",
                "devices": 1,
                "max_steps": STEPS,
                "enable_progress_bar": False,
                "enable_model_summary": False,
            },
            "ema": {"decay": 0.5},
            "checkpoint": {"every_steps": 1},
        }
        (tmp_path / f"{stage}.yaml").write_text(yaml.safe_dump(recipe))
        recipes.append(f"{stage}.yaml")
    path = tmp_path / "chain.yaml"
    path.write_text(yaml.safe_dump({"stages": recipes}))
    return path


def shorten(chain: Path, count: int) -> Path:
    """Keep the first stages only, where the others would take time and show nothing."""
    chain.write_text(yaml.safe_dump({"stages": yaml.safe_load(chain.read_text())["stages"][:count]}))
    return chain


def stages(runs: Path) -> list[dict[str, Any]]:
    names = ("ImageWarmupStage", "MixedStage", "LongVideoStage", "FewShotStage")
    return [read_checkpoint(runs / name) for name in names]


def assert_same_ends(one: Path, other: Path) -> None:
    for mine, theirs in zip(stages(one), stages(other), strict=True):
        assert mine["global_step"] == theirs["global_step"] == STEPS
        for weights in (mine["state_dict"], mine["ema"]["weights"]):
            counterpart = theirs["state_dict"] if weights is mine["state_dict"] else theirs["ema"]["weights"]
            for name, value in weights.items():
                assert torch.equal(value, counterpart[name]), name


def test_each_stage_starts_from_the_average_of_its_predecessor(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a learning rate of almost zero the weights of a stage remain the average of its predecessor.

    The first stage is finished before, with another learning rate, which a warning says.
    """
    frozen = tmp_path / "frozen.yaml"
    frozen.write_text("model: {init_args: {optimizer: {learning_rate: 1.0e-12}}}")
    runs = tmp_path / "runs"
    command = ["chain", "--config", str(chain), f"--runs={runs}"]
    assert main(["fit", f"--config={tmp_path / 'ImageWarmupStage.yaml'}", f"--runs={runs}"]) == 0
    assert main([*command, "--config", str(frozen)]) == 0
    assert "stage 1 of 4" in (shown := capsys.readouterr().out)
    assert f"{runs / 'ImageWarmupStage'}: finished at step {STEPS}" in shown
    first, *others = stages(runs)
    predecessor = first["ema"]["weights"]
    assert any(not torch.equal(value, first["state_dict"][name]) for name, value in predecessor.items())
    for checkpoint, name in zip(others, ("ImageWarmupStage", "MixedStage", "LongVideoStage"), strict=True):
        origin = checkpoint["gpdit"]["origin"]
        assert origin == {
            "path": str(runs / name),
            "step": STEPS,
            "sha256": sha256_of_weights(runs / name / "checkpoints" / LAST),
        }
        for key, value in predecessor.items():
            torch.testing.assert_close(checkpoint["state_dict"][key], value, rtol=0, atol=1e-9)
        predecessor = checkpoint["ema"]["weights"]

    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*.ckpt")}
    capsys.readouterr()
    assert main([*command, "--config", str(frozen)]) == 0
    shown, warned = capsys.readouterr()
    assert shown.count("finished at step") == 4
    (warning,) = (line for line in warned.splitlines() if "changed settings" in line)  # of the first stage
    assert "settings have no effect, since no step is left (model.init_args.optimizer.learning_rate is 1e-12" in warning
    assert before == {path: path.stat().st_mtime_ns for path in runs.rglob("*.ckpt")}


@pytest.mark.slow
def test_a_chain_that_is_killed_twice_ends_bit_equal(chain: Path, tmp_path: Path) -> None:
    assert main(["chain", "--config", str(chain), f"--runs={tmp_path / 'uninterrupted'}"]) == 0
    command = [
        sys.executable,
        "-m",
        "gpdit_lightning",
        "chain",
        "--config",
        str(chain),
        f"--runs={tmp_path / 'killed'}",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for watched in ("ImageWarmupStage/checkpoints/step-2.ckpt", "LongVideoStage/checkpoints/step-1.ckpt"):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (tmp_path / "killed" / watched).exists() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert main(["chain", "--config", str(chain), f"--runs={tmp_path / 'killed'}"]) == 0
    assert_same_ends(tmp_path / "killed", tmp_path / "uninterrupted")


@pytest.mark.slow
def test_stages_may_differ_in_their_number_of_ranks(chain: Path, tmp_path: Path) -> None:
    """Lightning launches new processes for each stage: two ranks, two ranks, one, one."""
    for stage in ("ImageWarmupStage", "MixedStage"):
        path = tmp_path / f"{stage}.yaml"
        recipe = yaml.safe_load(path.read_text())
        recipe["trainer"] |= {"devices": 2, "strategy": "ddp"}
        path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "gpdit_lightning", "chain", "--config", str(chain), f"--runs={tmp_path / 'runs'}"]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [checkpoint["global_step"] for checkpoint in stages(tmp_path / "runs")] == [STEPS] * 4
    origins = [checkpoint["gpdit"]["origin"] for checkpoint in stages(tmp_path / "runs")]
    assert [origin and origin["step"] for origin in origins] == [None, STEPS, STEPS, STEPS]


def test_a_stage_that_began_from_other_weights_is_refused_before_anything_is_trained(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its predecessor would be trained further, was trained again, or was not its origin."""
    runs = tmp_path / "runs"
    command = ["chain", "--config", str(shorten(chain, 3)), f"--runs={runs}"]
    assert main(command) == 0
    first, mixed, long = (runs / name for name in ("ImageWarmupStage", "MixedStage", "LongVideoStage"))
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*.ckpt")}

    assert main([*command, "--trainer.max_steps=6"]) == 2
    message = capsys.readouterr().err
    assert f"{first} is at step {STEPS} of 6, but {mixed} has begun from it: remove {mixed}" in message
    assert f"or set trainer.max_steps to {STEPS}" in message
    assert before == {path: path.stat().st_mtime_ns for path in runs.rglob("*.ckpt")}
    assert main(command) == 0  # as the message says

    shutil.rmtree(first)
    assert main(["fit", f"--config={tmp_path / 'ImageWarmupStage.yaml'}", f"--runs={runs}", "--data.seed=9"]) == 0
    assert main(command) == 2
    message = capsys.readouterr().err
    assert f"{mixed} began from the weights of {first} (step {STEPS}), not from the current weights" in message

    shutil.rmtree(mixed)
    assert main(command) == 2
    message = capsys.readouterr().err
    assert f"{long} began from the weights of {mixed} (step {STEPS}), not from the current weights" in message
    assert "(step 0): remove" in message


def test_a_stage_that_was_trained_alone_is_left_as_it_is(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first stage is used, since it begins from random weights in a chain too; the chain trains others again."""
    runs = tmp_path / "runs"
    for name in ("ImageWarmupStage", "MixedStage"):
        assert main(["fit", f"--config={tmp_path / name}.yaml", f"--runs={runs}"]) == 0
    alone = {path: path.stat().st_mtime_ns for path in runs.rglob("*.ckpt")}
    command = ["chain", f"--config={shorten(chain, 3)}", f"--runs={runs}"]
    assert main([*command, "--trainer.max_time=00:00:00:00"]) == 0  # interrupted
    for _ in range(2):
        assert main(command) == 0
    shown = capsys.readouterr().out
    in_use = runs / "MixedStage_chain"
    assert f"{runs / 'MixedStage'} has a run that did not begin from {runs / 'ImageWarmupStage'}: the chain" in shown
    assert f"stage 2 of 3, {in_use}: finished at step {STEPS}\n" in shown
    assert {path: path.stat().st_mtime_ns for path in alone} == alone
    origins = [read_checkpoint(run)["gpdit"]["origin"]["path"] for run in (in_use, runs / "LongVideoStage")]
    assert origins == [str(runs / "ImageWarmupStage"), str(in_use)]


@pytest.mark.parametrize(
    ("kinds", "trained"),
    [
        (["image"], ["ImageWarmupStage"]),
        (["video"], ["MixedStage", "LongVideoStage"]),
        (["image", "sequence"], ["ImageWarmupStage", "FewShotStage"]),
    ],
)
def test_a_chain_trains_the_stages_for_which_there_are_data(
    kinds: list[str],
    trained: list[str],
    chain: Path,
    write_shards: Callable[..., Manifest],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    frames = {"image": 1, "video": 3, "sequence": 6}
    folders = []
    for kind in kinds:
        folders.append(write_shards(tmp_path / kind, {("train", kind, (frames[kind], 8, 8)): 3}).directory)
    runs = tmp_path / "runs"
    command = ["chain", f"--config={chain}", f"--runs={runs}", "--trainer.max_steps=1"]
    assert main([*command, "--data_dir", *map(str, folders)]) == 0
    assert {run.name for run in runs.iterdir()} == {*trained}
    shown = capsys.readouterr().out
    assert shown.count("is left out: ") == 4 - len(trained)
    origins = [read_checkpoint(runs / name)["gpdit"]["origin"] for name in trained]
    assert [origin and origin["path"] for origin in origins] == [None, *(str(runs / name) for name in trained[:-1])]
    if kinds == ["video"]:
        assert "stage 4 of 4 (FewShotStage) is left out: " in shown
        assert f"then give --data_dir {folders[0]} latents/pairs" in shown


def test_other_data_of_an_existing_chain_are_noticed(
    chain: Path, write_shards: Callable[..., Manifest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished stage says so; one that would resume is refused."""
    shorten(chain, 2)
    other = str(write_shards(tmp_path / "other", {("train", "image", (1, 8, 8)): 9}).directory)
    runs = f"--runs={tmp_path / 'runs'}"
    command, alone = (
        ["chain", f"--config={chain}", runs],
        ["fit", f"--config={tmp_path / 'ImageWarmupStage.yaml'}", runs],
    )
    assert main([*alone, "--trainer.max_steps=1"]) == 0
    assert main([*command, "--data_dir", other]) == 2
    assert "for a chain --runs NEW" in capsys.readouterr().err
    assert main(alone) == 0
    assert main([*command, "--data_dir", other]) == 0
    assert f"finished at step {STEPS}, on other data (to train on these, give --runs NEW)" in capsys.readouterr().out


def test_a_chain_ends_with_a_stage_that_reaches_its_time_limit(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["chain", "-c", str(shorten(chain, 2)), f"--runs={tmp_path / 'runs'}"]
    assert main([*command, "--trainer.max_time=00:00:00:00"]) == 0
    assert re.search(rf"stage 1 of 2, .*: ended at step \d of {STEPS}; the same command", capsys.readouterr().out)
    assert not (tmp_path / "runs" / "MixedStage").exists()
    assert main([*command, "--run_dir=one"]) == 2
    assert "have the run folder one: give --runs" in capsys.readouterr().err
    assert main([*command, "--trainer.max_steps=-1"]) == 2
    assert "ImageWarmupStage.yaml: trainer.max_steps is -1: give a number from 1 to " in capsys.readouterr().err
    assert main(command) == 0


def test_missing_data_and_recipes_are_reported_before_training(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["chain", "-c", str(chain), f"--runs={tmp_path / 'runs'}"]
    recipe = yaml.safe_load((tmp_path / "FewShotStage.yaml").read_text())
    recipe["data"]["sequences"]["manifests"] = [str(tmp_path / "nowhere")]
    (tmp_path / "FewShotStage.yaml").write_text(yaml.safe_dump(recipe))
    assert main(command) == 2
    assert "prepare-pairs" in capsys.readouterr().err
    (tmp_path / "FewShotStage.yaml").unlink()
    assert main(command) == 2
    assert "FewShotStage.yaml does not exist" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_stage_does_not_start_from_damaged_weights(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A changed byte in the only checkpoint of its predecessor."""
    assert main(["fit", f"--config={tmp_path / 'ImageWarmupStage.yaml'}", f"--runs={tmp_path / 'runs'}"]) == 0
    damaged = damage_last_of(tmp_path / "runs" / "ImageWarmupStage")
    for other in damaged.parent.glob("step-*.ckpt"):
        if other != damaged:
            other.with_name(other.name + ".complete").unlink()
    assert main(["chain", f"--config={chain}", f"--runs={tmp_path / 'runs'}"]) == 2
    assert "has another sha256 than when it was written" in capsys.readouterr().err


def damage_last_of(run_dir: Path) -> Path:
    damaged = last_checkpoint(run_dir)
    assert damaged is not None
    content = bytearray((damaged / "training.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "training.ckpt").write_bytes(content)
    return damaged


def test_a_stage_with_a_damaged_last_checkpoint_resumes_from_the_previous_one(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    shorten(chain, 2)
    first, mixed = runs / "ImageWarmupStage", runs / "MixedStage"
    assert main(["fit", f"--config={tmp_path / 'ImageWarmupStage.yaml'}", f"--runs={runs}"]) == 0
    damage_last_of(first)
    before = first / "checkpoints" / f"step-{STEPS - 1}.ckpt"
    alone = ["fit", f"--config={tmp_path / 'MixedStage.yaml'}", f"--runs={runs}"]
    assert main([*alone, f"--model.init_args.initial_weights={first}"]) == 0
    expected = {"path": str(first), "step": STEPS - 1, "sha256": sha256_of_weights(before)}
    assert read_checkpoint(mixed)["gpdit"]["origin"] == expected
    capsys.readouterr()
    assert main(["chain", f"--config={chain}", f"--runs={runs}"]) == 2
    damage = f"{first}/checkpoints/step-{STEPS}.ckpt is not complete ({DAMAGED})"
    message = f"{first} is at step {STEPS - 1} of {STEPS}, since {damage}, but {mixed} has begun from it"
    assert message in capsys.readouterr().err
    shutil.rmtree(mixed)
    assert main(["chain", f"--config={chain}", f"--runs={runs}"]) == 0
    assert f"ImageWarmupStage: resumes from step {STEPS - 1}" in capsys.readouterr().out
    assert [read_checkpoint(run)["global_step"] for run in (first, mixed)] == [STEPS] * 2


def test_a_stage_whose_predecessor_was_damaged_later_is_refused_with_the_damaged_file(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    first, mixed = runs / "ImageWarmupStage", runs / "MixedStage"
    command = ["chain", f"--config={shorten(chain, 2)}", f"--runs={runs}"]
    assert main(command) == 0
    damaged = damage_last_of(first)
    capsys.readouterr()
    assert main(command) == 2
    assert (
        f"error: {mixed} began from the weights of {first} (step {STEPS}), not from the current weights of {first} "
        f"(step {STEPS - 1}, since {damaged} is not complete ({DAMAGED})): "
    ) in capsys.readouterr().err


@pytest.mark.parametrize("text", ["stages: []", "stages: one.yaml", "run_dir: x"])
def test_a_file_without_a_list_of_stages_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no.yaml").write_text(text)
    assert main(["chain", "--config", str(tmp_path / "no.yaml")]) == 2
    assert "no.yaml is not a chain" in capsys.readouterr().err


def test_the_file_of_an_invalid_stage_is_named(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outer = chain.with_name("outer.yaml")
    outer.write_text(f"stages: [ImageWarmupStage.yaml, {chain.name}]")
    assert main(["chain", "--config", str(outer)]) == 2
    assert f"error: {outer} lists {chain}, which is a chain itself: list its recipes" in capsys.readouterr().err
    for words in (["fit", "--config", str(outer)], ["chain", "--config", str(chain), str(outer)]):
        assert main(words) == 2
        assert f"{outer} is a chain of stages: give it to `chain` as the first --config" in capsys.readouterr().err
    mixed = chain.with_name("MixedStage.yaml")
    mixed.write_text(mixed.read_text().replace("max_steps", "max_stepz"))
    assert main(["chain", "--config", str(chain)]) == 2
    assert f"error: {mixed}: the recipe or the command line cannot be used: " in capsys.readouterr().err


def test_settings_in_the_file_of_a_chain_are_refused(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No stage would use them."""
    edited = chain.with_name("edited.yaml")
    edited.write_text(chain.read_text() + "\nrun_dir: x\ntrainer: {max_steps: 1}\n")
    assert main(["chain", "--config", str(edited)]) == 2
    assert "edited.yaml has run_dir, trainer beside stages, which no stage uses" in capsys.readouterr().err


def test_an_unknown_option_gets_the_nearest_option_of_fit(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chain", "--config", str(chain), "--trainer.max_stepz=3"]) == 2
    assert "did you mean --trainer.max_steps?" in capsys.readouterr().err


def test_print_config_prints_the_recipe_of_each_stage(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chain", f"--config={chain}", "--runs=elsewhere", "--latents=none", "--print_config"]) == 0
    recipes = list(yaml.safe_load_all(capsys.readouterr().out))
    names = ["ImageWarmupStage", "MixedStage", "LongVideoStage", "FewShotStage"]
    assert [recipe["run_dir"] for recipe in recipes] == [f"elsewhere/{name}" for name in names]
    origins = [recipe["model"]["init_args"]["initial_weights"] for recipe in recipes]
    assert origins == [None, *(f"elsewhere/{name}" for name in names[:-1])]
