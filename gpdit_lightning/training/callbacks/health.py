"""Keeps broken gradients from the weights, counts damaged samples, and tells of steps out of the ordinary."""

import logging
import math
from typing import Any, TypeVar

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.optim import Optimizer

from gpdit_lightning.errors import InputError
from gpdit_lightning.training.strategies.sharding import sharding_of

log = logging.getLogger(__name__)

T = TypeVar("T")

MOST_BROKEN, MOST_SPIKING, MOST_DAMAGED = 16, 4, 4  # samples that a message names


class NonFiniteError(InputError):
    """Loss or gradient is infinite or not a number, too often to go on."""


class DamagedDataError(InputError):
    """More training samples cannot be read than the run may do without."""


class Health(Callback):
    """Checks loss and gradient of every optimizer step before it is taken, by one read from the device.

    A step whose loss or gradient is not finite is never applied: the weights and their moments stay, while the count of
    steps, the data, the learning rate and the average go on. In fp16 the gradient scaler does this already, as often as
    it must to find its scale; such steps are left to it.

    A training sample that cannot be read is replaced by the loader (see `data/batches.py`). Here the distinct ones of
    the run are counted over all ranks; too many of them stop it.

    It must stand before the callbacks that average, log and save.

    Args:
        max_skips: optimizer steps in a row that may be left out because loss or gradient is not finite; one more stops
            the run, a finite one begins the count anew. 0 stops at the first.
        spike_factor: a gradient norm above so many times the usual one is logged with its samples; 0 logs none.
        spike_window: optimizer steps over which the usual norm is averaged (exponentially), and before the first spike.
        max_damaged_samples: training samples that may be damaged, and replaced; one more stops the run.

    Attributes:
        gradient_norm: of the last optimizer step, before clipping; the mean over ranks, which are alike in DDP.
        usual_norm: running mean of the gradient norms; a spike counts as `spike_factor` times the mean before it.
        spikes: of the run so far.
        skipped: whether the last optimizer step was left out.
        skipped_steps: optimizer steps left out in the run so far.
        damaged: names of the damaged training samples that the run has come upon so far, on all ranks.
    """

    def __init__(
        self, max_skips: int = 0, spike_factor: float = 5.0, spike_window: int = 100, max_damaged_samples: int = 100
    ) -> None:
        if max_skips < 0:
            raise InputError(f"health.max_skips is {max_skips}; it must not be negative.")
        if spike_factor != 0 and not spike_factor > 1:
            raise InputError(f"health.spike_factor is {spike_factor}; it must be above 1, or 0 to log no spikes.")
        if spike_window < 1:
            raise InputError(f"health.spike_window is {spike_window}; it must be at least 1.")
        if max_damaged_samples < 0:
            raise InputError(f"health.max_damaged_samples is {max_damaged_samples}; it must not be negative.")
        self.max_skips, self.spike_factor, self.spike_window = max_skips, spike_factor, spike_window
        self.max_damaged_samples = max_damaged_samples
        self.gradient_norm = self.usual_norm = 0.0
        self.spikes = self.skipped_steps = 0
        self.skipped = False
        self.damaged: list[str] = []
        self._finite_steps = self._skipped_in_a_row = 0
        # Of the optimizer step under way, on the device: read only when something is wrong.
        self._losses: list[Tensor] = []  # each micro-batch's part of the objective
        self._clips: list[tuple[list[str], Tensor, Tensor]] = []  # each micro-batch's keys, clip_of_row, loss by row
        self._measured = False
        self._newly_damaged: list[str] = []  # of the optimizer step under way, on this rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the samples of a micro-batch that were found damaged for the first time."""
        self._newly_damaged += [name for name in batch.damaged if name not in self.damaged]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep a micro-batch's part of the objective."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure loss and gradient; take away a gradient that must not be applied.

        Raises:
            DamagedDataError: too many samples are damaged; the weights are those before this step.
        """
        sharding = sharding_of(pl_module)
        if sharding is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
        else:
            norm = sharding.gradient_norm()
        loss = torch.stack(self._losses).sum()
        measured = torch.stack([norm.to(loss), loss, torch.full_like(loss, len(self._newly_damaged))])
        # The mean over ranks, so that all of them decide alike: each has its own loss and its own samples.
        self.gradient_norm, mean_loss, newly_damaged = trainer.strategy.reduce(measured, reduce_op="mean").tolist()
        if newly_damaged:
            self._count_damaged(trainer)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.skipped = scaler is None and not (math.isfinite(self.gradient_norm) and math.isfinite(mean_loss))
        if self.skipped and sharding is not None:
            sharding.leave_out_step()
        elif self.skipped:
            optimizer.zero_grad()  # to None: the optimiser leaves such a parameter and its moments alone
        self._losses, self._measured = [], True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """With all losses of the step at hand, name the samples of one that was left out or that spikes.

        Raises:
            NonFiniteError: too many steps in a row were left out; the weights are those before the first of them.
        """
        self._clips.append((batch.keys, batch.clip_of_row, outputs["per_clip"]))
        if not self._measured:
            return
        if self.skipped:
            self._count_skip(trainer)
        else:
            self._skipped_in_a_row = 0
            if self.spike_factor and math.isfinite(self.gradient_norm):
                self._watch_norm(trainer)
        self._clips, self._measured = [], False

    def _count_damaged(self, trainer: Trainer) -> None:
        found = dict.fromkeys([*self.damaged, *_of_all_ranks(trainer, self._newly_damaged)])
        self.damaged, self._newly_damaged = list(found), []
        amount, most = len(self.damaged), self.max_damaged_samples
        if amount > most:
            names = ", ".join(self.damaged[:MOST_DAMAGED]) + (" ..." if amount > MOST_DAMAGED else "")
            raise DamagedDataError(
                f"damaged training samples: {amount}, more than health.max_damaged_samples = {most} ({names}); copy "
                "their shards again, or allow more, and go on from the last checkpoint, which is whole."
            )
        if trainer.is_global_zero:
            names = ", ".join(self.damaged[-MOST_DAMAGED:])
            told = "damaged training samples so far, replaced by others: %d (health.max_damaged_samples: %d), last %s."
            log.warning(told, amount, most, names)

    def _count_skip(self, trainer: Trainer) -> None:
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        losses = self._losses_by_key(trainer)
        broken = [key for key, loss in losses if not math.isfinite(loss)]
        keys = list(dict.fromkeys(broken or [key for key, _ in losses]))
        samples = ", ".join(keys[:MOST_BROKEN]) + (" ..." if len(keys) > MOST_BROKEN else "")
        what = "the loss" if broken else "the gradient, though no loss,"
        event = f"optimizer step {trainer.global_step} was not applied: {what} is not finite for the samples {samples}"
        if self._skipped_in_a_row > self.max_skips:
            raise NonFiniteError(
                f"{event}; look at them, or go on from the last checkpoint, which is whole, with a lower learning rate "
                f"or with more such steps left out in a row than health.max_skips = {self.max_skips}."
            )
        if trainer.is_global_zero:
            log.warning("%s (%d in a row; health.max_skips: %d).", event, self._skipped_in_a_row, self.max_skips)

    def _watch_norm(self, trainer: Trainer) -> None:
        norm, bound = self.gradient_norm, self.spike_factor * self.usual_norm
        if self._finite_steps >= self.spike_window and norm > bound:
            self._tell_spike(trainer)
            norm = bound  # one spike must not hide the next, yet a norm that stays high becomes the usual one
        self._finite_steps += 1
        self.usual_norm += (norm - self.usual_norm) / min(self._finite_steps, self.spike_window)

    def _tell_spike(self, trainer: Trainer) -> None:
        self.spikes += 1
        largest: dict[str, float] = {}
        for key, loss in sorted(self._losses_by_key(trainer), key=lambda pair: pair[1], reverse=True):
            largest.setdefault(key, loss)
        samples = ", ".join(f"{key} ({loss:.4g})" for key, loss in list(largest.items())[:MOST_SPIKING])
        message = (
            f"optimizer step {trainer.global_step} has a gradient norm of {self.gradient_norm:.4g} where "
            f"{self.usual_norm:.4g} is usual; the samples with the largest losses: {samples}."
        )
        if trainer.is_global_zero:
            log.warning("%s", message)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_text("health/spike", message, trainer.global_step)

    def _losses_by_key(self, trainer: Trainer) -> list[tuple[str, float]]:
        """Key and own loss of every noisy clip of the optimizer step, over all ranks."""
        losses: list[tuple[str, float]] = []
        for keys, clip_of_row, per_row in self._clips:
            losses += zip((keys[clip] for clip in clip_of_row.tolist()), per_row.tolist(), strict=True)
        return _of_all_ranks(trainer, losses)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to tell the same spikes, skips and damage as an uninterrupted one."""
        return {
            "usual_norm": self.usual_norm,
            "finite_steps": self._finite_steps,
            "spikes": self.spikes,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self._skipped_in_a_row,
            "damaged": self.damaged,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self.usual_norm, self._finite_steps = state_dict["usual_norm"], state_dict["finite_steps"]
        self.spikes, self.skipped_steps = state_dict["spikes"], state_dict["skipped_steps"]
        self._skipped_in_a_row, self.damaged = state_dict["skipped_in_a_row"], state_dict["damaged"]


def _of_all_ranks(trainer: Trainer, own: list[T]) -> list[T]:
    """The items of all ranks together, in the order of the ranks."""
    if trainer.world_size == 1:
        return own
    of_ranks: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(of_ranks, own)
    return [item for of_rank in of_ranks for item in of_rank]
