"""Loggers: their folders, their files after a resume, and images."""

import re
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from gpdit_lightning.errors import InputError
from gpdit_lightning.training.loggers import (
    RunFolderTensorBoard,
    check_image_methods,
    hide_later_events,
    keep_earlier_rows,
    log_images,
    log_layout,
    log_recipe,
    order_event_files,
    place_in_run_folder,
    without_images,
)

RUN = Path("runs/one")


class WithKeywords(CSVLogger):
    """Has the parameters of its base class as keywords."""

    def __init__(self, extra: int = 1, **options: Any) -> None:
        super().__init__(**options)


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        (TensorBoardLogger, {"save_dir": None}, {"save_dir": str(RUN), "name": "", "version": ""}),
        (
            CSVLogger,
            {"save_dir": None, "name": "lightning_logs", "version": None},
            {"save_dir": str(RUN), "name": "", "version": "csv"},
        ),
        (CSVLogger, {"save_dir": None, "name": "mine", "version": 3}, {"save_dir": str(RUN)}),
        (WithKeywords, {"save_dir": None}, {"save_dir": str(RUN), "name": "", "version": "csv"}),
        (CSVLogger, {"save_dir": "elsewhere"}, {}),
        (WandbLogger, {"save_dir": "."}, {"save_dir": str(RUN)}),
        (MLFlowLogger, {"save_dir": "./mlruns"}, {"save_dir": str(RUN / "mlruns")}),
        (Logger, {"path": "x"}, {}),
    ],
)
def test_a_logger_without_a_folder_writes_to_the_run_folder(
    kind: type[Logger], given: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert place_in_run_folder(kind, given, RUN) == expected


def log_steps(logger: Logger, *steps: int) -> None:
    for step in steps:
        logger.log_metrics({"loss": step / 10, f"only_{step}": 1.0}, step)
    logger.save()


@pytest.mark.parametrize("killed_while_copying", [False, True])
def test_csv_rows_after_the_step_are_removed(tmp_path: Path, killed_while_copying: bool) -> None:
    def logger() -> CSVLogger:
        return CSVLogger(tmp_path, name="", version="csv")

    path = tmp_path / "csv" / "metrics.csv"
    log_steps(logger(), 1, 2, 3)
    if killed_while_copying:
        path.rename(tmp_path / "csv" / "metrics.csv.partial")
    resumed = logger()
    keep_earlier_rows(resumed, step=2)
    log_steps(resumed, 3, 4)
    header, *rows = [line.split(",") for line in path.read_text().splitlines()]
    assert [row[header.index("step")] for row in rows] == ["1", "2", "3", "4"]
    assert [row[header.index("loss")] for row in rows] == ["0.1", "0.2", "0.3", "0.4"]
    assert [path.name for path in (tmp_path / "csv").iterdir()] == ["metrics.csv"]


def test_events_after_the_step_are_superseded(tmp_path: Path) -> None:
    for steps, resumed_from in (((1, 2, 3), 0), ((3, 4), 2)):
        logger = TensorBoardLogger(tmp_path, name="", version="tensorboard")
        hide_later_events(logger, resumed_from)
        log_steps(logger, *steps)
        logger.finalize("success")
        for path in (tmp_path / "tensorboard").glob("events*"):  # names of one second are not in the order of time
            path.rename(
                path.with_name(f"events.out.tfevents.{resumed_from}{path.name.removeprefix('events.out.tfevents')}")
            )
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]


class Calls:
    """Records the calls of any method."""

    def __init__(self, **attributes: Any) -> None:
        self.made: list[tuple[Any, ...]] = []
        vars(self).update(attributes)

    def log_image(self, key: str, images: list[str], step: int) -> None:
        self.made.append(("image", key, images, step))


class CallsWithVideo(Calls):
    def log_video(self, key: str, videos: list[str], step: int) -> None:
        self.made.append(("video", key, videos, step))


class LikeMLflow(MLFlowLogger):
    """MLflow's logger without a server and without the package."""

    run_id = "run"

    def __init__(self) -> None:
        self.made: list[tuple[str, str, str]] = []

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(log_artifact=self.log_artifact)

    def log_artifact(self, run_id: str, path: str, artifact_path: str) -> None:
        self.made.append((run_id, path, artifact_path))


class LikeComet(CometLogger):
    """Comet's logger without a server and without the package, with the signature of its experiment's `log_image`."""

    def __init__(self) -> None:
        self.made: list[tuple[str, str | None, int | None]] = []

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(log_image=self.record_image)

    def record_image(
        self,
        image_data: Any,
        name: str | None = None,
        overwrite: bool = False,
        image_format: str = "png",
        image_scale: float = 1.0,
        image_shape: tuple[int, int] | None = None,
        image_colormap: str | None = None,
        image_minmax: tuple[int, int] | None = None,
        image_channels: str = "last",
        copy_to_tmp: bool = True,
        step: int | None = None,
        annotations: list[Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.made.append((image_data, name, step))


class LikeWandb(WandbLogger):
    """W&B's logger without a server; the stand-in for the package only has the media types."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        media = {name: lambda path, kind=name: (kind, path) for name in ("Image", "Video")}
        monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(**media))
        self._prefix, self._wandb_init = "", {}

    @property
    def experiment(self) -> Any:
        config = SimpleNamespace(update=lambda values, allow_val_change: self.config.update(values))
        return SimpleNamespace(log=self.made.append, config=config)


def test_images_are_logged_to_every_logger_that_accepts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strip, video = tmp_path / "a.png", tmp_path / "a.gif"
    for path in (strip, video):
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(path)
    mlflow, comet, wandb = LikeMLflow(), LikeComet(), LikeWandb(monkeypatch)
    tensorboard = RunFolderTensorBoard(tmp_path)
    plain, with_video = Calls(), CallsWithVideo()
    csv = CSVLogger(tmp_path)
    loggers: Any = [plain, with_video, mlflow, comet, wandb, tensorboard, csv]
    log_images(loggers, {"strip": strip, "video": video}, 5)
    assert plain.made == [("image", "strip", [str(strip)], 5), ("image", "video", [str(video)], 5)]
    assert with_video.made == [("image", "strip", [str(strip)], 5), ("video", "video", [str(video)], 5)]
    assert mlflow.made == [("run", str(path), "previews") for path in (strip, video)]
    assert comet.made == [(str(strip), "strip", 5), (str(video), "video", 5)]
    assert wandb.made == [
        {"strip": [("Image", str(strip))], "trainer/global_step": 5},
        {"video": [("Video", str(video))], "trainer/global_step": 5},
    ]
    assert without_images(loggers) == [csv]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    shown = {tag: events.Images(tag)[0] for tag in events.Tags()["images"]}
    assert {tag: (image.step, image.width, image.height) for tag, image in shown.items()} == {
        "strip": (5, 6, 4), "video": (5, 6, 4)
    }  # fmt: skip
    assert shown["video"].encoded_image_string == video.read_bytes()


def test_the_recipe_and_the_charts_are_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the settings of the loggers, which may contain keys; MLflow's parameters of a resumed run are kept."""
    wandb, tensorboard = LikeWandb(monkeypatch), RunFolderTensorBoard(tmp_path)
    recipe = "trainer:\n  max_steps: 3\n  logger: {api_key: secret}\n"
    log_recipe([wandb, tensorboard, LikeMLflow(), CSVLogger(tmp_path)], recipe, step=7)
    log_layout([wandb, tensorboard], ["images", "videos"], scores=True)
    tensorboard.finalize("success")
    assert wandb.config == {"trainer": {"max_steps": 3}}
    assert [path.suffix for path in tmp_path.iterdir()] == [next(tmp_path.glob("events*")).suffix]  # no hparams.yaml
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (text,) = events.Tensors("recipe/text_summary")
    assert (text.step, text.tensor_proto.string_val[0].decode()) == (7, textwrap.indent(recipe, "    "))
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == [
        "Loss",
        "Validation",
        "Samples",
        "Scores",
        "Speed",
        "Health",
    ]
    patterns = [tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag]
    assert [tag for tag in ("loss/train", "train/loss_images", "train/loss_q1") if re.match(patterns[0], tag)] == [
        "loss/train"
    ]
    assert "train/loss_videos$" in patterns


def test_a_run_of_an_earlier_version_continues_in_its_folder(tmp_path: Path) -> None:
    assert Path(RunFolderTensorBoard(tmp_path).log_dir) == tmp_path
    log_steps(TensorBoardLogger(tmp_path, name="", version="tensorboard"), 1)
    resumed = RunFolderTensorBoard(tmp_path)
    log_steps(resumed, 2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(event.step for event in events.Scalars("loss")) == [1, 2]
    assert place_in_run_folder(TensorBoardLogger, {"save_dir": None}, tmp_path)["version"] == "tensorboard"


class WithoutStep:
    def log_image(self, key: str, images: list[str]) -> None:
        """Accept no step."""


def test_a_logger_that_cannot_receive_previews_is_refused() -> None:
    check_image_methods(cast(Any, [Calls(), CallsWithVideo(), LikeMLflow()]))
    with pytest.raises(InputError, match=r"log_image of .*WithoutStep .*called as log_image\(key, paths, step=step\)"):
        check_image_methods(cast(Any, [WithoutStep()]))


def test_event_files_of_a_later_clock_are_renamed_in_their_order(tmp_path: Path) -> None:
    """TensorBoard reads the files in the order of the times in their names."""
    logger, now = RunFolderTensorBoard(tmp_path), int(time.time())
    folder = Path(logger.log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for number, written in enumerate((now - 1000, now + 50, now + 10**6)):
        (folder / f"events.out.tfevents.{written}.host.{number}").write_text(str(number))
    renamed = order_event_files(tmp_path)
    files = sorted(folder.glob("events.out.tfevents.*"))
    assert [path.read_text() for path in files] == ["0", "1", "2"]
    assert all(int(path.name.split(".")[3]) <= now for path in files)
    assert set(renamed.values()) == set(files[1:])
    assert order_event_files(tmp_path) == {}
