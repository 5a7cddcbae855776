from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from gpdit_lightning import GPDiTConfig
from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.diffusion import QuartileLoss, denoising_loss
from gpdit_lightning.stages import GPDiTStage, MixedStage
from gpdit_lightning.training.callbacks.ema import EMA
from gpdit_lightning.training.callbacks.health import Health
from gpdit_lightning.training.callbacks.metrics import LossTable, MetricsLogger
from gpdit_lightning.training.callbacks.run_checkpoint import RunCheckpoint
from gpdit_lightning.training.optimizer import OptimizerConfig
from tests.checkpoints.content import read_checkpoint
from tests.data.damage import damage

Fit = Callable[..., Trainer]
Scalars = dict[str, dict[int, float]]  # tag -> step -> value


def trainer_of(*other_ranks: LossTable) -> Trainer:
    """A trainer whose reduction adds the tables of other ranks."""

    def reduce(table: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "sum"
        return table + sum(torch.stack([other.rows[name] for name in sorted(other.rows)]) for other in other_ranks)

    strategy = SimpleNamespace(reduce=reduce, root_device=torch.device("cpu"))
    return SimpleNamespace(strategy=strategy, is_global_zero=True)  # type: ignore[return-value]


def curves_of(config: GPDiTConfig, every_steps: int = 4) -> MetricsLogger:
    return MetricsLogger(Health(), EMA(), config, every_steps)


def random_loss(clips: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prediction, velocity = torch.randn(2, clips, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    return prediction, velocity, torch.rand(clips, 3, generator=generator)


# LossTable


def test_micro_batches_give_the_means_of_one_batch() -> None:
    prediction, velocity, t = random_loss(12, seed=0)
    table = LossTable()
    for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
        table.add("videos", 1 / 3, denoising_loss(prediction[part], velocity[part], t[part])[1])
    means = table.means(trainer_of())
    whole, quartiles, _ = denoising_loss(prediction, velocity, t)
    assert means.keys() == {"loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4"}
    assert means["loss"] == pytest.approx(float(whole))
    for number in range(4):
        expected = float(quartiles.sums[number] / quartiles.counts[number])
        assert means[f"loss_q{number + 1}"] == pytest.approx(expected)


def test_float32_losses_are_added_in_float64() -> None:
    table = LossTable()
    for _ in range(3):
        table.add("videos", 1.0, QuartileLoss(torch.full((4,), 1e8), torch.full((4,), 1.0)))
        table.add("videos", 1.0, QuartileLoss(torch.full((4,), 1.0), torch.full((4,), 1.0)))
    assert table.rows["videos"][0, 0].item() == 3e8 + 3


def test_sources_have_their_weights_in_the_objective() -> None:
    images, videos = (denoising_loss(*random_loss(clips, seed)) for clips, seed in ((8, 1), (3, 2)))
    table = LossTable()
    table.add("images", 0.2, images[1])
    table.add("videos", 0.8, videos[1])
    means = table.means(trainer_of())
    assert means["loss_images"] == pytest.approx(float(images[0]))
    assert means["loss_videos"] == pytest.approx(float(videos[0]))
    assert means["loss"] == pytest.approx(0.2 * float(images[0]) + 0.8 * float(videos[0]))
    pooled = (images[1].sums + videos[1].sums) / (images[1].counts + videos[1].counts)
    assert means["loss_q1"] == pytest.approx(float(pooled[0]))


def test_ranks_give_the_means_of_one_batch() -> None:
    prediction, velocity, t = random_loss(8, seed=3)
    tables = [LossTable(), LossTable()]
    for table, part in zip(tables, (slice(0, 4), slice(4, 8)), strict=True):
        table.add("videos", 1.0, denoising_loss(prediction[part], velocity[part], t[part])[1])
    means = tables[0].means(trainer_of(tables[1]))
    assert means["loss"] == pytest.approx(float(denoising_loss(prediction, velocity, t)[0]))


def test_a_quartile_without_frames_has_no_mean() -> None:
    prediction, velocity, _ = random_loss(2, seed=4)
    table = LossTable()
    table.add("videos", 1.0, denoising_loss(prediction, velocity, torch.full((2, 3), 0.3))[1])
    assert table.means(trainer_of()).keys() == {"loss", "loss_q2"}


def test_quarters_are_the_means_of_each_source() -> None:
    losses = {
        "images": denoising_loss(*random_loss(3, seed=6))[1],
        "videos": denoising_loss(*random_loss(2, seed=7))[1],
    }
    both = LossTable()
    for source, loss in losses.items():
        both.add(source, 1.0, loss)
    both.means(trainer_of())
    for source, loss in losses.items():
        alone = LossTable()
        alone.add(source, 1.0, loss)
        means = alone.means(trainer_of())
        assert both.quarters[source] == [means.get(f"loss_q{number}") for number in (1, 2, 3, 4)]


def test_means_reset_the_sums() -> None:
    table = LossTable()
    table.add("videos", 1.0, denoising_loss(*random_loss(2, seed=5))[1])
    assert table.means(trainer_of())
    assert table.means(trainer_of()) == {}


def test_sums_are_restored_from_a_checkpoint(tiny_config: GPDiTConfig, tmp_path: Path) -> None:
    losses = [denoising_loss(*random_loss(2, seed))[1] for seed in range(4)]
    uninterrupted, before, after = (curves_of(tiny_config) for _ in range(3))
    for loss in losses:
        uninterrupted.train.add("videos", 0.5, loss)
    for loss in losses[:2]:
        before.train.add("videos", 0.5, loss)
    checkpoint: dict[str, Any] = {}
    before.on_save_checkpoint(trainer_of(), None, checkpoint)  # type: ignore[arg-type]
    torch.save(checkpoint, tmp_path / "state")
    after.on_load_checkpoint(trainer_of(), None, torch.load(tmp_path / "state", weights_only=True))  # type: ignore[arg-type]
    for loss in losses[2:]:
        after.train.add("videos", 0.5, loss)
    assert after.train.means(trainer_of()) == uninterrupted.train.means(trainer_of())


def test_restored_sums_count_once_over_ranks(tiny_config: GPDiTConfig) -> None:
    losses = [denoising_loss(*random_loss(2, seed))[1] for seed in range(2)]
    ranks = [curves_of(tiny_config) for _ in losses]
    for rank, loss in zip(ranks, losses, strict=True):
        rank.train.add("videos", 1.0, loss)
    trainer = trainer_of()
    trainer.strategy.reduce = lambda row, reduce_op: row.add_(ranks[1].train.rows["videos"])  # type: ignore[method-assign]
    checkpoint: dict[str, Any] = {}
    ranks[0].on_save_checkpoint(trainer, None, checkpoint)  # type: ignore[arg-type]
    resumed = [curves_of(tiny_config) for _ in losses]
    for number, rank in enumerate(resumed):
        trainer.is_global_zero = number == 0  # type: ignore[misc]
        rank.on_load_checkpoint(trainer, None, checkpoint)  # type: ignore[arg-type]
    expected = ranks[0].train.rows["videos"] + ranks[1].train.rows["videos"]
    assert torch.equal(resumed[0].train.rows["videos"] + resumed[1].train.rows["videos"], expected)


# Scalars in TensorBoard


class StepRecord(Callback):
    """Records the objective and the gradient norm of every optimizer step, independently of MetricsLogger."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.norms: dict[int, float] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
        if gradients:  # none in a skipped step
            self.norms[trainer.global_step + 1] = torch.cat(gradients).norm().item()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = batch_idx // trainer.accumulate_grad_batches + 1
        mean = float(outputs["quartiles"].sums.sum() / outputs["quartiles"].counts.sum())
        self.losses[step] = self.losses.get(step, 0.0) + batch.weight * mean


def mixed_data(shards: Path) -> LatentDataModule:
    """Three micro-batches in every optimizer step."""
    images = SourceConfig([str(shards)], batch_size=4)
    videos = SourceConfig([str(shards)], batch_size=4, micro_batches=2)
    return LatentDataModule(images, videos, validation_batches=1)


def run(
    fit: Fit,
    stage: GPDiTStage,
    data: LatentDataModule,
    folder: Path,
    max_steps: int,
    every_steps: int = 2,
    resume_from: Path | None = None,
    max_skips: int = 0,
    first: Sequence[Callback] = (),
) -> tuple[StepRecord, Scalars]:
    """Train with MetricsLogger; return the independent record, and the scalars in TensorBoard."""
    health, ema, record = Health(max_skips), EMA(0.9), StepRecord()
    callbacks = [
        *first,
        health,
        ema,
        MetricsLogger(health, ema, stage.config, every_steps),
        record,
        RunCheckpoint(every_steps=3),
    ]
    fit(
        stage,
        data,
        folder,
        max_steps,
        callbacks,
        resume_from,
        logger=TensorBoardLogger(folder, name="", version="tensorboard"),
        limit_val_batches=1.0,
        val_check_interval=4 * data.micro_batches_per_step,
    )
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    return record, {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


def mixed_stage(config: GPDiTConfig) -> MixedStage:
    torch.manual_seed(0)
    return MixedStage(config, optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=4))


def test_scalars_are_logged_by_optimizer_step(
    fit: Fit, tiny_config: GPDiTConfig, tiny_shards: Path, tmp_path: Path
) -> None:
    record, scalars = run(fit, mixed_stage(tiny_config), mixed_data(tiny_shards), tmp_path, max_steps=8)
    losses = ["loss", "loss_images", "loss_videos", *(f"loss_q{number}" for number in (1, 2, 3, 4))]
    wanted = {f"{group}/{name}" for group in ("train", "val") for name in losses[1:]} | {"loss/train", "loss/val"}
    wanted |= {"train/grad_norm", "train/lr", "train/ema_distance"}
    perf = ("steps_per_s", "clips_per_s", "tokens_per_s", "tflops_per_s", "data_wait", "peak_memory_gib", "hours_left")
    wanted |= {f"system/{name}" for name in perf}
    assert scalars.keys() - {"epoch", "hp_metric"} == wanted
    for tag in wanted:
        validated, timed = tag == "loss/val" or tag.startswith("val/"), tag.startswith("system/")
        assert list(scalars[tag]) == ([4, 8] if validated else [2, 4, 6, 8] if timed else [1, 2, 4, 6, 8]), tag
    assert scalars["loss/train"][1] == pytest.approx(record.losses[1], rel=1e-5)
    assert scalars["loss/train"][2] == pytest.approx(record.losses[2], rel=1e-5)
    for step in (4, 6, 8):
        expected = (record.losses[step - 1] + record.losses[step]) / 2
        assert scalars["loss/train"][step] == pytest.approx(expected, rel=1e-5)
        both = scalars["train/loss_images"][step] + scalars["train/loss_videos"][step]
        assert scalars["loss/train"][step] == pytest.approx(both / 2, rel=1e-5)
        assert scalars["train/grad_norm"][step] == pytest.approx((record.norms[step - 1] + record.norms[step]) / 2)
        assert scalars["train/ema_distance"][step] > 0
        assert scalars["system/tokens_per_s"][step] > scalars["system/clips_per_s"][step] > 0
        assert 0 < scalars["system/data_wait"][step] < 1
        assert scalars["system/peak_memory_gib"][step] > 0
    assert scalars["train/lr"][8] == pytest.approx(0.01)
    validation = read_checkpoint(tmp_path)["validation"]
    assert validation["step"] == 8
    for source, quarters in validation["quarters"].items():
        assert len(quarters) == 4
        present = [loss for loss in quarters if loss is not None]
        assert min(present) <= scalars[f"val/loss_{source}"][8] <= max(present)
    # 4 images of 16 tokens and 4 clips of 48
    tokens_per_clip = scalars["system/tokens_per_s"][8] / scalars["system/clips_per_s"][8]
    assert tokens_per_clip == pytest.approx((4 * 16 + 4 * 48) / 8, rel=1e-5)


def test_alternating_sources_have_a_curve_each(
    fit: Fit, tiny_config: GPDiTConfig, tiny_shards: Path, tmp_path: Path
) -> None:
    """Also if a window of steps has one of them only."""
    sources = [SourceConfig([str(tiny_shards)], batch_size=4, micro_batches=2) for _ in range(2)]
    data = LatentDataModule(*sources, sampling="alternate", validation_batches=1)
    record, scalars = run(fit, mixed_stage(tiny_config), data, tmp_path, max_steps=4, every_steps=1)
    assert {name: list(scalars[f"train/loss_{name}"]) for name in ("images", "videos")} == {
        "images": [1, 3],
        "videos": [2, 4],
    }
    for step, name in enumerate(("images", "videos") * 2, start=1):
        assert scalars["loss/train"][step] == scalars[f"train/loss_{name}"][step]
        assert scalars["loss/train"][step] == pytest.approx(record.losses[step], rel=1e-5)
    assert scalars["loss/val"].keys() == scalars["val/loss_images"].keys() == scalars["val/loss_videos"].keys() == {4}


class FailAfter(Callback):
    """Ends the run after a step, before the next one."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("the test stops here")


def test_a_resumed_run_logs_the_same_scalars(
    fit: Fit, tiny_config: GPDiTConfig, tiny_shards: Path, tmp_path: Path
) -> None:
    """Interrupted after step 3, in the middle of a window of 2 steps."""
    _, uninterrupted = run(
        fit, mixed_stage(tiny_config), mixed_data(tiny_shards), tmp_path / "uninterrupted", max_steps=6
    )
    with pytest.raises(RuntimeError, match="the test stops here"):
        run(
            fit,
            mixed_stage(tiny_config),
            mixed_data(tiny_shards),
            tmp_path / "broken",
            max_steps=6,
            first=[FailAfter(3)],
        )
    last = tmp_path / "broken/checkpoints/last.ckpt"
    _, resumed = run(
        fit, mixed_stage(tiny_config), mixed_data(tiny_shards), tmp_path / "broken", max_steps=6, resume_from=last
    )
    for tag in uninterrupted:
        if not tag.startswith("system/"):
            assert resumed[tag] == uninterrupted[tag], tag


class Break(Callback):
    """Puts a NaN into the last of the three micro-batches of some optimizer steps."""

    def __init__(self, *steps: int) -> None:
        self.numbers = [step * 3 - 1 for step in steps]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx in self.numbers:
            batch.latents[0, 0] = float("nan")


def test_skipped_steps_are_counted_and_their_losses_excluded(
    fit: Fit, tiny_config: GPDiTConfig, tiny_shards: Path, tmp_path: Path
) -> None:
    """Step 3 is one of two in its window, steps 5 and 6 fill theirs."""
    stage, data = mixed_stage(tiny_config), mixed_data(tiny_shards)
    record, scalars = run(fit, stage, data, tmp_path, max_steps=8, max_skips=2, first=[Break(3, 5, 6)])
    assert scalars["warnings/skipped_steps"] == {4: 1, 6: 3, 8: 3}
    assert list(scalars["loss/train"]) == list(scalars["train/grad_norm"]) == [1, 2, 4, 8]
    assert scalars["train/grad_norm"][4] == pytest.approx(record.norms[4])
    assert scalars["loss/train"][4] == pytest.approx(record.losses[4], rel=1e-5)
    assert scalars["loss/train"][8] == pytest.approx((record.losses[7] + record.losses[8]) / 2, rel=1e-5)


def test_each_damaged_sample_counts_once(
    fit: Fit, tiny_config: GPDiTConfig, write_shards: Callable[..., Manifest], tmp_path: Path
) -> None:
    """Two of six images and one of seven clips; every sample comes again within eight steps."""
    counts = {("train", "image", (1, 4, 4)): 6, ("train", "video", (3, 4, 4)): 7}
    manifest = write_shards(tmp_path / "shards", counts, shard_size=7)
    for shard, number in ((0, 1), (0, 4), (1, 2)):
        damage(manifest, shard, number)
    found: list[set[str]] = []

    class Noted(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            found.append(set(batch.damaged))

    stage, data = mixed_stage(tiny_config), mixed_data(manifest.directory)
    _, scalars = run(fit, stage, data, tmp_path, max_steps=8, every_steps=1, first=[Noted()])
    expected = {step: len(set().union(*found[: 3 * step])) for step in range(1, 9)}
    assert scalars["warnings/damaged_samples"] == {step: count for step, count in expected.items() if count}
    assert expected[8] == 3
    assert sum(map(len, found)) > 3


def test_the_distance_of_the_average_is_over_all_weights(
    fit: Fit, tiny_config: GPDiTConfig, tiny_shards: Path, tmp_path: Path
) -> None:
    stage = mixed_stage(tiny_config)
    _, scalars = run(fit, stage, mixed_data(tiny_shards), tmp_path, max_steps=4)
    average = read_checkpoint(tmp_path)["ema"]["weights"]
    weights = {name: parameter.detach() for name, parameter in stage.named_parameters()}
    apart = torch.cat([(weights[name] - average[name]).flatten().double() for name in weights])
    size = torch.cat([weight.flatten().double() for weight in weights.values()])
    assert scalars["train/ema_distance"][4] == pytest.approx(float(apart.norm() / size.norm()), rel=1e-5)


def test_the_validation_loss_is_that_of_the_averaged_weights(
    fit: Fit, tiny_config: GPDiTConfig, tiny_shards: Path, tmp_path: Path
) -> None:
    data, stage = mixed_data(tiny_shards), mixed_stage(tiny_config)
    _, scalars = run(fit, stage, data, tmp_path, max_steps=4)
    averaged = GPDiTStage(tiny_config, initial_weights=str(tmp_path))
    averaged.configure_model()
    with torch.no_grad():
        expected = sum(batch.weight * float(averaged.objective(batch)[0]) for batch in data.val_dataloader())
    assert scalars["loss/val"][4] == pytest.approx(expected, rel=1e-5)
