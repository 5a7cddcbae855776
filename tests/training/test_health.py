from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from gpdit_lightning import GPDiTConfig
from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.stages import GPDiTStage
from gpdit_lightning.training.health import Health, NonFiniteError
from gpdit_lightning.training.optimizer import OptimizerConfig

Fit = Callable[..., Trainer]


class Poison(Callback):
    """Puts a value into one micro-batch, and keeps each micro-batch's keys and the weights it met."""

    def __init__(self, number: int = -1, value: float = 0.0) -> None:
        self.number, self.value = number, value
        self.keys: list[list[str]] = []
        self.weights: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.keys.append(batch.keys)
        self.weights.append(all_weights(pl_module))
        if batch_idx == self.number:
            batch.latents[0, 0, 0, 0, 0] = self.value


class GradientNorms(Callback):
    """Keeps the norm of each optimizer step's gradient, and the same after clipping."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        gradients = [p.grad.flatten().double() for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(torch.cat(gradients).norm().item())


def all_weights(module: LightningModule) -> Tensor:
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()


@pytest.fixture
def data(tiny_shards: Path) -> LatentDataModule:
    """Two micro-batches of two clips in every optimizer step."""
    return LatentDataModule(videos=SourceConfig([str(tiny_shards)], batch_size=4, micro_batches=2))


@pytest.fixture
def stage(tiny_config: GPDiTConfig) -> GPDiTStage:
    torch.manual_seed(0)
    return GPDiTStage(tiny_config, optimizer=OptimizerConfig(learning_rate=0.01))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("micro_batch", [2, 3])
def test_a_broken_gradient_stops_the_run_before_the_weights_move(
    fit: Fit, stage: GPDiTStage, data: LatentDataModule, tmp_path: Path, value: float, micro_batch: int
) -> None:
    poison = Poison(micro_batch, value)
    with pytest.raises(NonFiniteError, match=r"the gradient of optimizer step 1 is (nan|inf)") as caught:
        fit(stage, data, tmp_path, max_steps=4, callbacks=[poison, Health()])
    assert len(poison.keys) == 4
    assert not torch.equal(poison.weights[2], poison.weights[0])  # the first step was taken
    assert torch.equal(all_weights(stage), poison.weights[2])  # the second was not
    assert f"Samples: {', '.join(poison.keys[2] + poison.keys[3])}." in str(caught.value)
    assert not any(key in str(caught.value) for key in set(poison.keys[0]) - {*poison.keys[2], *poison.keys[3]})


def test_a_healthy_run_keeps_the_norm_before_clipping(
    fit: Fit, stage: GPDiTStage, data: LatentDataModule, tmp_path: Path
) -> None:
    health, norms = Health(), GradientNorms()
    fit(stage, data, tmp_path, max_steps=3, callbacks=[health, norms], gradient_clip_val=1e-3)
    assert len(norms.norms) == 3
    assert norms.norms[-1] > 1e-2  # so that clipping would show
    assert health.gradient_norm == pytest.approx(norms.norms[-1], rel=1e-5)


def test_a_long_list_of_samples_is_cut(fit: Fit, stage: GPDiTStage, tiny_shards: Path, tmp_path: Path) -> None:
    data = LatentDataModule(videos=SourceConfig([str(tiny_shards)], batch_size=17))
    with pytest.raises(NonFiniteError) as caught:
        fit(stage, data, tmp_path, max_steps=1, callbacks=[Poison(0, float("nan")), Health()])
    assert str(caught.value).count("train-video-") == 16
