"""Checkpoints of a run: when they are saved, and how they are read without unpickling objects."""

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from gpdit_lightning.checkpoints.files import (
    checkpoint_path,
    last_checkpoint,
    prune,
    publish_checkpoint,
    remove,
    remove_leftovers,
    unmark_damaged,
)
from gpdit_lightning.checkpoints.io import (
    FolderCheckpointIO,
)
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import partial_path
from gpdit_lightning.training.callbacks.stopping import Stopped, StopSignals


class RunCheckpoint(Checkpoint):
    """Saves checkpoints in the run folder, and leaves the training at SIGTERM and SIGINT when it has saved.

    Only ever after a whole optimizer step and, if a validation is due then, after that too: who goes on from a
    checkpoint has everything up to its step behind them.

    Args:
        every_steps: optimizer steps between checkpoints; the end of the training and milestones are saved too.
        every_minutes: minutes after which one is saved in between; 0 saves by steps alone.
        keep_last: how many checkpoints are kept.
        keep_every_steps: milestones: a checkpoint every so many steps is kept for good; 0 keeps none.
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
                raise InputError(f"checkpoint.{name} is {value}: take at least {least}.")
        self.every_steps, self.every_minutes = every_steps, every_minutes
        self.keep_last, self.keep_every_steps = keep_last, keep_every_steps
        self._signals = StopSignals(announce=False)
        self._finished_step = 0
        self._saved_at = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write directly, unless the recipe names another way; and keep Lightning from handling signals."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = FolderCheckpointIO()
        # Its SIGTERM handler waits for the other ranks, wherever this one stands.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear away what a killed run left, and see that there is a place to save.

        Raises:
            InputError: the folder cannot be written.
        """
        folder = checkpoint_path(Path(trainer.default_root_dir), 0).parent
        failure = ""
        if trainer.is_global_zero:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                remove_leftovers(folder)
                probe = partial_path(folder / "probe")
                probe.write_text("can be written")
                probe.unlink()
            except OSError as error:
                failure = f"no checkpoint can be saved in {folder} ({error.strerror}): choose another --run_dir."
        _fail_together(trainer, failure)
        self._signals = StopSignals(announce=trainer.is_global_zero)
        self._signals.install()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run stands at a step that is saved already."""
        self._finished_step, self._saved_at = trainer.global_step, time.monotonic()
        if trainer.is_global_zero:
            unmark_damaged(checkpoint_path(Path(trainer.default_root_dir), 0).parent, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """The end of a step, if this was its last micro-batch and no validation follows."""
        if trainer.global_step != self._finished_step and not _validation_follows(trainer):
            self._finish_step(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The end of a step, if the validation did not come in the middle of one."""
        if not trainer.sanity_checking and trainer.global_step != self._finished_step:
            self._finish_step(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Signals mean what they meant before."""
        self._signals.restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As at a regular end."""
        self._signals.restore()

    def _finish_step(self, trainer: Trainer) -> None:
        step = self._finished_step = trainer.global_step
        signum, time_is_up = self._agreed(trainer)
        at_the_end = step == trainer.max_steps or trainer.should_stop
        is_milestone = self.keep_every_steps > 0 and step % self.keep_every_steps == 0
        if signum or time_is_up or at_the_end or is_milestone or step % self.every_steps == 0:
            self._save(trainer, step)
        if signum:
            raise Stopped(step, signum, trainer.is_global_zero)

    def _agreed(self, trainer: Trainer) -> tuple[int, bool]:
        """A stop signal that any rank received (or 0), and whether it is time to save by the first rank's clock."""
        minutes = (time.monotonic() - self._saved_at) / 60
        found = [self._signals.received, int(trainer.is_global_zero and 0 < self.every_minutes <= minutes)]
        if trainer.world_size > 1:
            over_ranks = torch.tensor(found, device=trainer.strategy.root_device)
            found = trainer.strategy.reduce(over_ranks, reduce_op="max").tolist()
        return found[0], bool(found[1])

    def _save(self, trainer: Trainer, step: int) -> None:
        run_dir = Path(trainer.default_root_dir)
        path = checkpoint_path(run_dir, step)
        failure = ""
        try:
            try:
                trainer.save_checkpoint(partial_path(path), weights_only=False)
            except OSError:
                trainer.strategy.barrier()  # the one that saving ends with, where the other ranks wait
                raise
            if trainer.is_global_zero:
                for logger in trainer.loggers:
                    logger.save()  # the curves up to this step: a killed run draws only later ones again
                publish_checkpoint(path)
                prune(path, self.keep_last, self.keep_every_steps)
        except OSError as error:
            with suppress(OSError):
                remove(partial_path(path))
            before = last_checkpoint(run_dir)
            kept = f"{before.name} is whole and the same command goes on from it" if before else "there is none before"
            failure = (
                f"the checkpoint of step {step} could not be written to {path} ({error.strerror or error}): see that "
                f"there is room and permission to write; {kept}."
            )
        _fail_together(trainer, failure)
        self._saved_at = time.monotonic()


def _validation_follows(trainer: Trainer) -> bool:
    """Whether Lightning will validate right after this micro-batch: its own decision, asked for early."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return loop._should_check_val_fx(fetcher) and not loop.val_loop.skip


def _fail_together(trainer: Trainer, failure: str) -> None:
    """End all ranks if the first one failed, so that none waits for it.

    Raises:
        InputError: on the first rank.
        SystemExit: on the others, with status 0, as Lightning's launcher kills the first if another ends otherwise.
    """
    failure = trainer.strategy.broadcast(failure)
    if failure:
        raise InputError(failure) if trainer.is_global_zero else SystemExit(0)
