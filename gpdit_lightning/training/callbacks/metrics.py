"""Logged scalars of a run: losses by source and noise level, gradient, learning rate, EMA, health, throughput."""

import math
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from gpdit_lightning.data.batches import TimedLoader
from gpdit_lightning.data.datamodule import LatentDataModule
from gpdit_lightning.diffusion import QuartileLoss
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.training.callbacks.ema import EMA
from gpdit_lightning.training.callbacks.health import Health
from gpdit_lightning.training.callbacks.progress import StepProgress
from gpdit_lightning.training.callbacks.throughput import Throughput
from gpdit_lightning.training.loggers import log_layout

SUM, COUNT = 0, 1


class LossTable:
    """Running sums of the loss by source and quartile of the noise level, or in one part for losses without noise.

    Sums and counts are added over micro-batches, ranks and interruptions, and divided last. They are float64, or
    float32 on MPS, which has no float64.

    Attributes:
        several_sources: whether the run has several sources. If they alternate, few steps may contain one of them only.
        quarters: for each source the means by quartile that the last call of `means` computed; None without frames.
    """

    def __init__(self) -> None:
        self.several_sources = False
        self.rows: dict[str, Tensor] = {}  # source -> (2, parts) sums and counts by quartile
        self.weights: dict[str, float] = {}  # source -> sum of its micro-batches' weights in the objective
        self.quarters: dict[str, list[float | None]] = {}

    def add(self, source: str, weight: float, quartiles: QuartileLoss) -> None:
        """Add one micro-batch."""
        row = torch.stack(quartiles)
        if row.device.type != "mps":
            row = row.double()
        self.rows[source] = self.rows[source] + row if source in self.rows else row
        self.weights[source] = self.weights.get(source, 0.0) + weight

    def means(self, trainer: Trainer) -> dict[str, float]:
        """Return `loss`, `loss_q1` to `loss_q4` and, with several sources, `loss_SOURCE`, over all ranks.

        `loss` weights the sources as in the objectives of the steps; the quartiles are means over the frames of all
        sources. Resets the sums.
        """
        names = sorted(self.rows)
        if not names:
            return {}
        table = torch.stack([self.rows[name] for name in names])
        table = trainer.strategy.reduce(table, reduce_op="sum").cpu()
        total = sum(self.weights.values())
        per_source = {name: float(row[SUM].sum() / row[COUNT].sum()) for name, row in zip(names, table, strict=True)}
        means = {"loss": sum(self.weights[name] / total * mean for name, mean in per_source.items())}
        self.quarters = {
            name: [value / count if count else None for value, count in zip(*row.tolist(), strict=True)]
            for name, row in zip(names, table, strict=True)
            if row.shape[1] > 1
        }
        pooled = table.sum(dim=0)
        for quartile in range(4 if pooled.shape[1] > 1 else 0):
            if pooled[COUNT, quartile] > 0:
                means[f"loss_q{quartile + 1}"] = float(pooled[SUM, quartile] / pooled[COUNT, quartile])
        if self.several_sources or len(names) > 1:
            means |= {f"loss_{name}": mean for name, mean in per_source.items()}
        self.rows, self.weights = {}, {}
        return means


class MetricsLogger(Callback):
    """Logs the means over the steps since the last log, every `every_steps` optimizer steps.

    The first step of a run is logged too, and the last one. TensorBoard sorts tags by name: the names make it show the
    losses first, then samples and speed, and warnings last.

    Tags:

    - `loss/train`, `train/loss_q1..q4`, `train/loss_SOURCE`, without skipped steps; `loss/val` and `val/...` likewise;
    - `train/grad_norm`, without skipped steps; `train/lr`, of the last step;
    - `train/ema_distance`: |weights - average| / |weights|;
    - `system/steps_per_s`, `system/clips_per_s`, `system/tokens_per_s` (tokens of noisy frames, or of
      all frames in classification): over all ranks;
    - `system/tflops_per_s`: FLOPs of the model per device, without recomputation; `system/mfu`: their ratio to the
      device's peak in bf16, if it is known;
    - `system/data_wait`: fraction of the time spent waiting for the loader, maximum over ranks;
    - `system/peak_memory_gib`: since the start of the process, maximum over ranks;
    - `system/hours_left`: estimated time until the last step;
    - `warnings/skipped_steps`, `warnings/spikes`, `warnings/damaged_samples`: since the start of the run, and only
      where they are above 0.

    Args:
        health: measures the gradient; must come before this callback.
        ema: the average; must come before this callback.
        config: architecture of the backbone, to count tokens and FLOPs.
        every_steps: optimizer steps between logs.
        scores: whether the run logs scores, which then have charts.
    """

    def __init__(self, health: Health, ema: EMA, config: GPDiTConfig, every_steps: int, scores: bool = False) -> None:
        self.health, self.ema, self.every_steps, self.scores = health, ema, every_steps, scores
        self.train, self.validation = LossTable(), LossTable()
        self.throughput = Throughput(config)
        self.learning_rate = 0.0
        self.norms = 0.0, 0  # sum of the gradient norms, and their number
        self._step_losses: list[tuple[str, float, QuartileLoss]] = []
        self._start = 0  # the step from which this process continues
        self._last_step = -1
        self._validation: dict[str, Any] = {}  # the record of the last validation, as `ValidationLoss.to_dict`

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the step of a resumed run, reset the peak memory, and describe the charts to TensorBoard."""
        self._start = self._last_step = trainer.global_step
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, LatentDataModule)
        self.train.several_sources = len(data.plan.sources) > 1
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
        if trainer.is_global_zero:
            names = [source.name for source in data.plan.sources]
            log_layout(trainer.loggers, names if self.train.several_sources else [], self.scores)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Store the learning rate of the step, before the schedule advances."""
        self.learning_rate = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a micro-batch; log after the first and the last step, and after every `every_steps` optimizer steps."""
        step = trainer.global_step
        ends_step, self._last_step = step != self._last_step, step
        ends_window = ends_step and (step % self.every_steps == 0 or step == trainer.max_steps)
        self._step_losses.append((batch.source, batch.weight, outputs["quartiles"]))
        if ends_step:
            if not self.health.skipped:
                if math.isfinite(norm := self.health.gradient_norm):  # otherwise the fp16 scaler skips the step
                    self.norms = self.norms[0] + norm, self.norms[1] + 1
                for losses in self._step_losses:
                    self.train.add(*losses)
            self._step_losses = []
        # Reading the means waits for the device, so the time below includes its work.
        scalars = self._training_scalars(trainer, pl_module) if ends_window or (ends_step and step == 1) else {}
        loader = trainer.train_dataloader
        assert isinstance(loader, TimedLoader)
        self.throughput.add(batch, loader, ends_step)
        if ends_window:
            scalars |= {f"system/{name}": rate for name, rate in self.throughput.rates(trainer).items()}
        elif ends_step and step == self._start + 1:
            self.throughput.reset()  # the first step of a process is slow
        if ends_step:
            left = self._show_pace(trainer)
            scalars |= {"system/hours_left": left / 3600} if ends_window and left is not None else {}
        if scalars:
            log_scalars(trainer, pl_module, scalars, "loss/train")

    def _training_scalars(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """Return the scalars of the steps since the last call, without those of the throughput."""
        scalars = _tags("train", self.train.means(trainer))
        total, steps = self.norms
        self.norms = 0.0, 0
        scalars |= {"train/grad_norm": total / steps} if steps else {}
        scalars |= {"train/lr": self.learning_rate, "train/ema_distance": self.ema.distance(module)}
        counts = {
            "skipped_steps": self.health.skipped_steps,
            "spikes": self.health.spikes,
            "damaged_samples": len(self.health.damaged),
        }
        return scalars | {f"warnings/{name}": count for name, count in counts.items() if count}

    def _show_pace(self, trainer: Trainer) -> float | None:
        """Show speed and remaining time in the progress bar; return the remaining seconds, if they are known."""
        bar, pace = trainer.progress_bar_callback, self.throughput.pace
        left = pace.seconds_left(trainer)
        if isinstance(bar, StepProgress):
            bar.show_pace(pace.clips_per_s * trainer.world_size, left)
        return left

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a validation batch."""
        self.validation.add(batch.source, batch.weight, outputs["quartiles"])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log and record the validation means, but not those of the sanity check before training."""
        scalars = _tags("val", self.validation.means(trainer))
        if scalars and not trainer.sanity_checking:
            self._validation = {"step": trainer.global_step, "quarters": self.validation.quarters}
            log_scalars(trainer, pl_module, scalars, "loss/val")

    def on_test_batch_end(self, *arguments: Any, **options: Any) -> None:
        """As in validation."""
        self.on_validation_batch_end(*arguments, **options)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the test means."""
        scalars = _tags("test", self.validation.means(trainer))
        if scalars:
            log_scalars(trainer, pl_module, scalars, "loss/test")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the last validation, and the sums since the last log, over all ranks, for the logs of a resumed run."""
        if self._validation:
            checkpoint["validation"] = self._validation
        # A clone, since the reduction is in place.
        reduce = trainer.strategy.reduce
        rows = {name: reduce(row.clone(), reduce_op="sum").cpu() for name, row in self.train.rows.items()}
        checkpoint["curves"] = {"rows": rows, "weights": dict(self.train.weights), "norms": self.norms}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the last validation, and the sums on the first rank; those of the others are zeros."""
        self._validation = checkpoint.get("validation", {})
        sums = checkpoint["curves"]
        kept = 1.0 if trainer.is_global_zero else 0.0
        device = trainer.strategy.root_device
        self.train.rows = {name: (row * kept).to(device) for name, row in sums["rows"].items()}
        self.train.weights = dict(sums["weights"])
        self.norms = sums["norms"]


def _tags(part: str, means: dict[str, float]) -> dict[str, float]:
    """Return the means of a :class:`LossTable` by tag: `loss/PART` for the loss, `PART/loss_...` for its parts."""
    return {f"loss/{part}" if name == "loss" else f"{part}/{name}": mean for name, mean in means.items()}


def log_scalars(
    trainer: Trainer, module: LightningModule, scalars: dict[str, float], in_progress_bar: str = ""
) -> None:
    """Log with the optimizer step as x axis; Lightning would count micro-batches.

    Args:
        trainer: gives the loggers and the step.
        module: the stage.
        scalars: values by tag.
        in_progress_bar: the tag that the progress bar shows; empty: none.
    """
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=trainer.global_step)
    bar = trainer.progress_bar_callback
    if isinstance(bar, StepProgress) and in_progress_bar in scalars:
        bar.show(in_progress_bar, scalars[in_progress_bar])
    for name, value in scalars.items():
        prog_bar = name == in_progress_bar and not isinstance(bar, StepProgress)
        module.log(name, value, prog_bar=prog_bar, logger=False, rank_zero_only=True)
