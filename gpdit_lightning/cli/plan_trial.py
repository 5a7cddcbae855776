"""A short training that measures the speed of a recipe on one device."""

import gc
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from gpdit_lightning.cli.recipe_cli import build_recipe
from gpdit_lightning.data.batches import LatentBatch, TimedLoader
from gpdit_lightning.estimation.requirements import RunSettings, step_flops
from gpdit_lightning.stages import GPDiTStage
from gpdit_lightning.training.callbacks.stopping import Stopped
from gpdit_lightning.training.callbacks.throughput import Throughput

MAX_SECONDS = 20.0  # of a trial, after the data and the model are loaded
MAX_STEPS = 200  # of a trial
NO_MEASUREMENT = (
    f"the trial ended after {MAX_SECONDS:.0f} s with less than two steps (the machine is busy, or slower than assumed)"
)


class TrialFinishedError(Exception):
    """The trial has measured enough."""


class MeasureSpeed(Callback):
    """Measures the FLOP/s of training, from the second optimizer step on, and ends the training.

    Args:
        max_seconds: duration of the training, unless `least_steps` take longer.
        max_steps: number of optimizer steps that suffice.
        least_steps: number of optimizer steps that are measured at least.

    Attributes:
        flops_per_s: FLOP/s; 0 if less than two steps were trained.
        pass_flops_per_s: FLOP/s of the forward and backward passes alone.
        update_seconds: seconds of an update of the weights and what follows it in a step.
    """

    def __init__(self, max_seconds: float, max_steps: int, least_steps: int = 0) -> None:
        self.max_seconds, self.max_steps, self.least_steps = max_seconds, max_steps, least_steps
        self.flops_per_s = self.pass_flops_per_s = self.update_seconds = 0.0
        self._updating = self._update_began = 0.0
        self._measured: Throughput
        self._began = 0.0
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        assert isinstance(pl_module, GPDiTStage)
        self._measured, self._began = Throughput(pl_module.config), time.monotonic()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Note the end of the backward pass on the device."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._update_began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: LatentBatch, batch_idx: int
    ) -> None:
        """Count a micro-batch.

        The device has finished a step at its end, since `Health` waits for its gradient. The first step is slower: it
        allocates memory and loads kernels.

        Raises:
            TrialFinishedError: the time is over, or there were enough steps.
        """
        step = trainer.global_step
        ends_step, is_first, self._last_step = step != self._last_step, self._last_step == 0, step
        if not is_first:
            loader = trainer.train_dataloader
            assert isinstance(loader, TimedLoader)
            self._measured.add(batch, loader, ends_step)
            if ends_step:
                done = self._measured
                self._updating += time.perf_counter() - self._update_began
                self.update_seconds = self._updating / done.steps
                self.flops_per_s = done.flops / done.seconds
                self.pass_flops_per_s = done.flops / (done.seconds - self._updating)
        is_over = time.monotonic() - self._began > self.max_seconds and self._measured.steps >= self.least_steps
        if is_over or step >= self.max_steps:
            raise TrialFinishedError


def can_measure(run: RunSettings, flops_per_s: float) -> bool:
    """Return whether a trial can measure a run on one device: it is not sharded, and three steps are short enough."""
    return not run.strategy.stage and 3 * sum(step_flops(run).values()) / (run.gpus * flops_per_s) <= MAX_SECONDS


@contextmanager
def warnings_only() -> Iterator[None]:
    """Log warnings only: the messages of a trial would be repeated by the training."""
    logger = logging.getLogger("gpdit_lightning")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def measured_flops_per_s(recipe: str, run: RunSettings) -> float | None:
    """Train a recipe for up to 20 seconds on one device, as :func:`measure_speed`.

    Args:
        recipe: its text.
        run: its settings.

    Returns:
        the FLOP/s of training; None if less than two steps were trained.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_text(recipe, encoding="utf-8")
        try:
            return measure_speed([f"--config={path}"], run, MeasureSpeed(MAX_SECONDS, MAX_STEPS)).flops_per_s or None
        except Stopped:
            print("stopped in the trial: no recipe was written", file=sys.stderr)
            raise


def measure_speed(
    arguments: Sequence[str], run: RunSettings, measure: MeasureSpeed, devices: str = "1"
) -> MeasureSpeed:
    """Train a recipe on one device with the share of one rank, until a measurement is complete, and save nothing.

    Args:
        arguments: those of `fit`.
        run: settings of the recipe.
        measure: the measurement.
        devices: value of `trainer.devices`, which selects one.

    Returns:
        the measurement.
    """
    with TemporaryDirectory() as folder, warnings_only():
        settings = {
            "run_dir": Path(folder, "run"),
            "data.max_ranks": 1,
            "validate_every_steps": 0,
            "preview.every_steps": 0,
            "checkpoint.every_steps": MAX_STEPS + 1,
            "checkpoint.keep_every_steps": 0,
            "trainer.max_steps": measure.max_steps + 1,
            "trainer.devices": devices,
            "trainer.num_nodes": 1,
            "trainer.strategy": "auto",
            "trainer.logger": "false",
            "trainer.enable_progress_bar": "false",
        }
        for source in run.sources:
            name = "tokens" if source.config.tokens else "batch_size"
            settings[f"data.{source.name}.{name}"] = getattr(source.config, name) // run.gpus
        cli = build_recipe("fit", [*arguments, *(f"--{name}={value}" for name, value in settings.items())])
        cli.trainer.callbacks.append(measure)  # type: ignore[attr-defined]
        with suppress(TrialFinishedError):
            cli.trainer.fit(cli.model, cli.datamodule, weights_only=True)
    del cli
    gc.collect()  # frees the memory of the device, which a training in this process may need
    return measure
