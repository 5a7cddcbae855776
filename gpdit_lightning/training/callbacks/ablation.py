"""The record of a run of an ablation: its validation loss by step, on batches that all runs share, and its costs."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from gpdit_lightning.data.batches import TimedLoader
from gpdit_lightning.data.datamodule import LatentDataModule
from gpdit_lightning.diffusion import NoiseSchedule
from gpdit_lightning.errors import InputError
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.model.layout import count_blocks
from gpdit_lightning.schema import NUMBER, Constraint, check, shown
from gpdit_lightning.training.callbacks.held_out import StepInterval, averaged_backbone
from gpdit_lightning.training.callbacks.metrics import LossTable, log_scalars
from gpdit_lightning.training.callbacks.throughput import peak_memory_gib, reset_peak_memory

KEY = "ablation"  # of the record in a checkpoint


POINT = Constraint(
    "an optimizer step, a loss and seconds",
    lambda value: isinstance(value, list) and len(value) == 3 and all(type(part) in (int, float) for part in value),
)
SCHEMA = {"curve": [POINT], "seconds": NUMBER, "peak_memory_gib": NUMBER}


def record_in(content: Mapping[str, Any], name: str, run: str) -> dict[str, Any]:
    """Return the record of :class:`AblationRecord` in the content of a checkpoint.

    Args:
        content: of the checkpoint.
        name: of the checkpoint, for the message.
        run: name of the run whose record it has to be; checkpoints of version 0.1.0 may lack it.

    Raises:
        InputError: there is none, it has other fields, or it is that of another run.
    """
    cure = "move its run folder away, so that the run is trained again"
    record = check(content, {KEY: SCHEMA}, "", name, f"it is of a run outside of an ablation; {cure}")[KEY]
    if (found := record.get("run", run)) != run:
        raise InputError(f"{name} is of the run {shown(found)} and not of {run}: move the folders back, or {cure}.")
    return dict(record)


class AblationRecord(Callback):
    """Validates a run on batches that do not depend on it, and measures its costs; checkpoints contain the record.

    The clips, the noise and the noise levels are those of `data`, and the angles those of `schedule`, whatever the
    data, the seed and the schedule of the run are. So the losses of runs with the same target are comparable. The
    averaged weights are validated. The loss is logged as `loss/ablation`.

    The record, under `ablation` in a checkpoint: `run`; `curve`, a list of (optimizer step, loss, seconds until then);
    `seconds`, of all optimizer steps with the loading of their batches, without validation and checkpoints: CPU seconds
    of the process if it trains on the CPU, which do not depend on other load; and `peak_memory_gib`, as
    `system/peak_memory_gib`, but of this run alone.

    Args:
        data: the held-out batches.
        schedule: from noise levels to angles.
        every_steps: optimizer steps between validations; the last step of the run is always validated.
        run: name of the run in its ablation, so that the checkpoints of no other run are used.
    """

    def __init__(self, data: LatentDataModule, schedule: NoiseSchedule, every_steps: int, run: str) -> None:
        self.data, self.schedule, self.run = data, schedule, run
        self._interval = StepInterval(every_steps)
        self._curve: list[tuple[int, float, float]] = []
        self._seconds = self._peak_memory_gib = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the batches.

        Raises:
            InputError: the run has latents of another codec than the batches.
        """
        config = pl_module.config
        assert isinstance(config, GPDiTConfig)
        of_run: Any = trainer.datamodule
        assert isinstance(of_run, LatentDataModule)
        of_run.codec.check_same(self.data.codec, "the data of the run", "those of the validation", "use one codec")
        self.data.trainer = trainer
        self.data.count_blocks = partial(count_blocks, config)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start at the step of a resumed run."""
        self._interval.start(trainer)
        reset_peak_memory(trainer.strategy.root_device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Add the time of a micro-batch, and validate at the end of an interval."""
        self._seconds += seconds_of_batch(trainer)
        if self._interval.is_over(trainer):
            loss = self._validate(trainer, pl_module)
            self._curve.append((trainer.global_step, loss, self._seconds))
            device = trainer.strategy.root_device
            peak = torch.tensor(peak_memory_gib(device), device=device)
            peak = trainer.strategy.reduce(peak, reduce_op="max")
            self._peak_memory_gib = max(self._peak_memory_gib, float(peak))
            log_scalars(trainer, pl_module, {"loss/ablation": loss})

    def _validate(self, trainer: Trainer, module: LightningModule) -> float:
        """Return the loss of the averaged weights; all ranks must call it."""
        losses = LossTable()
        with (
            torch.no_grad(),
            averaged_backbone(trainer, module),
            replaced_schedule(module, self.schedule),
            trainer.precision_plugin.forward_context(),
        ):
            for number, batch in enumerate(self.data.val_dataloader()):
                on_device = trainer.strategy.batch_to_device(batch)
                outputs: Any = module.validation_step(on_device, number)
                losses.add(batch.source, batch.weight, outputs["quartiles"])
        return losses.means(trainer)["loss"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the record to a checkpoint."""
        checkpoint[KEY] = {
            "run": self.run,
            "curve": [list(point) for point in self._curve],
            "seconds": self._seconds,
            "peak_memory_gib": self._peak_memory_gib,
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the record from a checkpoint."""
        record = record_in(checkpoint, "the checkpoint to resume from", self.run)
        self._curve = [(int(step), float(loss), float(seconds)) for step, loss, seconds in record["curve"]]
        self._seconds, self._peak_memory_gib = record["seconds"], record["peak_memory_gib"]


class StepSeconds(Callback):
    """Measures the seconds of each optimizer step, as :class:`AblationRecord` does."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._of_step, self._last_step = 0.0, 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Add the time of a micro-batch."""
        self._of_step += seconds_of_batch(trainer)
        if trainer.global_step != self._last_step:
            self.seconds.append(self._of_step)
            self._of_step, self._last_step = 0.0, trainer.global_step


def seconds_of_batch(trainer: Trainer) -> float:
    """Return the seconds since a micro-batch was requested from the loader; CPU seconds if it trains on the CPU."""
    loader = trainer.train_dataloader
    assert isinstance(loader, TimedLoader)
    if trainer.strategy.root_device.type == "cpu":
        return time.process_time() - loader.request_cpu_time
    return time.perf_counter() - loader.request_time  # `Health` has waited for the device


@contextmanager
def replaced_schedule(module: LightningModule, schedule: NoiseSchedule) -> Iterator[None]:
    """Give a stage another noise schedule for a block."""
    stage: Any = module
    of_run, stage.schedule = stage.schedule, schedule
    try:
        yield
    finally:
        stage.schedule = of_run
