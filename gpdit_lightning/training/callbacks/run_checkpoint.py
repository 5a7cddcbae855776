"""Saving of checkpoints during a run, and stopping at a signal."""

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from gpdit_lightning.checkpoints.distributed import BackgroundTask
from gpdit_lightning.checkpoints.files import (
    checkpoint_path,
    last_checkpoint,
    prune,
    publish_checkpoint,
    remove_leftovers,
    unmark_damaged,
)
from gpdit_lightning.checkpoints.io import FolderCheckpointIO
from gpdit_lightning.checkpoints.marks import FileMark, step_of
from gpdit_lightning.data.datamodule import LatentDataModule
from gpdit_lightning.devices import device_name
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import partial_path, remove
from gpdit_lightning.training.callbacks.stopping import Stopped, StopSignals
from gpdit_lightning.training.internals import disable_signal_handlers, is_between_steps, validation_follows
from gpdit_lightning.training.optimizer import OptimizerConfig
from gpdit_lightning.training.reduction import DelayedMaximum
from gpdit_lightning.training.strategies.sharding import SaveInBackground, ShardedStrategy

log = logging.getLogger(__name__)

# Seconds that training may wait for data after a signal, before it ends without the next step. If several ranks train,
# the steps since the last checkpoint are then lost.
PATIENCE_ALONE, PATIENCE = 3.0, 20.0
COMPLETES_WITHIN = 60.0  # seconds in which a checkpoint that is being written is completed after an exception


class RunCheckpoint(Checkpoint):
    """Saves checkpoints in the run folder; after SIGTERM, SIGINT, SIGHUP or SIGUSR1 saves one and ends the training.

    A checkpoint is saved after a whole optimizer step and its validation, if there is one, so a resumed run has nothing
    of that step to repeat.

    Under ZeRO and FSDP2 each rank copies its part to host memory and writes it in a thread while the training
    continues. The next checkpoint waits until the previous one is complete, so that there is one copy at a time, and
    the end of the training waits for the last one. If a rank cannot write, all end after their present step.

    Args:
        every_steps: optimizer steps between checkpoints; milestones and the end of training are saved too.
        every_minutes: maximum minutes between checkpoints; 0 for no limit.
        keep_last: number of latest checkpoints to keep.
        keep_every_steps: optimizer steps between milestones, which are kept permanently; 0 for none.

    Attributes:
        stalled_seconds: time for which the last checkpoint stalled the training.
        writing: the thread in which it is written under ZeRO and FSDP2.
    """

    def __init__(
        self, every_steps: int = 1000, every_minutes: float = 0.0, keep_last: int = 2, keep_every_steps: int = 0
    ) -> None:
        for name, value, least in (
            ("every_steps", every_steps, 1),
            ("every_minutes", every_minutes, 0),
            ("keep_last", keep_last, 1),
            ("keep_every_steps", keep_every_steps, 0),
        ):
            if value < least:
                raise InputError(f"checkpoint.{name} is {value}; it must be at least {least}.")
        self.every_steps, self.every_minutes = every_steps, every_minutes
        self.keep_last, self.keep_every_steps = keep_last, keep_every_steps
        self._signals: StopSignals | None = None
        self._agreement = DelayedMaximum()
        self._finished_step = self._requested_step = self._saved_step = 0
        self._saved_at = self.stalled_seconds = 0.0
        self.writing = BackgroundTask()

    @property
    def received_signal(self) -> int:
        """The first signal that this rank received in this run; 0 if there is none."""
        return self._signals.received if self._signals else 0

    @property
    def saved_step(self) -> int:
        """The step of the last complete checkpoint of this process, or from which it resumed; 0 if there is none."""
        is_incomplete = self.writing.is_running or self.writing.has_failed
        return self._saved_step if is_incomplete else self._requested_step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write checkpoints as folders unless the recipe has a CheckpointIO; disable Lightning's signal handlers."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = FolderCheckpointIO()
        disable_signal_handlers(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove incomplete files of a killed run, and check that checkpoints can be written.

        Raises:
            InputError: the folder cannot be written.
        """
        folder = checkpoint_path(Path(trainer.default_root_dir), 0).parent
        failure = ""
        if trainer.is_global_zero:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for used in (folder.parent, folder, folder.parent / "previews"):
                    remove_leftovers(used)
                probe = partial_path(folder / "probe")
                probe.write_text("can be written")
                probe.unlink()
            except OSError as error:
                failure = f"no checkpoint can be saved in {folder} ({error.strerror}): choose another --run_dir."
        _fail_on_all_ranks(trainer, failure)
        self._signals = StopSignals(
            announce=trainer.is_global_zero,
            patience=PATIENCE_ALONE if trainer.world_size == 1 else PATIENCE,
            waits=lambda: bool(getattr(trainer.train_dataloader, "waiting", False)),
            give_up=lambda signum: Stopped(trainer.global_step, signum, trainer.is_global_zero, saved=False),
        )
        self._signals.install()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Treat the step from which the run resumes as saved."""
        self._finished_step = self._requested_step = self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()
        self._agreement = DelayedMaximum()
        if trainer.is_global_zero:
            unmark_damaged(checkpoint_path(Path(trainer.default_root_dir), 0).parent, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Finish the optimizer step after its last micro-batch, unless a validation follows."""
        if trainer.global_step != self._finished_step and not validation_follows(trainer):
            self._finish_step(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Record the settings and circumstances of the run that the model card states, as `TrainingFacts.run`."""
        facts: dict[str, Any] = {
            "precision": str(trainer.precision),
            "hardware": f"{trainer.world_size} x {device_name(pl_module.device)}",
        }
        if isinstance(optimizer := getattr(pl_module, "optimizer_config", None), OptimizerConfig):
            facts["optimizer"] = asdict(optimizer) | {"betas": list(optimizer.betas)}
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, LatentDataModule):
            facts["samples"] = data.number_of_samples()
        checkpoint["run"] = facts

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the optimizer step after its validation."""
        if not trainer.sanity_checking and trainer.global_step != self._finished_step:
            self._finish_step(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait until the last checkpoint is complete."""
        self._finish_saving(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the signal handlers."""
        if self._signals is not None:
            self._signals.restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the signal handlers; save the last step if training was stopped while it waited for data.

        It is not saved if several ranks train, since the others are not at the same point, or if a part of the next
        step was computed. A checkpoint that is being written is completed, unless a rank may have ended.
        """
        if self._signals is not None:
            self._signals.restore()
        if not isinstance(exception, RuntimeError):  # as torch raises when another rank has ended
            self.writing.join(COMPLETES_WITHIN)
        if isinstance(exception, Stopped) and not exception.saved:
            step = trainer.global_step
            exception.saved = step == self.saved_step
            if not exception.saved and trainer.world_size == 1 and is_between_steps(trainer):
                self._save(trainer, step)
                exception.saved = True

    def _finish_step(self, trainer: Trainer) -> None:
        step = self._finished_step = trainer.global_step
        signum, interval_is_over, has_failed = self._agree(trainer)
        is_last = step == trainer.max_steps or trainer.should_stop
        is_milestone = self.keep_every_steps > 0 and step % self.keep_every_steps == 0
        if has_failed:
            self._finish_saving(trainer)
        if signum or interval_is_over or is_last or is_milestone or step % self.every_steps == 0:
            self._save(trainer, step)
        if signum:
            self._finish_saving(trainer)
            raise Stopped(step, signum, trainer.is_global_zero)

    def _agree(self, trainer: Trainer) -> tuple[int, bool, bool]:
        """Return what all ranks know alike at the end of a step.

        With several ranks on GPUs this is the state at the end of the previous step.

        Returns:
            the signal that any rank received (or 0), whether `every_minutes` are over on the first rank, and whether
            any rank failed to write the checkpoint.
        """
        minutes = (time.monotonic() - self._saved_at) / 60
        interval_is_over = trainer.is_global_zero and 0 < self.every_minutes <= minutes
        values = [self.received_signal, int(interval_is_over), int(self.writing.has_failed)]
        if trainer.world_size > 1:
            values = self._agreement.exchange(values, trainer.strategy.root_device)
        return values[0], bool(values[1]), bool(values[2])

    def _save(self, trainer: Trainer, step: int) -> None:
        """Save a checkpoint; under a strategy that writes parts, begin to."""
        begun = time.perf_counter()
        if self.writing.is_running and trainer.is_global_zero:
            log.warning(
                "the checkpoint of step %d waits for that of step %d, which is still being written: save less often "
                "(checkpoint.every_steps, every_minutes), or to a faster disk",
                step,
                self._requested_step,
            )
        self._finish_saving(trainer)
        path = checkpoint_path(Path(trainer.default_root_dir), step)
        strategy, failure = trainer.strategy, ""
        in_parts = isinstance(strategy, ShardedStrategy) and strategy.writes_parts
        try:
            if trainer.is_global_zero:
                for logger in trainer.loggers:
                    logger.save()  # a resumed run logs only later steps again
            if not in_parts:
                self._write(trainer, path)
        except OSError as error:
            failure = _write_error(path, error)
        _fail_on_all_ranks(trainer, failure)
        if in_parts:
            options = SaveInBackground(self.writing, partial(self._publish, path))
            trainer.save_checkpoint(partial_path(path), weights_only=False, storage_options=options)
        else:
            self._saved_step = step
        self._agreement = DelayedMaximum()  # `every_minutes`, requested before this save, begins again
        self._saved_at, self._requested_step = time.monotonic(), step
        self.stalled_seconds = time.perf_counter() - begun

    def _write(self, trainer: Trainer, path: Path) -> None:
        """Write and publish a checkpoint as the first rank has it."""
        try:
            try:
                trainer.save_checkpoint(partial_path(path), weights_only=False)
            except OSError:
                trainer.strategy.barrier()  # the other ranks wait at the end of save_checkpoint
                raise
            if trainer.is_global_zero:
                self._publish(path)
        except OSError:
            with suppress(OSError):
                remove(partial_path(path))
            raise

    def _publish(self, path: Path, files: Mapping[str, FileMark] | None = None) -> None:
        publish_checkpoint(path, files)
        prune(path, self.keep_last, self.keep_every_steps)

    def _finish_saving(self, trainer: Trainer) -> None:
        """Wait until the checkpoint that is being written is complete.

        Raises:
            InputError: it could not be written; on the first rank.
            SystemExit: likewise on the others, as of `_fail_on_all_ranks`.
        """
        try:
            self.writing.wait()
        except OSError as error:  # the same one on all ranks
            path = checkpoint_path(Path(trainer.default_root_dir), self._requested_step)
            _fail(trainer, _write_error(path, error))
        self._saved_step = self._requested_step


def _write_error(path: Path, error: OSError) -> str:
    return (
        f"the checkpoint of step {step_of(path)} could not be written to {path} ({error.strerror or error}): check "
        f"that there is free space and permission to write; {resume_advice(path.parent.parent)}."
    )


def resume_advice(run_dir: Path) -> str:
    """Return a phrase for messages: the checkpoint from which a failed run can resume."""
    last = last_checkpoint(run_dir)
    return f"{last.name} is complete and the same command resumes from it" if last else "there is no checkpoint yet"


def _fail_on_all_ranks(trainer: Trainer, failure: str) -> None:
    """End all ranks if the first one failed.

    Args:
        trainer: the trainer of this rank.
        failure: the first rank's message; empty if nothing failed.

    Raises:
        InputError: on the first rank.
        SystemExit: on the others, with status 0, since Lightning's launcher kills the first rank if another one ends
            with any other status.
    """
    failure = trainer.strategy.broadcast(failure)
    if failure:
        _fail(trainer, failure)


def _fail(trainer: Trainer, failure: str) -> NoReturn:
    raise InputError(failure) if trainer.is_global_zero else SystemExit(0)
