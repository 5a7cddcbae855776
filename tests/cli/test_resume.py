"""Interrupted and resumed equals uninterrupted, bit for bit, through the command a user types."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpdit_lightning.checkpoints.files import read_checkpoint
from gpdit_lightning.cli import main
from tests.conftest import TINY_CODEC

STEPS = 6


def recipe(shards: Path, run_dir: Path, **data: Any) -> dict[str, Any]:
    return {
        "run_dir": str(run_dir),
        "model": {
            "class_path": "MixedStage",
            "init_args": {
                "backbone": {
                    "size": "tiny",
                    "layers": 2,
                    "width": 24,
                    "heads": 2,
                    "mlp_width": 48,
                    "latent_channels": 4,
                },
                "optimizer": {"learning_rate": 3e-3, "warmup_steps": 3, "decay": "cosine"},
            },
        },
        "data": {
            "seed": 5,
            "context_dropout": 0.25,
            "images": {"manifests": [str(shards)], "batch_size": 4},
            "videos": {"manifests": [str(shards)], "batch_size": 4, "micro_batches": 2},
            "validation_batches": 1,
            **data,
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": STEPS,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 4,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "validate_every_steps": 2,
        "ema": {"decay": 0.9},
        "checkpoint": {"every_steps": 1, "keep_every_steps": 1},
    }


def fit(path: Path, settings: dict[str, Any], *overrides: str) -> int:
    path.write_text(yaml.safe_dump(settings))
    return main(["fit", "--config", str(path), *overrides])


def curves(run_dir: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("perf/")]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


def left_at(run_dir: Path, whole: Path, step: int) -> None:
    """Make a run folder as `whole` was when its process died right after saving a step."""
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    shutil.copytree(whole / "checkpoints" / f"step-{step}.ckpt", run_dir / "checkpoints" / f"step-{step}.ckpt")
    shutil.copy(whole / "checkpoints" / f"step-{step}.ckpt.complete", run_dir / "checkpoints")
    (run_dir / "checkpoints" / "last.ckpt").symlink_to(f"step-{step}.ckpt")


def later(values: dict[int, float], step: int) -> dict[int, float]:
    return {at: value for at, value in values.items() if at > step}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Weights, average, moments and schedule of two checkpoints are bitwise the same."""
    assert one["global_step"] == other["global_step"]
    assert one["lr_schedulers"] == other["lr_schedulers"]
    assert one["ema"]["updates"] == other["ema"]["updates"]
    for mine, theirs in (
        (one["state_dict"], other["state_dict"]),
        (one["ema"]["weights"], other["ema"]["weights"]),
        *zip(one["optimizer_states"][0]["state"].values(), other["optimizer_states"][0]["state"].values(), strict=True),
    ):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert torch.equal(value, theirs[name]), name


@pytest.fixture(scope="module")
def whole(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted run."""
    directory = tmp_path_factory.mktemp("whole")
    assert fit(directory / "recipe.yaml", recipe(tiny_shards, directory / "run")) == 0
    return directory / "run"


@pytest.mark.parametrize("step", [1, 2, 3, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_at_a_step_and_resumed(whole: Path, tiny_shards: Path, tmp_path: Path, step: int, workers: int) -> None:
    """The run folder as it was when the process died right after saving `step` (validation follows steps 2, 4, 6)."""
    run_dir = tmp_path / "run"
    left_at(run_dir, whole, step)
    assert fit(tmp_path / "recipe.yaml", recipe(tiny_shards, run_dir, workers=workers)) == 0
    last = "checkpoints/last.ckpt"
    assert_same(read_checkpoint(run_dir / last), read_checkpoint(whole / last))
    mine, theirs = curves(run_dir), curves(whole)
    for tag, values in theirs.items():
        assert later(mine.get(tag, {}), step) == later(values, step), tag


def test_without_the_data_position_it_would_differ(
    whole: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: a loader that starts over after a resume ends elsewhere, so the test above can fail."""
    from gpdit_lightning.data import datamodule

    from_zero = datamodule.RangeSampler
    monkeypatch.setattr(datamodule, "RangeSampler", lambda start, stop: from_zero(0, stop))
    run_dir = tmp_path / "run"
    left_at(run_dir, whole, 3)
    assert fit(tmp_path / "recipe.yaml", recipe(tiny_shards, run_dir)) == 0
    with pytest.raises(AssertionError):
        assert_same(
            read_checkpoint(run_dir / "checkpoints" / "last.ckpt"), read_checkpoint(whole / "checkpoints" / "last.ckpt")
        )


def test_killed_without_warning(whole: Path, tiny_shards: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of training, then the same command."""
    settings = recipe(tiny_shards, tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "gpdit_lightning", "fit", "--config", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    assert fit(tmp_path / "recipe.yaml", settings) == 0
    assert_same(read_checkpoint(checkpoint), read_checkpoint(whole / "checkpoints" / "last.ckpt"))


def test_a_finished_run_has_nothing_left_to_do(whole: Path, tiny_shards: Path, tmp_path: Path) -> None:
    before = (whole / "checkpoints" / "last.ckpt" / "training.ckpt").read_bytes()
    assert fit(tmp_path / "recipe.yaml", recipe(tiny_shards, whole)) == 0
    assert (whole / "checkpoints" / "last.ckpt" / "training.ckpt").read_bytes() == before


def test_other_data_order_is_refused(
    whole: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path / "recipe.yaml", recipe(tiny_shards, whole, seed=6)) == 2
    message = capsys.readouterr().err
    assert "data.seed = 5" in message
    assert "initial_weights" in message


def test_other_architecture_is_refused(
    whole: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = recipe(tiny_shards, whole)
    assert fit(tmp_path / "recipe.yaml", settings, "--model.init_args.backbone.width=48") == 2
    assert "width = 24" in capsys.readouterr().err


def test_initial_weights_are_the_average(whole: Path, tiny_shards: Path, tmp_path: Path) -> None:
    """A following stage begins with its predecessor's EMA."""
    settings = recipe(tiny_shards, tmp_path / "run")
    settings["model"]["init_args"]["initial_weights"] = str(whole)
    settings["model"]["init_args"]["optimizer"] = {"learning_rate": 1e-12}
    settings["trainer"]["max_steps"] = 1
    assert fit(tmp_path / "recipe.yaml", settings) == 0
    settings["model"]["init_args"]["initial_weights"] = str(tmp_path / "gone")
    assert fit(tmp_path / "recipe.yaml", settings) == 0  # not needed any more
    begun = read_checkpoint(tmp_path / "run")["state_dict"]
    for name, average in read_checkpoint(whole)["ema"]["weights"].items():
        torch.testing.assert_close(begun[name], average, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("verb", "tag"), [("validate", "val/loss"), ("test", "test/loss")])
def test_evaluation_of_the_last_checkpoint(
    whole: Path, tiny_shards: Path, tmp_path: Path, verb: str, tag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It prints the loss that training logged at its end, and leaves the curves alone."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(tiny_shards, whole)))
    before = curves(whole)
    assert main([verb, "--config", str(path)]) == 0
    shown = capsys.readouterr().out
    assert tag in shown
    assert f"{before['val/loss'][STEPS]:.5f}" in shown
    assert curves(whole) == before


def test_initial_weights_of_another_codec_are_refused(
    whole: Path, write_shards: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {("train", "image", (1, 8, 8)): 4, ("train", "video", (3, 8, 8)): 4}
    other = write_shards(tmp_path / "other", counts, codec=replace(TINY_CODEC, fingerprint="fedcba9876543210"))
    settings = recipe(other.directory, tmp_path / "run")
    settings["model"]["init_args"]["initial_weights"] = str(whole)
    assert fit(tmp_path / "recipe.yaml", settings) == 2
    assert "different codecs" in capsys.readouterr().err


def test_two_runs_do_not_share_a_folder(
    whole: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another process that trains there is noticed, and one that was killed is not in the way."""
    hold = (
        "import sys, time; from pathlib import Path; from gpdit_lightning.files import process_lock\n"
        "with process_lock(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    lock = whole / ".lock"
    other = subprocess.Popen([sys.executable, "-c", hold, str(lock)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    assert fit(tmp_path / "recipe.yaml", recipe(tiny_shards, whole)) == 2
    assert f"another process trains in {whole}" in capsys.readouterr().err
    other.kill()
    other.communicate()
    assert fit(tmp_path / "recipe.yaml", recipe(tiny_shards, whole)) == 0


def test_the_recipes_optimizer_counts_after_a_resume(
    whole: Path, tiny_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not the checkpoint's: whoever lowers the learning rate to go on means it."""
    run_dir = tmp_path / "run"
    left_at(run_dir, whole, 4)
    settings = recipe(tiny_shards, run_dir)
    optimizer = {"learning_rate": 1e-5, "decay": "constant", "weight_decay": 0.1, "betas": [0.8, 0.9]}
    settings["model"]["init_args"]["optimizer"] = optimizer
    settings["trainer"]["log_every_n_steps"] = 1
    caplog.set_level("INFO", "gpdit_lightning")
    assert fit(tmp_path / "recipe.yaml", settings) == 0
    group = read_checkpoint(run_dir)["optimizer_states"][0]["param_groups"][0]
    assert (group["lr"], group["weight_decay"], tuple(group["betas"])) == (1e-5, 0.1, (0.8, 0.9))
    assert later(curves(run_dir)["train/lr"], 4) == pytest.approx({5: 1e-5, 6: 1e-5})
    assert "optimizer.learning_rate is 1e-05 from now on; it was 0.003" in caplog.text


def test_another_noise_schedule_is_refused(
    whole: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    assert fit(path, recipe(tiny_shards, whole), "--model.init_args.schedule.shift=3") == 2
    assert "noise schedule {'name': 'cosine', 'shift': 1.0} and the recipe has" in capsys.readouterr().err


def test_a_checkpoint_known_to_be_torn_does_not_count_as_kept(whole: Path, tiny_shards: Path, tmp_path: Path) -> None:
    """The run goes on from the one before, which must not be pruned in favour of the torn one."""
    run_dir = tmp_path / "run"
    for step in (4, 5):
        (run_dir / "checkpoints" / "last.ckpt").unlink(missing_ok=True)
        left_at(run_dir, whole, step)
    torn = run_dir / "checkpoints" / "step-5.ckpt"
    content = bytearray((torn / "ema.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (torn / "ema.safetensors").write_bytes(content)
    settings = recipe(tiny_shards, run_dir)
    settings["checkpoint"] = {"every_steps": 100, "keep_last": 2}
    assert fit(tmp_path / "recipe.yaml", settings) == 0
    marks = {path.name for path in torn.parent.glob("*.complete")}
    assert marks == {"step-4.ckpt.complete", "step-6.ckpt.complete"}
    assert_same(read_checkpoint(run_dir), read_checkpoint(whole))
