"""A progress bar over optimizer steps."""

import sys
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from gpdit_lightning.progress import progress_bar

LABELS = {"loss/train": "loss", "loss/val": "val loss"}  # of tags


class StepProgress(ProgressBar):
    """Shows steps, remaining time, the latest training and validation losses and samples per second in one line.

    Lightning's bars count the micro-batches of an epoch. Here an epoch is the whole run, and a step may have many
    micro-batches. Lightning reads every value that is logged with `prog_bar=True` from the device at each micro-batch,
    so the losses are passed to `show` instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm | None = None
        self._enabled = True
        self._shown: dict[str, float] = {}
        self._speed, self._left = "", ""

    def show(self, tag: str, value: float) -> None:
        """Show a value from the next micro-batch on."""
        self._shown[LABELS.get(tag, tag)] = value

    def show_pace(self, samples_per_s: float, seconds_left: float | None) -> None:
        """Show the speed, over all ranks, and the remaining time, if it is known, from the next micro-batch on."""
        self._speed = f"{samples_per_s:.3g} samples/s"
        self._left = "" if seconds_left is None else f"{tqdm.format_interval(seconds_left)} left"

    def disable(self) -> None:
        """Hide the bar; Lightning calls this on every rank except the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar at the current step."""
        has_end = trainer.max_steps > 0
        steps = "step {n_fmt} of {total_fmt}" if has_end else "step {n_fmt}"
        # With `desc` last, instead of tqdm's `postfix`, the line fits into 80 columns.
        in_terminal = f"{steps} |{{bar}}| {{desc}}" if has_end else f"{steps}, {{desc}}"
        self._bar = progress_bar(
            desc="starting",
            bar_format=in_terminal if sys.stderr.isatty() else f"training: {steps}, {{desc}}",
            initial=trainer.global_step,
            total=trainer.max_steps if has_end else None,
            disable=not self._enabled,
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Advance to the trainer's step."""
        if self._bar is None:
            return
        values = self._shown | trainer.progress_bar_metrics  # those that a custom stage or callback logs
        texts = [f"{name} {value:.4f}" for name, value in values.items() if isinstance(value, float)]
        description = ", ".join(text for text in (self._left, *texts, self._speed) if text)
        self._bar.set_description_str(description, refresh=False)
        self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the error message starts on a new line."""
        self.on_train_end(trainer, pl_module)
