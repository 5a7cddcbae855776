"""Runs for test_zero.py, several in one launch of two processes: python zero_runs.py FOLDER, which holds runs.json."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from gpdit_lightning import GPDiTConfig
from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.stages import GPDiTStage
from gpdit_lightning.training.ema import EMA
from gpdit_lightning.training.health import Health
from gpdit_lightning.training.optimizer import OptimizerConfig


class SGDStage(GPDiTStage):
    """Shows the size of a gradient, which AdamW hides."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Record(Callback):
    """Keeps loss, gradient norm and distance of the average at every optimizer step, and validation losses."""

    def __init__(self, health: Health, ema: EMA) -> None:
        self.health, self.ema = health, ema
        self.losses: list[list[float]] = [[]]
        self.norms: list[float] = []
        self.distances: list[float] = []
        self.validation: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses[-1].append(float(trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")))
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.losses.append([])
            self.norms.append(self.health.gradient_norm)
            self.distances.append(self.ema.distance(pl_module))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        self.validation.append(float(trainer.strategy.reduce(outputs["loss"].clone(), reduce_op="mean")))


def train(folder: Path, run: dict[str, Any], strategy: str, devices: int) -> None:
    """Train as `run` says, and write what happened to `folder/NAME.pt`."""
    torch.manual_seed(0)
    parts = run["micro_batches"]  # of images and of videos in a step
    data = LatentDataModule(
        images=SourceConfig(manifests=[run["shards"]], batch_size=4 if parts[0] else 0, micro_batches=parts[0] or 1),
        videos=SourceConfig(manifests=[run["shards"]], batch_size=8, micro_batches=parts[1]),
        context_dropout=0.25,
        max_ranks=2,
        validation_batches=1,
    )
    config = GPDiTConfig(size="tiny", layers=2, width=16, mlp_width=24, heads=2, latent_channels=4)
    stage_class = SGDStage if run["optimizer"] == "sgd" else GPDiTStage
    stage = stage_class(config, optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=2, weight_decay=0.1))
    health, ema = Health(), EMA(0.9)
    record = Record(health, ema)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        precision=run.get("precision", "32-true"),
        max_steps=run["steps"],
        accumulate_grad_batches=data.micro_batches_per_step,
        gradient_clip_val=run.get("clip"),
        default_root_dir=str(folder / run["name"]),
        callbacks=[health, ema, record],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=2 * data.micro_batches_per_step,
        use_distributed_sampler=False,
    )
    trainer.fit(stage, data, ckpt_path=run.get("resume"), weights_only=True)
    trainer.save_checkpoint(folder / f"{run['name']}.ckpt")
    if trainer.is_global_zero:
        figures = {"losses": record.losses, "norms": record.norms, "distances": record.distances}
        figures |= {"validation": record.validation, "steps": trainer.global_step}
        (folder / f"{run['name']}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    for description in json.loads((place / "runs.json").read_text()):
        train(place, description, description["strategy"], 2)
