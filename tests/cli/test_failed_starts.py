"""A training that fails before its first step leaves the run folder as it was."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Callback, Trainer

from gpdit_lightning.errors import InputError
from gpdit_lightning.training.loggers import order_event_files
from tests.cli.test_resume import fit, recipe


class Fails(Callback):
    """Fails at the first micro-batch, in the first step, or at the first event of the start."""

    def __init__(self, at: str, step: int = 0, memory: bool = False) -> None:
        self.at, self.step, self.memory = at, step, memory

    def fail(self, at: str, trainer: Trainer) -> None:
        if (at, trainer.global_step) == (self.at, self.step):
            if self.memory:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
            raise InputError("the test fails here.")

    def on_fit_start(self, trainer: Trainer, *_: Any) -> None:
        self.fail("start", trainer)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.fail("batch", trainer)

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        self.fail("step", trainer)


def settings(shards: Path, run_dir: Path, **fails: Any) -> dict[str, Any]:
    values = recipe(shards, run_dir)
    values["trainer"]["logger"] = [{"class_path": "TensorBoardLogger"}, {"class_path": "CSVLogger"}]
    values["trainer"]["log_every_n_steps"] = 1
    if fails:
        values["trainer"]["callbacks"] = [{"class_path": "tests.cli.test_failed_starts.Fails", "init_args": fails}]
    return values


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("at", ["start", "batch", "step"])
def test_a_new_run_leaves_nothing(tiny_shards: Path, tmp_path: Path, capsys: Any, at: str) -> None:
    assert fit(tmp_path / "recipe.yaml", settings(tiny_shards, tmp_path / "runs" / "new" / "run", at=at)) == 2
    assert capsys.readouterr().err.endswith("error: the test fails here.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_weights_that_do_not_exist_leave_nothing(tiny_shards: Path, tmp_path: Path) -> None:
    given = ["--model.init_args.initial_weights", str(tmp_path / "missing")]
    assert fit(tmp_path / "recipe.yaml", settings(tiny_shards, tmp_path / "run"), *given) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_other_files_of_the_folder_are_kept(tiny_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "csv").mkdir(parents=True)
    (tmp_path / "run" / "csv" / "notes.txt").write_text("mine")
    assert fit(tmp_path / "recipe.yaml", settings(tiny_shards, tmp_path / "run", at="step")) == 2
    assert content_of(tmp_path / "run") == {"csv/notes.txt": b"mine"}


@pytest.fixture(scope="module")
def trained(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder after 3 steps, of which step 2 is the last that is saved."""
    folder = tmp_path_factory.mktemp("trained")
    values = settings(tiny_shards, folder / "run", at="batch", step=3)
    assert fit(folder / "recipe.yaml", values | {"checkpoint": {"every_steps": 2}}) == 2
    assert "checkpoints/step-2.ckpt/training.ckpt" in content_of(folder / "run")
    order_event_files(folder / "run")  # a restart in the same second would rename them
    return folder / "run"


@pytest.mark.parametrize("at", ["start", "step"])
def test_a_failed_restart_leaves_the_run_as_it_was(tiny_shards: Path, trained: Path, tmp_path: Path, at: str) -> None:
    """Logs contain step 3, which a run that continues from step 2 drops; config.yaml has another interval."""
    before = content_of(trained)
    assert b"loss" in before["csv/metrics.csv"]
    step = {"start": 0, "step": 2}[at]
    assert (
        fit(tmp_path / "recipe.yaml", settings(tiny_shards, trained, at=at, step=step) | {"ema": {"decay": 0.5}}) == 2
    )
    assert content_of(trained) == before


def test_a_restart_does_not_read_its_initial_weights_but_refuses_a_pipe(
    tiny_shards: Path, trained: Path, tmp_path: Path, capsys: Any
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    messages = {
        "pipe": f"{tmp_path / 'pipe'} is not a regular file",
        "empty": "the test fails here",
        "missing": "the test fails here",
    }
    for name, message in messages.items():
        given = f"--model.init_args.initial_weights={tmp_path / name}"
        assert fit(tmp_path / "recipe.yaml", settings(tiny_shards, trained, at="start"), given) == 2
        assert message in capsys.readouterr().err


def test_a_run_that_fails_later_keeps_its_files(trained: Path) -> None:
    names = content_of(trained)
    assert {"config.yaml", ".lock", "csv/metrics.csv"} <= names.keys()
    assert yaml.safe_load(names["config.yaml"])["trainer"]["max_steps"] == 6


def test_a_lack_of_memory_names_the_options_that_need_less(tiny_shards: Path, tmp_path: Path, capsys: Any) -> None:
    """The first run has no checkpoint; the second has one, after which micro_batches cannot change."""
    cures = (
        "raise data.SOURCE.micro_batches (of images, videos or sequences) to divide a step into smaller passes;",
        "smaller passes, which needs a new run with",
    )
    for step, cure in zip((0, 3), cures, strict=True):
        values = settings(tiny_shards, tmp_path / "run", at="batch", step=step, memory=True)
        assert fit(tmp_path / "recipe.yaml", values | {"checkpoint": {"every_steps": 2}}) == 2
        message = capsys.readouterr().err
        assert "error: memory ran out (CUDA out of memory. Tried to allocate 2 GiB.): set model.init_args." in message
        assert cure in message
