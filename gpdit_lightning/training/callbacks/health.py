"""Checks of the training: non-finite losses and gradients, damaged samples, gradient spikes."""

import logging
import math
from itertools import chain
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from gpdit_lightning.errors import InputError
from gpdit_lightning.training.loggers import log_text
from gpdit_lightning.training.reduction import of_all_ranks, reduce_over_ranks
from gpdit_lightning.training.strategies.sharding import sharded_strategy_of

log = logging.getLogger(__name__)


# The number of samples that a message lists.
MAX_NON_FINITE, MAX_SPIKING, MAX_DAMAGED = 16, 4, 4

MAX_STALL_MINUTES = 7 * 24 * 60


class NonFiniteError(InputError):
    """The loss or gradient is infinite or NaN in more consecutive steps than allowed."""


class DamagedDataError(InputError):
    """More training samples are damaged than allowed."""


class Health(Callback):
    """Checks the loss and the gradient of every optimizer step before it is applied, with one transfer from the device.

    A step whose loss or gradient is not finite is skipped: weights and optimizer state stay unchanged, while the step
    count, the data, the learning rate and the average advance. In fp16 the gradient scaler skips such steps until it
    has found its scale; this callback does not count them.

    The loader replaces a training sample that cannot be read (see `data/buckets.py`). This callback counts the distinct
    damaged samples over all ranks, and stops the run if there are too many.

    It must come before the callbacks that average, log and save.

    Args:
        max_skips: maximum number of consecutive optimizer steps that are skipped because loss or gradient is not
            finite; one more stops the run.
        spike_factor: multiple of the mean gradient norm above which the samples of a step are logged; 0 for none.
        spike_window: optimizer steps of the exponential moving average of the norm, and before the first spike.
        max_damaged_samples: maximum number of damaged training samples, which are replaced; one more stops the run.
        stall_minutes: minutes without a heartbeat or progress of one of several ranks after which the run ends; four
            times as many while checkpoints, previews and scores are written; 0 for no limit.

    Attributes:
        gradient_norm: gradient norm of the last optimizer step before clipping, as the mean over ranks; in DDP all
            ranks have the same.
        mean_norm: moving average of the gradient norms; a spike counts as `spike_factor` times the previous average.
        spikes: number of spikes of the run.
        skipped: whether the last optimizer step was skipped.
        skipped_steps: number of skipped optimizer steps of the run.
        damaged: names of the damaged training samples of the run, over all ranks.
    """

    def __init__(
        self,
        max_skips: int = 0,
        spike_factor: float = 5.0,
        spike_window: int = 100,
        max_damaged_samples: int = 100,
        stall_minutes: float = 30.0,
    ) -> None:
        if max_skips < 0:
            raise InputError(f"health.max_skips is {max_skips}; it must not be negative.")
        if spike_factor != 0 and not spike_factor > 1:
            raise InputError(f"health.spike_factor is {spike_factor}; it must be above 1, or 0 to log no spikes.")
        if spike_window < 1:
            raise InputError(f"health.spike_window is {spike_window}; it must be at least 1.")
        if max_damaged_samples < 0:
            raise InputError(f"health.max_damaged_samples is {max_damaged_samples}; it must not be negative.")
        if not 0 <= stall_minutes <= MAX_STALL_MINUTES:
            raise InputError(
                f"health.stall_minutes is {stall_minutes}; give minutes up to {MAX_STALL_MINUTES}, or 0 for no limit."
            )
        self.stall_minutes = stall_minutes
        self.max_skips, self.spike_factor, self.spike_window = max_skips, spike_factor, spike_window
        self.max_damaged_samples = max_damaged_samples
        self.gradient_norm = self.mean_norm = 0.0
        self.spikes = self.skipped_steps = 0
        self.skipped = False
        self.damaged: list[str] = []
        self._finite_steps = self._consecutive_skips = 0
        # Of the current optimizer step, on the device: read only if a step is skipped or has a spike.
        self._losses: list[Tensor] = []  # of each micro-batch, with its weight in the objective
        self._clips: list[tuple[list[str], Tensor, Tensor]] = []  # each micro-batch's keys, clip_of_row, loss by row
        self._measured = False
        self._newly_damaged: list[str] = []  # of the current optimizer step, on this rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Collect the damaged samples of a micro-batch that are not counted yet."""
        self._newly_damaged += [name for name in batch.damaged if name not in self.damaged]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Collect the weighted loss of a micro-batch."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure the loss and the gradient, and skip the step if one of them is not finite.

        Raises:
            DamagedDataError: too many samples are damaged; the step is not applied.
        """
        sharded = sharded_strategy_of(pl_module)
        if sharded is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
        else:
            norm = sharded.gradient_norm()
        loss = torch.stack(self._losses).sum()
        measured = torch.stack([norm.to(loss), loss, torch.full_like(loss, len(self._newly_damaged))])
        # Ranks have different losses and samples; with the mean all of them make the same decision.
        mean = reduce_over_ranks(measured, "sum") / trainer.world_size
        self.gradient_norm, mean_loss, newly_damaged = mean.tolist()
        if newly_damaged:
            self._count_damaged(trainer)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.skipped = scaler is None and not (math.isfinite(self.gradient_norm) and math.isfinite(mean_loss))
        if self.skipped and sharded is not None:
            sharded.skip_step()
        elif self.skipped:
            optimizer.zero_grad()  # to None: the optimizer skips parameters without a gradient, and their state
        self._losses, self._measured = [], True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the step's last micro-batch, log the samples of a step that was skipped or has a gradient spike.

        Raises:
            NonFiniteError: too many consecutive steps were skipped; the weights are those before the first of them.
        """
        self._clips.append((batch.keys, batch.clip_of_row, outputs["per_clip"]))
        if not self._measured:
            return
        if self.skipped:
            self._count_skip(trainer)
        else:
            self._consecutive_skips = 0
            if self.spike_factor and math.isfinite(self.gradient_norm):
                self._update_mean_norm(trainer)
        self._clips, self._measured = [], False

    def _count_damaged(self, trainer: Trainer) -> None:
        distinct = dict.fromkeys(chain(self.damaged, *of_all_ranks(self._newly_damaged)))
        self.damaged, self._newly_damaged = list(distinct), []
        amount, most = len(self.damaged), self.max_damaged_samples
        if amount > most:
            names = ", ".join(self.damaged[:MAX_DAMAGED]) + (" ..." if amount > MAX_DAMAGED else "")
            raise DamagedDataError(
                f"damaged training samples: {amount}, more than health.max_damaged_samples = {most} ({names}); copy "
                "their shards again, or allow more, and resume from the last checkpoint."
            )
        if trainer.is_global_zero:
            names = ", ".join(self.damaged[-MAX_DAMAGED:])
            message = (
                "damaged training samples so far, replaced by others: %d (health.max_damaged_samples: %d), last %s."
            )
            log.warning(message, amount, most, names)

    def _count_skip(self, trainer: Trainer) -> None:
        self.skipped_steps += 1
        self._consecutive_skips += 1
        losses = self._losses_by_key()
        not_finite = [key for key, loss in losses if not math.isfinite(loss)]
        keys = list(dict.fromkeys(not_finite or [key for key, _ in losses]))
        samples = ", ".join(keys[:MAX_NON_FINITE]) + (" ..." if len(keys) > MAX_NON_FINITE else "")
        quantity = "the loss" if not_finite else "the gradient (but no loss)"
        event = f"{quantity} is not finite for the samples {samples}"
        if self._consecutive_skips > self.max_skips:
            raise NonFiniteError(
                f"training stopped at optimizer step {trainer.global_step}: {event}; inspect them, or resume from the "
                f"last checkpoint with a lower learning rate or with health.max_skips above {self.max_skips}."
            )
        if trainer.is_global_zero:
            message = "optimizer step %d was skipped: %s (%d consecutive; health.max_skips: %d)."
            log.warning(message, trainer.global_step, event, self._consecutive_skips, self.max_skips)

    def _update_mean_norm(self, trainer: Trainer) -> None:
        norm, bound = self.gradient_norm, self.spike_factor * self.mean_norm
        if self._finite_steps >= self.spike_window and norm > bound:
            self._log_spike(trainer)
            norm = bound  # so that one spike does not hide the next; a norm that stays high becomes the mean
        self._finite_steps += 1
        self.mean_norm += (norm - self.mean_norm) / min(self._finite_steps, self.spike_window)

    def _log_spike(self, trainer: Trainer) -> None:
        self.spikes += 1
        largest: dict[str, float] = {}
        for key, loss in sorted(self._losses_by_key(), key=lambda pair: pair[1], reverse=True):
            largest.setdefault(key, loss)
        samples = ", ".join(f"{key} ({loss:.4g})" for key, loss in list(largest.items())[:MAX_SPIKING])
        message = (
            f"optimizer step {trainer.global_step} has a gradient norm of {self.gradient_norm:.4g} where "
            f"the mean is {self.mean_norm:.4g}; the samples with the largest losses: {samples}."
        )
        if trainer.is_global_zero:
            log.warning("%s", message)
            log_text(trainer.loggers, "warnings/spike", message, trainer.global_step)

    def _losses_by_key(self) -> list[tuple[str, float]]:
        """Return the key and the loss of every noisy clip of the optimizer step, over all ranks."""
        losses: list[tuple[str, float]] = []
        for keys, clip_of_row, per_row in self._clips:
            losses += zip((keys[clip] for clip in clip_of_row.tolist()), per_row.tolist(), strict=True)
        return list(chain.from_iterable(of_all_ranks(losses)))

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, so that a resumed run reports the same as an uninterrupted one."""
        return {  # under the names of earlier releases
            "usual_norm": self.mean_norm,
            "finite_steps": self._finite_steps,
            "spikes": self.spikes,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self._consecutive_skips,
            "damaged": self.damaged,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counters."""
        self.mean_norm, self._finite_steps = state_dict["usual_norm"], state_dict["finite_steps"]
        self.spikes, self.skipped_steps = state_dict["spikes"], state_dict["skipped_steps"]
        self._consecutive_skips, self.damaged = state_dict["skipped_in_a_row"], state_dict["damaged"]
