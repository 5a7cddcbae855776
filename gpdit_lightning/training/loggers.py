"""Loggers of a run: their folders, the continuation of their logs in a resumed run, images, text and charts.

Any subclass of `lightning.pytorch.loggers.Logger` can be used. It receives scalars through `log_metrics`, the recipe
through `log_hyperparams`, and previews through `log_image(key, images, step)` if it has this method; `images` is a list
of paths of PNG or GIF files. The loggers of TensorBoard, MLflow, Comet and Lightning's service have no such method;
previews are logged to them in other ways.
"""

import csv
import inspect
import io
import re
import textwrap
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.loggers import CometLogger, CSVLogger, LitLogger, Logger, MLFlowLogger, TensorBoardLogger
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary

from gpdit_lightning.diagnosis.curves import EARLIER_EVENTS, EVENT_FILES, event_folder
from gpdit_lightning.errors import InputError
from gpdit_lightning.imports import import_path
from gpdit_lightning.regular_files import BoundedReader

SCORES = "scores_vs_decoded"  # group of the tags of scores, whose ground truth is decoded from held-out latents
EVENT_TIME = re.compile(r"tfevents\.(\d{10,12})\.")
CSV_FOLDER = "csv"

# Loggers without a method `log_image` that accept images in another way.
WITH_IMAGES = (TensorBoardLogger, MLFlowLogger, CometLogger, LitLogger)


def files_in_run_folder(run_dir: Path) -> Iterator[Path]:
    """Yield the files and folders that the loggers have written to a run folder: those of TensorBoard and CSV."""
    yield from run_dir.glob(EVENT_FILES)
    yield from run_dir.glob(TensorBoardLogger.NAME_HPARAMS_FILE)
    for folder in (run_dir / EARLIER_EVENTS, run_dir / CSV_FOLDER):
        yield from (folder, *folder.rglob("*")) if folder.exists() else ()


class RunFolderTensorBoard(TensorBoardLogger):
    """The default logger of a recipe: TensorBoard, with its event files in the run folder.

    Args:
        run_dir: the run folder.
    """

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir, name="", version=event_folder(run_dir))

    def save(self) -> None:
        """Flush the events. Lightning also writes `hparams.yaml`, which `config.yaml` replaces."""
        self.experiment.flush()


def place_in_run_folder(kind: type[Logger], given: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """Return constructor arguments that make a logger write to the run folder, unless its folder is given.

    Args:
        kind: class of the logger.
        given: its constructor arguments, with defaults; None for a required argument that is missing.
        run_dir: the run folder.

    Returns:
        the arguments to replace; none if the class has no `save_dir`, or it is given.
    """
    if "save_dir" not in given:
        return {}
    default = _default_of(kind, "save_dir")
    if given["save_dir"] not in (None, default):
        return {}
    # The same folder for a resumed run; Lightning's default is a new folder `version_N` at every start.
    for known, folder in ((TensorBoardLogger, event_folder(run_dir)), (CSVLogger, CSV_FOLDER)):
        if issubclass(kind, known):
            fixed = {"name": "", "version": folder}
            left_out = {name for name in fixed if given.get(name) in (None, _default_of(kind, name))}
            return {"save_dir": str(run_dir)} | {name: fixed[name] for name in left_out}
    return {"save_dir": str(run_dir / (default or ""))}


def _default_of(kind: type, parameter: str) -> Any:
    """Return the default of a constructor's parameter, also of a base class; None if there is none."""
    for constructor in (vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base)):
        found = inspect.signature(constructor).parameters.get(parameter)
        if found is not None:
            return None if found.default is inspect.Parameter.empty else found.default
    return None


def continue_logs(loggers: Iterable[Logger], step: int) -> None:
    """Drop the records of an earlier process after the step from which this run resumes, and which it logs again.

    TensorBoard and CSV files are handled; other loggers are left unchanged. Call this before `trainer.fit`, which opens
    the loggers.

    Args:
        loggers: the loggers of the first rank.
        step: the optimizer step from which the run resumes; 0 for a new run.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            hide_later_events(logger, step)
        elif isinstance(logger, CSVLogger):
            keep_earlier_rows(logger, step)


def order_event_files(run_dir: Path) -> dict[Path, Path]:
    """Rename event files whose names have times in the future, so that a new one is the last by name.

    TensorBoard reads the files of a folder in the order of these times. If the clock was set back, it would read the
    events of a resumed run first, and hide them in favour of those that they replace.

    Returns:
        the new paths of the files that were renamed, by their earlier ones.
    """
    folder, renamed = run_dir / event_folder(run_dir), dict[Path, Path]()
    files = [(int(found[1]), path) for path in folder.glob(EVENT_FILES) if (found := EVENT_TIME.search(path.name))]
    files.sort()
    now = int(time.time())
    if files and files[-1][0] == now:  # a new file of the same second could come before it
        time.sleep(1 - time.time() % 1)
        now += 1
    if not files or files[-1][0] < now:
        return renamed
    for place, (written, path) in enumerate(files):
        if written >= (latest := now - (len(files) - place)):
            renamed[path] = path.with_name(EVENT_TIME.sub(f"tfevents.{latest:010d}.", path.name))
            path.replace(renamed[path])
    return renamed


def hide_later_events(logger: TensorBoardLogger, step: int) -> None:
    """Mark the events of earlier files after a step as superseded, as `SummaryWriter(purge_step=...)` does."""
    start = SessionLog(status=SessionLog.START)
    logger.experiment.file_writer.add_event(Event(step=step + 1, session_log=start))


def keep_earlier_rows(logger: CSVLogger, step: int) -> None:
    """Keep the rows of metrics.csv up to a step; Lightning's writer would remove the file."""
    path = Path(logger.log_dir) / "metrics.csv"
    backup = path.with_name("metrics.csv.partial")  # complete; left by a process that was killed here
    if path.exists() and not backup.exists():
        path.replace(backup)
    if not backup.exists():
        return
    try:
        with io.TextIOWrapper(BoundedReader(backup), encoding="utf-8", newline="") as file:
            rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
        steps = [int(row["step"]) for row in rows]
    except (ValueError, LookupError, TypeError, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        backup.replace(path)
        raise InputError(f"{path} is no table of metrics with a step in each row ({error}): remove it.") from None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
        writer = logger.experiment
    writer.metrics = [row for row, row_step in zip(rows, steps, strict=True) if row_step <= step]
    writer.save()
    backup.unlink()


def log_images(loggers: Iterable[Logger], images: Mapping[str, Path], step: int) -> None:
    """Log PNG and GIF files by their tags to every logger that accepts images."""
    for logger in loggers:
        for tag, path in images.items():
            _log_image(logger, tag, path, step)


def without_images(loggers: Iterable[Logger]) -> list[Logger]:
    """Return the loggers to which :func:`log_images` logs nothing."""
    return [logger for logger in loggers if not isinstance(logger, WITH_IMAGES) and not hasattr(logger, "log_image")]


def check_image_methods(loggers: Iterable[Logger]) -> None:
    """Raise `InputError` if a logger's `log_image` or `log_video` cannot be called as :func:`log_images` calls it."""
    for logger in loggers:
        for name in ("log_image", "log_video"):
            try:
                if hasattr(logger, name):
                    inspect.signature(getattr(logger, name)).bind("sample/strip", ["strip.png"], step=1)
            except TypeError as error:
                raise InputError(
                    f"the method {name} of {import_path(logger)} cannot receive previews ({error}): it is called as "
                    f"{name}(key, paths, step=step), where paths is a list of str."
                ) from None


def _log_image(logger: Logger, tag: str, path: Path, step: int) -> None:
    if path.suffix == ".gif" and hasattr(logger, "log_video"):  # W&B shows the first frame of a GIF as an image
        logger.log_video(tag, [str(path)], step=step)
    elif hasattr(logger, "log_image"):
        logger.log_image(tag, [str(path)], step=step)
    elif isinstance(logger, TensorBoardLogger):
        with Image.open(path) as image:
            width, height = image.size
        # SummaryWriter has no method for a GIF: its add_video needs moviepy, and logs nothing without it.
        encoded = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
        summary = Summary(value=[Summary.Value(tag=tag, image=encoded)])
        logger.experiment.file_writer.add_summary(summary, step)
        logger.experiment.flush()
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_artifact(logger.run_id, str(path), artifact_path="previews")
    elif isinstance(logger, CometLogger):
        logger.experiment.log_image(str(path), name=tag, step=step)
    elif isinstance(logger, LitLogger):
        logger.log_file(str(path))


def log_text(loggers: Iterable[Logger], tag: str, text: str, step: int) -> None:
    """Log a text to TensorBoard, the only logger of Lightning that accepts a text at a step."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(tag, text, step)


def log_recipe(loggers: Iterable[Logger], recipe: str, step: int) -> None:
    """Log a resolved recipe: to TensorBoard as text, to the other loggers as hyperparameters.

    CSV files lie next to the recipe's `config.yaml`. The settings of the loggers are left out of the hyperparameters,
    since they may contain keys of accounts.

    Args:
        loggers: the loggers of the first rank.
        recipe: the YAML.
        step: the optimizer step from which the process continues.
    """
    content = yaml.safe_load(recipe)
    content["trainer"].pop("logger", None)
    log_text(loggers, "recipe", textwrap.indent(recipe, "    "), step)  # a code block of Markdown
    for logger in loggers:
        if isinstance(logger, MLFlowLogger) and step > 0:
            continue  # MLflow refuses to change a parameter of a run
        if not isinstance(logger, (TensorBoardLogger, CSVLogger)):
            logger.log_hyperparams(content)


def log_layout(loggers: Iterable[Logger], sources: Sequence[str], scores: bool = False) -> None:
    """Define the charts of TensorBoard's tab CUSTOM SCALARS.

    Args:
        loggers: the loggers of the first rank.
        sources: names of the sources whose losses are logged; empty if the run has one source.
        scores: whether scores are logged.
    """
    noise_levels = [f"loss_q{number}" for number in (1, 2, 3, 4)]
    by_source = [f"loss_{source}" for source in sources]
    charts = {
        "Loss": {
            "training and validation": ["loss/train", "loss/val"],
            "training, by noise level (q1: least noise)": [f"train/{name}" for name in noise_levels],
            "training, by source": [f"train/{name}" for name in by_source],
        },
        "Validation": {
            "by noise level (q1: least noise)": [f"val/{name}" for name in noise_levels],
            "by source": [f"val/{name}" for name in by_source],
        },
        "Samples": {"error of previews, relative to repeating the last frame": ["sample/rollout_error_ratio"]},
        "Scores": _score_charts() if scores else {},
        "Speed": {
            "samples per second": ["system/clips_per_s"],
            "hours left": ["system/hours_left"],
            "fraction of time spent waiting for data": ["system/data_wait"],
            "peak memory (GiB)": ["system/peak_memory_gib"],
        },
        "Health": {
            "gradient norm": ["train/grad_norm"],
            "learning rate": ["train/lr"],
            "distance of the averaged weights": ["train/ema_distance"],
            "skipped steps, spikes, damaged samples (none: no curve)": [
                f"warnings/{name}" for name in ("skipped_steps", "spikes", "damaged_samples")
            ],
        },
    }
    # TensorBoard matches the beginnings of tags with regular expressions.
    layout = {
        category: {
            title: ["Multiline", [f"{re.escape(tag)}$" for tag in tags]] for title, tags in content.items() if tags
        }
        for category, content in charts.items()
        if content
    }
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_custom_scalars(layout)


def _score_charts() -> dict[str, list[str]]:
    """Return the tags of the charts of scores, by title."""
    names = {"FVD": "fvd", "FID": "fid", "PSNR (dB)": "psnr"}
    charts = {
        f"{title}, and that of repeating the last frame": [f"{SCORES}/{name}", f"{SCORES}/{name}_repeated"]
        for title, name in names.items()
    }
    return charts | {
        "error of the scored clips, relative to repeating the last frame": [f"{SCORES}/rollout_error_ratio"]
    }
