"""Runs for test_sharding.py, several in one launch: python -m ...sharded_runs FOLDER, which contains runs.json."""

import gc
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from gpdit_lightning import GPDiTConfig
from gpdit_lightning.data.batches import LatentBatch
from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.diffusion import RotationSampler
from gpdit_lightning.generation import GenerationConfig, rollout
from gpdit_lightning.options.evaluate import NetworkOptions
from gpdit_lightning.stages import GPDiTStage
from gpdit_lightning.training.callbacks.ema import EMA
from gpdit_lightning.training.callbacks.health import Health
from gpdit_lightning.training.callbacks.previews import Preview
from gpdit_lightning.training.callbacks.run_checkpoint import RunCheckpoint
from gpdit_lightning.training.callbacks.scores import Scores
from gpdit_lightning.training.callbacks.stopping import shut_down_process_group
from gpdit_lightning.training.optimizer import OptimizerConfig
from gpdit_lightning.training.strategies import register_strategies
from gpdit_lightning.training.strategies.sharding import sharded_strategy_of
from gpdit_lightning.training.strategies.zero import ZeRO
from tests.model.dtypes import Dtypes, record_dtypes


class Stage(GPDiTStage):
    """Trains with SGD, which unlike AdamW depends on the scale of a gradient, or with non-finite losses on one rank."""

    def __init__(self, run: dict[str, Any], latent_channels: int) -> None:
        config = GPDiTConfig(
            size="tiny",
            layers=2,
            width=16,
            mlp_width=24,
            heads=2,
            latent_channels=latent_channels,
            activation_checkpointing=run.get("recompute", False),
        )
        # A large epsilon: Adam divides by the gradient's size, and would make a step of what is rounding alone.
        rate = run.get("learning_rate", 0.01)
        optimizer = OptimizerConfig(learning_rate=rate, warmup_steps=2, weight_decay=0.1, eps=1e-5)
        super().__init__(config, optimizer=optimizer)
        self.run = run

    def configure_optimizers(self) -> Any:
        return super().configure_optimizers() if self.run["optimizer"] == "adamw" else self.sgd()

    def on_train_start(self) -> None:
        if self.run["optimizer"] == "adamw":
            super().on_train_start()

    def sgd(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.5)

    def training_step(self, batch: LatentBatch, batch_idx: int) -> dict[str, Any]:
        last_rank = self.trainer.global_rank == self.trainer.world_size - 1
        if last_rank and batch_idx == self.run.get("broken_gradient"):
            batch.latents[-1] *= math.nan
        output = super().training_step(batch, batch_idx)
        if last_rank and batch_idx == self.run.get("broken_loss"):
            output["loss"] = output["loss"] + math.inf
        return output


class RandomStage(Stage):
    """Begins with weights that are all random, since a new model predicts zero."""

    def configure_model(self) -> None:
        super().configure_model()
        generator = torch.Generator().manual_seed(2)
        for parameter in self.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


class Record(Callback):
    """Records losses, norms, validation, precisions and results of a run."""

    def __init__(self, health: Health, ema: EMA) -> None:
        self.health, self.ema = health, ema
        self.seen: dict[str, Any] = {"losses": [], "norms": [], "distances": [], "validation": [], "dtypes": []}
        self.tensors: dict[str, Any] = {}
        self.precisions: Dtypes = {}

    def on_train_start(self, trainer: Trainer, pl_module: Stage) -> None:
        self.precisions, self.hooks = record_dtypes(pl_module.backbone)
        sharding = sharded_strategy_of(pl_module)
        state = trainer.strategy.lightning_module_state_dict()
        if sharding is not None:
            state = {name: sharding.gather(values) for name, values in state.items()}
        self.tensors["first"] = {name: values.clone() for name, values in state.items() if values is not None}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        sharding = sharded_strategy_of(pl_module)
        if sharding is None or "offload" in pl_module.run["strategy"]:
            return
        if isinstance(sharding, ZeRO):
            gradients = sharding.zero_optimizer.averaged_gradients[0]
        else:
            gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        if gradients:  # a skipped step has none
            self.seen["gradients"] = sorted({str(gradient.dtype) for gradient in gradients})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.precisions.setdefault("loss", set()).add(str(outputs["loss"].dtype).removeprefix("torch."))
        self.seen["losses"].append(mean(trainer, outputs["loss"].detach()))
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.seen["norms"].append(self.health.gradient_norm)
            self.seen["distances"].append(self.ema.distance(pl_module))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.seen["validation"].append(mean(trainer, outputs["loss"]))

    def on_train_end(self, trainer: Trainer, pl_module: Stage) -> None:
        """Features and a rollout of the averaged weights, which all ranks compute together."""
        for hook in self.hooks:
            hook.remove()
        self.seen["precisions"] = {name: sorted(dtypes) for name, dtypes in self.precisions.items()}
        backbone = pl_module.backbone.eval()
        clip = torch.randn(2, 3, backbone.config.latent_channels, 8, 8, generator=torch.Generator().manual_seed(1))
        with self.ema.averaged(pl_module):
            with torch.no_grad():
                self.tensors["features"] = list(backbone.features(clip, [0, 1, 2]).values())
            config = GenerationConfig(RotationSampler(2, schedule=pl_module.schedule))
            frames = rollout(backbone, clip[:, :1], 2, config)
            self.tensors["rollout"] = torch.stack(list(frames))
        sharding = sharded_strategy_of(pl_module)
        if sharding is not None:
            state = sharding.inner_optimizer.state[next(iter(sharding.shards.values())).storage]
            kept = [*sharding.master_weights().values(), *self.ema.average.values(), *state.values()]
            if isinstance(sharding, ZeRO):
                working = {str(parameter.dtype) for parameter in pl_module.parameters()}
                reduced = sharding.zero_optimizer.communication_data_type
            else:  # the parameters are the masters
                working = {str(backbone.new_cache(1, 2, 8, 8)._buffer.dtype)}
                reduced = backbone._get_fsdp_state()._mp_policy.reduce_dtype
            self.seen["dtypes"] = [sorted(working), sorted({str(tensor.dtype) for tensor in kept}), str(reduced)]


def mean(trainer: Trainer, value: torch.Tensor) -> float:
    return float(trainer.strategy.reduce(value.clone(), reduce_op="mean"))


def train(folder: Path, run: dict[str, Any], strategy: str, devices: int) -> None:
    """Train a run in `folder/NAME`, and write its record to `seen.pt` there."""
    torch.manual_seed(0)
    images, videos = run["micro_batches"]
    ranks = run.get("ranks", 2)
    data = LatentDataModule(
        images=SourceConfig([run["shards"]], batch_size=2 * ranks if images else 0, micro_batches=max(1, images)),
        videos=SourceConfig([run["shards"]], batch_size=4 * ranks, micro_batches=videos),
        context_dropout=0.25,
        max_ranks=ranks,
        validation_batches=1,
    )
    stage = (RandomStage if run.get("random_weights") else Stage)(run, data.codec.latent_channels)
    health, ema = Health(max_skips=1), EMA(0.9)
    record = Record(health, ema)
    generating: list[Callback] = []
    if run.get("previews"):
        generating.append(Preview(every_steps=2, clips=2, context_frames=1, sampler_steps=2))
    if run.get("scores"):  # five clips in three chunks: in the last round one of two ranks repeats the last chunk
        networks = {name: NetworkOptions(**options) for name, options in run["scores"].items()}
        generating.append(Scores(every_steps=2, clips=5, chunk=2, context_frames=1, sampler_steps=2, **networks))
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        precision=run.get("precision", "32-true"),
        max_steps=4,
        accumulate_grad_batches=data.micro_batches_per_step,
        gradient_clip_val=run.get("clip"),
        default_root_dir=str(folder / run["name"]),
        callbacks=[health, ema, record, *generating, RunCheckpoint(every_steps=2, keep_last=2)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=2 * data.micro_batches_per_step,
        use_distributed_sampler=False,
    )
    trainer.fit(stage, data, ckpt_path=run.get("resume"), weights_only=True)
    if trainer.is_global_zero:
        scores = {name: float(value) for name, value in trainer.callback_metrics.items() if "decoded" in name}
        seen = record.seen | record.tensors | {"skipped": health.skipped_steps, "scores": scores}
        torch.save(seen, folder / run["name"] / "seen.pt")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    register_strategies()
    place = Path(sys.argv[1])
    for description in json.loads((place / "runs.json").read_text()):
        train(place, description, description["strategy"], description.get("ranks", 2))
        gc.collect()
        kept = [thing for thing in gc.get_objects() if issubclass(type(thing), Stage)]
        assert not kept, f"{description['name']} is still in memory"
    shut_down_process_group()
