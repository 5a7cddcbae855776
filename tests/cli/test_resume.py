"""A run that is interrupted and resumed by the same command equals an uninterrupted one, bit for bit."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from lightning import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpdit_lightning.cli import main
from tests.checkpoints.content import read_checkpoint
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


def logged_scalars(run_dir: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("system/")]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


def make_interrupted_run(run_dir: Path, uninterrupted: Path, step: int) -> None:
    """Make the run folder of a process that was killed right after it saved a step."""
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    shutil.copytree(uninterrupted / "checkpoints" / f"step-{step}.ckpt", run_dir / "checkpoints" / f"step-{step}.ckpt")
    shutil.copy(uninterrupted / "checkpoints" / f"step-{step}.ckpt.complete", run_dir / "checkpoints")
    (run_dir / "checkpoints" / "last.ckpt").symlink_to(f"step-{step}.ckpt")


def after_step(values: dict[int, float], step: int) -> dict[int, float]:
    return {at: value for at, value in values.items() if at > step}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Weights, average, optimizer state and schedule of two checkpoints are bit-equal."""
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


class Workers(Callback):
    """Records the number of loader processes at every micro-batch."""

    counts: ClassVar[list[int]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.counts.append(len(multiprocessing.active_children()))


def test_the_loader_processes_of_a_validation_end_with_it(tiny_shards: Path, tmp_path: Path) -> None:
    """Validation comes after steps 2, 4 and 6, so that at most two loaders exist at a time."""
    settings = recipe(tiny_shards, tmp_path / "run", workers=2)
    settings["trainer"]["callbacks"] = [{"class_path": f"{__name__}.Workers"}]
    Workers.counts.clear()
    assert fit(tmp_path / "recipe.yaml", settings) == 0
    assert Workers.counts == [2] * 3 * STEPS


@pytest.fixture(scope="module")
def uninterrupted(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted run."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    assert fit(directory / "recipe.yaml", recipe(tiny_shards, directory / "run")) == 0
    return directory / "run"


@pytest.mark.parametrize(("step", "workers"), [(1, 0), (2, 0), (2, 2), (5, 2)])
def test_a_run_that_resumes_at_a_step_ends_bit_equal(
    uninterrupted: Path, tiny_shards: Path, tmp_path: Path, step: int, workers: int
) -> None:
    """Validation comes after steps 2, 4 and 6."""
    run_dir = tmp_path / "run"
    make_interrupted_run(run_dir, uninterrupted, step)
    assert fit(tmp_path / "recipe.yaml", recipe(tiny_shards, run_dir, workers=workers)) == 0
    last = "checkpoints/last.ckpt"
    assert_same(read_checkpoint(run_dir / last), read_checkpoint(uninterrupted / last))
    mine, theirs = logged_scalars(run_dir), logged_scalars(uninterrupted)
    for tag, values in theirs.items():
        assert after_step(mine.get(tag, {}), step) == after_step(values, step), tag


def test_alternating_sources_resume_within_a_cycle(tiny_shards: Path, tmp_path: Path) -> None:
    """After step 3, an image step, in the middle of a logged interval."""
    images = {"manifests": [str(tiny_shards)], "batch_size": 4, "micro_batches": 2}
    whole, resumed = (
        recipe(tiny_shards, tmp_path / name, images=images, sampling="alternate") for name in ("whole", "resumed")
    )
    assert fit(tmp_path / "recipe.yaml", whole) == 0
    make_interrupted_run(tmp_path / "resumed", tmp_path / "whole", 3)
    assert fit(tmp_path / "recipe.yaml", resumed) == 0
    last = "checkpoints/last.ckpt"
    assert_same(read_checkpoint(tmp_path / "resumed" / last), read_checkpoint(tmp_path / "whole" / last))
    theirs, mine = logged_scalars(tmp_path / "whole"), logged_scalars(tmp_path / "resumed")
    assert theirs["train/loss_images"].keys() == {1, 4, 6}
    assert theirs["train/loss_videos"].keys() == {4, 6}
    assert mine == {tag: after_step(values, 3) for tag, values in theirs.items()}


def test_a_loader_that_starts_over_at_a_resume_gives_another_result(
    uninterrupted: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the test above can fail."""
    from gpdit_lightning.data import datamodule

    from_zero = datamodule.RangeSampler
    monkeypatch.setattr(datamodule, "RangeSampler", lambda start, stop: from_zero(0, stop))
    run_dir = tmp_path / "run"
    make_interrupted_run(run_dir, uninterrupted, 3)
    assert fit(tmp_path / "recipe.yaml", recipe(tiny_shards, run_dir)) == 0
    with pytest.raises(AssertionError):
        assert_same(
            read_checkpoint(run_dir / "checkpoints" / "last.ckpt"),
            read_checkpoint(uninterrupted / "checkpoints" / "last.ckpt"),
        )


def test_a_killed_run_resumes_and_ends_bit_equal(uninterrupted: Path, tiny_shards: Path, tmp_path: Path) -> None:
    """SIGKILL during training, then the same command."""
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
    assert_same(read_checkpoint(checkpoint), read_checkpoint(uninterrupted / "checkpoints" / "last.ckpt"))


def test_a_finished_run_is_not_changed(uninterrupted: Path, tiny_shards: Path, tmp_path: Path) -> None:
    before = (uninterrupted / "checkpoints" / "last.ckpt" / "training.ckpt").read_bytes()
    assert fit(tmp_path / "recipe.yaml", recipe(tiny_shards, uninterrupted)) == 0
    assert (uninterrupted / "checkpoints" / "last.ckpt" / "training.ckpt").read_bytes() == before


def test_changed_settings_of_a_finished_run_are_said_to_have_no_effect(
    uninterrupted: Path, tiny_shards: Path, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    settings = recipe(tiny_shards, uninterrupted)
    assert fit(tmp_path / "recipe.yaml", settings) == 0
    assert "no effect" not in messages.text
    initial_weights = f"--model.init_args.initial_weights={tmp_path}"
    assert fit(tmp_path / "recipe.yaml", settings, "--seed_everything=3", initial_weights) == 0
    assert (
        "the weights are those of the checkpoint, so that these have no effect: seed_everything is 3 (it was 0); "
        f"model.init_args.initial_weights is '{tmp_path}' (it was None)"
    ) in messages.messages
    assert "changed settings" not in messages.text
    assert fit(tmp_path / "recipe.yaml", settings, "--model.init_args.optimizer.learning_rate=1e-5") == 0
    assert (
        "warning: changed settings have no effect, since no step is left "
        "(model.init_args.optimizer.learning_rate is 1e-05 (it was 0.003)): raise trainer.max_steps"
    ) in messages.text


def test_a_run_that_a_time_limit_ends_is_not_called_finished(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = recipe(tiny_shards, tmp_path / "run")
    assert fit(tmp_path / "recipe.yaml", settings, "--trainer.max_time=00:00:00:00") == 0
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line == f"stopped at step 0 of {STEPS}; the same command resumes"


def test_another_data_order_is_refused(
    uninterrupted: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path / "recipe.yaml", recipe(tiny_shards, uninterrupted, seed=6)) == 2
    message = capsys.readouterr().err
    assert "data.seed = 5" in message
    assert "initial_weights" in message


@pytest.mark.parametrize("steps", [STEPS, STEPS + 1])
def test_another_architecture_is_refused_before_changes_are_announced(
    steps: int,
    uninterrupted: Path,
    tiny_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    messages: pytest.LogCaptureFixture,
) -> None:
    settings, changes = recipe(tiny_shards, uninterrupted), ["--model.init_args.backbone.width=48"]
    assert fit(tmp_path / "recipe.yaml", settings, f"--trainer.max_steps={steps}", *changes) == 2
    assert "width = 24" in capsys.readouterr().err
    assert "changed settings" not in messages.text


def test_initial_weights_are_the_average(uninterrupted: Path, tiny_shards: Path, tmp_path: Path) -> None:
    """A stage starts from the average of its predecessor, which may be removed after the first checkpoint."""
    settings = recipe(tiny_shards, tmp_path / "run")
    settings["model"]["init_args"]["initial_weights"] = str(uninterrupted)
    settings["model"]["init_args"]["optimizer"] = {"learning_rate": 1e-12}
    settings["trainer"]["max_steps"] = 1
    assert fit(tmp_path / "recipe.yaml", settings) == 0
    settings["model"]["init_args"]["initial_weights"] = str(tmp_path / "gone")
    assert fit(tmp_path / "recipe.yaml", settings) == 0  # resumes
    begun = read_checkpoint(tmp_path / "run")["state_dict"]
    for name, average in read_checkpoint(uninterrupted)["ema"]["weights"].items():
        torch.testing.assert_close(begun[name], average, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("verb", "tag"), [("validate", "loss/val"), ("test", "loss/test")])
def test_evaluation_of_the_last_checkpoint(
    uninterrupted: Path, tiny_shards: Path, tmp_path: Path, verb: str, tag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints the last validation loss of the training, and adds nothing to its logs."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(tiny_shards, uninterrupted)))
    before = logged_scalars(uninterrupted)
    assert main([verb, "--config", str(path)]) == 0
    shown = capsys.readouterr().out
    assert tag in shown
    assert f"{before['loss/val'][STEPS]:.5f}" in shown
    assert logged_scalars(uninterrupted) == before


def test_initial_weights_of_another_codec_are_refused(
    uninterrupted: Path, write_shards: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {("train", "image", (1, 8, 8)): 4, ("train", "video", (3, 8, 8)): 4}
    other = write_shards(tmp_path / "other", counts, codec=replace(TINY_CODEC, fingerprint="fedcba9876543210"))
    settings = recipe(other.directory, tmp_path / "run")
    settings["model"]["init_args"]["initial_weights"] = str(uninterrupted)
    assert fit(tmp_path / "recipe.yaml", settings) == 2
    assert "different codecs" in capsys.readouterr().err


def test_a_run_folder_is_locked_during_training(
    uninterrupted: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lock ends with the process that holds it, also when it is killed."""
    hold = (
        "import sys, time; from pathlib import Path; from gpdit_lightning.files import process_lock\n"
        "with process_lock(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    lock = uninterrupted / ".lock"
    other = subprocess.Popen([sys.executable, "-c", hold, str(lock)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    assert fit(tmp_path / "recipe.yaml", recipe(tiny_shards, uninterrupted)) == 2
    assert f"another process trains in {uninterrupted}" in capsys.readouterr().err
    other.kill()
    other.communicate()
    assert fit(tmp_path / "recipe.yaml", recipe(tiny_shards, uninterrupted)) == 0


def test_a_resumed_run_uses_the_optimizer_settings_of_the_recipe(
    uninterrupted: Path, tiny_shards: Path, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    """Not those of the checkpoint."""
    run_dir = tmp_path / "run"
    make_interrupted_run(run_dir, uninterrupted, 4)
    shutil.copy(uninterrupted / "config.yaml", run_dir)
    settings = recipe(tiny_shards, run_dir)
    optimizer = {"learning_rate": 1e-5, "decay": "constant", "weight_decay": 0.1, "betas": [0.8, 0.9]}
    settings["model"]["init_args"]["optimizer"] = optimizer
    settings["trainer"]["log_every_n_steps"] = 1
    assert fit(tmp_path / "recipe.yaml", settings) == 0
    group = read_checkpoint(run_dir)["optimizer_states"][0]["param_groups"][0]
    assert (group["lr"], group["weight_decay"], tuple(group["betas"])) == (1e-5, 0.1, (0.8, 0.9))
    assert after_step(logged_scalars(run_dir)["train/lr"], 4) == pytest.approx({5: 1e-5, 6: 1e-5})
    (line,) = [message for message in messages.messages if "changed settings" in message]
    changes = line.removeprefix("the run resumes with changed settings: ").split("; ")
    assert "model.init_args.optimizer.learning_rate is 1e-05 (it was 0.003)" in changes
    assert "model.init_args.optimizer.decay is 'constant' (it was 'cosine')" in changes


def test_another_noise_schedule_is_refused(
    uninterrupted: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    assert fit(path, recipe(tiny_shards, uninterrupted), "--model.init_args.schedule.shift=3") == 2
    assert "noise schedule {'name': 'cosine', 'shift': 1.0} and the recipe has" in capsys.readouterr().err


def test_a_damaged_checkpoint_does_not_count_in_keep_last(
    uninterrupted: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    """The run resumes from the previous one, which must not be removed in favour of the damaged one."""
    run_dir = tmp_path / "run"
    for step in (4, 5):
        (run_dir / "checkpoints" / "last.ckpt").unlink(missing_ok=True)
        make_interrupted_run(run_dir, uninterrupted, step)
    damaged = run_dir / "checkpoints" / "step-5.ckpt"
    content = bytearray((damaged / "ema.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "ema.safetensors").write_bytes(content)
    settings = recipe(tiny_shards, run_dir)
    settings["checkpoint"] = {"every_steps": 100, "keep_last": 2}
    assert fit(tmp_path / "recipe.yaml", settings) == 0
    marks = {path.name for path in damaged.parent.glob("*.complete")}
    assert marks == {"step-4.ckpt.complete", "step-6.ckpt.complete"}
    assert_same(read_checkpoint(run_dir), read_checkpoint(uninterrupted))
