from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from gpdit_lightning import GPDiTConfig
from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.errors import InputError
from gpdit_lightning.stages import GPDiTStage
from gpdit_lightning.training.callbacks.ema import EMA
from gpdit_lightning.training.callbacks.run_checkpoint import RunCheckpoint
from gpdit_lightning.training.optimizer import OptimizerConfig
from tests.checkpoints.content import read_checkpoint

Fit = Callable[..., Trainer]
Weights = dict[str, Tensor]


class WeightHistory(Callback):
    """Records the weights before the run, after every micro-batch, and before and after validation."""

    def __init__(self) -> None:
        self.after: list[tuple[int, Weights]] = []
        self.in_validation: list[Weights] = []
        self.after_validation: list[Weights] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.after.append((trainer.global_step, weights_of(pl_module)))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.after.append((trainer.global_step, weights_of(pl_module)))

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.in_validation.append(weights_of(pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.after_validation.append(weights_of(pl_module))


def weights_of(module: torch.nn.Module) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def same(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def recurrence(history: list[tuple[int, Weights]], highest_decay: float) -> tuple[dict[str, Tensor], int]:
    """The average by hand in float64: one update for each optimizer step."""
    last_step, weights = history[0]
    average = {name: values.double() for name, values in weights.items()}
    updates = 0
    for step, weights in history[1:]:
        if step == last_step:
            continue
        last_step, updates = step, updates + 1
        decay = min(highest_decay, (1 + updates) / (10 + updates))
        average = {name: decay * average[name] + (1 - decay) * values.double() for name, values in weights.items()}
    return average, updates


@pytest.fixture
def data(tiny_shards: Path) -> LatentDataModule:
    """Two micro-batches in every optimizer step."""
    return LatentDataModule(
        videos=SourceConfig([str(tiny_shards)], batch_size=4, micro_batches=2), validation_batches=1
    )


@pytest.fixture
def stage(tiny_config: GPDiTConfig) -> GPDiTStage:
    torch.manual_seed(0)
    return GPDiTStage(tiny_config, optimizer=OptimizerConfig(learning_rate=0.03))


@pytest.mark.parametrize("decay", [0.2, 0.9999, 0.0])
def test_the_average_follows_its_recurrence_over_optimizer_steps(
    fit: Fit, stage: GPDiTStage, data: LatentDataModule, tmp_path: Path, decay: float
) -> None:
    ema, history = EMA(decay), WeightHistory()
    fit(stage, data, tmp_path, max_steps=4, callbacks=[ema, history])
    assert len(history.after) == 1 + 4 * 2
    expected, updates = recurrence(history.after, decay)
    assert ema.updates == updates == 4
    assert ema.average.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(ema.average[name].double(), values, rtol=1e-5, atol=1e-6)
    moved = [name for name, values in history.after[0][1].items() if not torch.equal(ema.average[name], values)]
    assert moved


def test_the_average_is_a_float32_copy(fit: Fit, stage: GPDiTStage, data: LatentDataModule, tmp_path: Path) -> None:
    ema = EMA()
    fit(stage, data, tmp_path, max_steps=1, callbacks=[ema], precision="bf16-true")
    assert {parameter.dtype for parameter in stage.parameters()} == {torch.bfloat16}
    assert {values.dtype for values in ema.average.values()} == {torch.float32}
    assert not {p.data_ptr() for p in stage.parameters()} & {v.data_ptr() for v in ema.average.values()}


def test_frozen_parameters_have_no_average(fit: Fit, stage: GPDiTStage, data: LatentDataModule, tmp_path: Path) -> None:
    stage.configure_model()
    stage.backbone.patch_embedding.requires_grad_(False)
    ema = EMA()
    fit(stage, data, tmp_path, max_steps=1, callbacks=[ema])
    trained = {name for name, parameter in stage.named_parameters() if parameter.requires_grad}
    assert ema.average.keys() == trained
    assert "backbone.patch_embedding.weight" not in trained


@pytest.mark.parametrize("validate", [True, False])
def test_validation_uses_the_average_and_restores_the_weights(
    fit: Fit, stage: GPDiTStage, data: LatentDataModule, tmp_path: Path, validate: bool
) -> None:
    ema, history = EMA(0.5, validate), WeightHistory()
    settings = {"limit_val_batches": 1.0, "val_check_interval": 4}
    fit(stage, data, tmp_path, max_steps=4, callbacks=[ema, history], **settings)
    assert len(history.in_validation) == 2 * 2
    for place, micro_batches in ((0, 4), (2, 8)):
        average, _ = recurrence(history.after[: micro_batches + 1], 0.5)
        training = history.after[micro_batches][1]
        seen = history.in_validation[place]
        assert same(seen, training) is not validate
        if validate:
            for name, values in average.items():
                torch.testing.assert_close(seen[name].double(), values, rtol=1e-5, atol=1e-6)
    assert same(history.after_validation[4], history.after[4][1])  # bit for bit
    assert same(weights_of(stage), history.after[-1][1])


def test_averaged_replaces_the_weights_during_the_block_only(
    fit: Fit, stage: GPDiTStage, data: LatentDataModule, tmp_path: Path
) -> None:
    ema = EMA(0.5)
    fit(stage, data, tmp_path, max_steps=3, callbacks=[ema])
    trained = weights_of(stage)
    with ema.averaged(stage):
        assert same(weights_of(stage), ema.average)
        assert torch.is_grad_enabled()
    assert same(weights_of(stage), trained)
    with pytest.raises(KeyboardInterrupt), ema.averaged(stage):
        raise KeyboardInterrupt
    assert same(weights_of(stage), trained)
    assert all(parameter.requires_grad for parameter in stage.parameters())
    with EMA(0.5).averaged(stage):  # nothing was averaged yet
        assert same(weights_of(stage), trained)


def test_a_checkpoint_contains_the_average(fit: Fit, stage: GPDiTStage, data: LatentDataModule, tmp_path: Path) -> None:
    ema = EMA(0.5)
    fit(stage, data, tmp_path, max_steps=3, callbacks=[ema, RunCheckpoint()])
    saved = read_checkpoint(tmp_path)["ema"]
    assert saved["updates"] == 3
    assert same(saved["weights"], ema.average)


def test_a_resumed_average_equals_that_of_an_uninterrupted_run(
    fit: Fit, data: LatentDataModule, tiny_shards: Path, tiny_config: GPDiTConfig, tmp_path: Path
) -> None:
    def run(folder: Path, max_steps: int, resume_from: Path | None = None) -> tuple[EMA, Weights]:
        torch.manual_seed(0)
        fresh = GPDiTStage(tiny_config, optimizer=OptimizerConfig(learning_rate=0.03))
        ema = EMA(0.9)
        fit(fresh, data, folder, max_steps, [ema, RunCheckpoint()], resume_from)
        return ema, weights_of(fresh)

    uninterrupted, weights = run(tmp_path / "uninterrupted", 5)
    run(tmp_path / "broken", 2)
    resumed, resumed_weights = run(tmp_path / "broken", 5, tmp_path / "broken/checkpoints/last.ckpt")
    assert same(resumed_weights, weights)
    assert resumed.updates == uninterrupted.updates == 5
    assert same(resumed.average, uninterrupted.average)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(InputError, match=r"ema\.decay is .*must lie in \[0, 1\)"):
        EMA(decay)
