"""`trainer.logger` and `trainer.callbacks` of a recipe are used by the run and recorded in its config.yaml."""

import csv
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpdit_lightning.cli import main
from tests.cli.test_resume import fit, logged_scalars, make_interrupted_run, recipe
from tests.training.callbacks.test_previews import make_shards

# A module with a custom logger and a custom callback.
PARTS = '''
import json
from pathlib import Path

from lightning import Callback
from lightning.pytorch.loggers.logger import Logger


class Lines(Logger):
    """A line of JSON for each call."""

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self.path = Path(save_dir, "lines.jsonl")

    name, version = "lines", ""

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.write(step, sorted(metrics))

    def log_image(self, key, images, step):
        self.write(step, [key, *images])

    def write(self, step, content):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps([step, content]) + "\\n")


class Order(Callback):
    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_start(self, trainer, pl_module):
        names = [getattr(callback, "name", type(callback).__name__) for callback in trainer.callbacks]
        Path(trainer.default_root_dir, "order.json").write_text(json.dumps(names))
'''


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "logger_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path)


def with_trainer(shards: Path, run_dir: Path, **trainer: Any) -> dict[str, Any]:
    settings = recipe(shards, run_dir)
    settings["trainer"] |= {"log_every_n_steps": 1} | trainer
    return settings


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if not name.startswith("system/")} for row in rows]


def saved_trainer(run_dir: Path) -> dict[str, Any]:
    return yaml.safe_load((run_dir / "config.yaml").read_text())["trainer"]


def test_a_csv_logger_replaces_tensorboard_and_is_continued_after_a_kill(tiny_shards: Path, tmp_path: Path) -> None:
    """Rows that were logged after the last checkpoint are logged again, and the file contains them once."""
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    assert (
        fit(tmp_path / "recipe.yaml", with_trainer(tiny_shards, uninterrupted, logger={"class_path": "CSVLogger"})) == 0
    )
    assert not list(uninterrupted.glob("events*"))
    rows = csv_rows(uninterrupted / "csv" / "metrics.csv")
    assert [row["step"] for row in rows] == ["1", "2", "2", "3", "4", "4", "5", "6", "6"]  # validated at even steps

    make_interrupted_run(killed, uninterrupted, 3)
    (killed / "csv").mkdir()
    shutil.copy(uninterrupted / "csv" / "metrics.csv", killed / "csv")
    assert fit(tmp_path / "recipe.yaml", with_trainer(tiny_shards, killed, logger={"class_path": "CSVLogger"})) == 0
    assert csv_rows(killed / "csv" / "metrics.csv") == rows


@pytest.mark.usefixtures("parts")
def test_several_loggers_get_scalars_and_previews_and_are_recorded(tmp_path: Path) -> None:
    """TensorBoard and a custom logger, both in the run folder; config.yaml can be used with another run folder."""
    loggers = [{"class_path": "TensorBoardLogger"}, {"class_path": "logger_parts.Lines"}]
    settings = with_trainer(Path(make_shards(tmp_path / "shards")), tmp_path / "run", logger=loggers, max_steps=2)
    settings["model"]["init_args"]["backbone"] |= {"latent_channels": 16}
    settings["preview"] = {"every_steps": 2, "clips": 1, "context_frames": 1, "sampler_steps": 1}
    assert fit(tmp_path / "recipe.yaml", settings) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "lines.jsonl").read_text().splitlines()]
    images = [[step, content[0], Path(content[1]).name] for step, content in lines if content[0].startswith("sample/s")]
    assert images == [[2, "sample/strip", "step-000002.png"]]
    assert [2, ["sample/video", str(tmp_path / "run" / "previews" / "step-000002.gif")]] in lines
    assert [step for step, content in lines if "loss/train" in content] == [1, 2]
    assert {"loss/train", "sample/rollout_error"} <= logged_scalars(tmp_path / "run").keys()

    saved = saved_trainer(tmp_path / "run")["logger"]
    assert [logger["init_args"]["save_dir"] for logger in saved] == ["${run_dir}", "${run_dir}"]
    other = [f"--config={tmp_path / 'run' / 'config.yaml'}", f"--run_dir={tmp_path / 'other'}"]
    assert main(["fit", *other]) == 0
    assert (tmp_path / "other" / "lines.jsonl").exists()
    assert list((tmp_path / "other").glob("events*"))


def test_no_logger(tiny_shards: Path, tmp_path: Path) -> None:
    assert fit(tmp_path / "recipe.yaml", with_trainer(tiny_shards, tmp_path / "run", logger=False, max_steps=1)) == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoints", "config.yaml", ".lock"}
    assert saved_trainer(tmp_path / "run")["logger"] is False


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="W&B is installed")
def test_a_logger_whose_package_is_missing(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = with_trainer(tiny_shards, tmp_path / "run", logger={"class_path": "WandbLogger"})
    assert fit(tmp_path / "recipe.yaml", settings) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ")
    assert "WandbLogger" in message
    assert "wandb" in message.replace("WandbLogger", "")


@pytest.mark.usefixtures("parts")
def test_callbacks_run_in_the_order_of_the_recipe(tiny_shards: Path, tmp_path: Path) -> None:
    """After those of the library and before checkpoints; a progress bar of the recipe replaces the default one."""
    callbacks = [{"class_path": "logger_parts.Order", "init_args": {"name": name}} for name in ("first", "second")]
    callbacks.insert(1, {"class_path": "TQDMProgressBar"})
    settings = with_trainer(tiny_shards, tmp_path / "run", callbacks=callbacks, max_steps=1, enable_progress_bar=None)
    assert fit(tmp_path / "recipe.yaml", settings) == 0
    order = json.loads((tmp_path / "run" / "order.json").read_text())
    assert order[-4:] == ["first", "TQDMProgressBar", "second", "RunCheckpoint"]
    assert "StepProgress" not in order
    saved = [callback["class_path"].split(".")[-1] for callback in saved_trainer(tmp_path / "run")["callbacks"]]
    assert saved == ["Order", "TQDMProgressBar", "Order"]
