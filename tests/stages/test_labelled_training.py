"""Training on labels: they are learned, dropped, recorded and checked."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.checkpoints.reading import load_trained_model
from gpdit_lightning.data.batches import LatentBatch
from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.errors import InputError
from gpdit_lightning.stages import GPDiTStage, ImageWarmupStage
from gpdit_lightning.training.callbacks.ema import EMA
from gpdit_lightning.training.callbacks.run_checkpoint import RunCheckpoint
from gpdit_lightning.training.optimizer import OptimizerConfig
from tests.checkpoints.content import read_checkpoint
from tests.conftest import TINY_CODEC
from tests.data.labelled import write_labelled

Fit = Callable[..., Trainer]
NAMES = ("bright", "dark")


def images(count: int, names: Sequence[str] = NAMES) -> list[tuple[str | None, np.ndarray]]:
    """Uniform images, alternately 1 above and 1 below the codec's mean, in its units, with some noise."""
    numbers = np.random.default_rng(0)
    mean, std = (np.reshape(values, (4, 1, 1)) for values in (TINY_CODEC.mean, TINY_CODEC.std))
    shades = [1 - 2 * (place % 2) + 0.3 * numbers.normal(size=(1, 4, 4, 4)) for place in range(count)]
    return [(names[place % 2], mean + std * shade) for place, shade in enumerate(shades)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright and dark images. Do not change it."""
    return write_labelled(tmp_path_factory.mktemp("shades"), NAMES, images(40), images(16)).directory


@pytest.fixture(scope="module")
def config(tiny_config: GPDiTConfig) -> GPDiTConfig:
    return tiny_config.replaced(classes=2)


def data_of(*shards: Path, labels: bool = True, **settings: Any) -> LatentDataModule:
    source = SourceConfig([str(folder) for folder in shards], batch_size=16)
    return LatentDataModule(source, labels=labels, validation_batches=1, **settings)


class Trained(Callback):
    """Records the validation batches, and the labels of every step."""

    def __init__(self) -> None:
        self.held_out: list[LatentBatch] = []
        self.labels: list[list[int]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.labels.append(batch.labels.tolist())

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        self.held_out.append(batch)


def test_the_model_learns_labels(fit: Fit, config: GPDiTConfig, shards: Path, tmp_path: Path) -> None:
    """At high noise levels the label determines which of the two images it is."""
    torch.manual_seed(0)
    stage = ImageWarmupStage(config, optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=10))
    found = Trained()
    fit(stage, data_of(shards), tmp_path, 300, [found], val_check_interval=300, limit_val_batches=1)
    (batch,) = found.held_out

    def loss(labels: torch.Tensor | None) -> float:
        with torch.no_grad():
            return float(stage.objective(replace(batch, labels=labels, t=0.8 + 0.2 * batch.t)).mean)

    assert batch.labels is not None
    right, wrong, none, untold = (loss(x) for x in (batch.labels, 1 - batch.labels, batch.labels * 0 - 1, None))
    assert none == untold
    assert right < 0.5 * none < 0.5 * wrong
    dropped = np.array(found.labels) < 0
    assert 0.08 < dropped.mean() < 0.12  # of 4800


@pytest.mark.parametrize(
    ("classes", "labels", "message"),
    [
        (0, True, r"takes 0 classes, but the data has 2: set .*backbone\.classes to 2, or data\.labels to false\."),
        (2, False, r"takes 2 classes, but the data has 0: set .*backbone\.classes to 0, or data\.labels to true\."),
        (1, True, r"takes 1 classes, but the data has 2: set model\.init_args\.backbone\.classes to 2\."),
    ],
)
def test_a_backbone_needs_an_embedding_for_each_class_of_the_data(
    fit: Fit, tiny_config: GPDiTConfig, shards: Path, tmp_path: Path, classes: int, labels: bool, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        fit(GPDiTStage(tiny_config.replaced(classes=classes)), data_of(shards, labels=labels), tmp_path, 1)


@pytest.fixture(scope="module")
def run(fit: Fit, config: GPDiTConfig, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps, saved after each second one. Do not change it."""
    folder = tmp_path_factory.mktemp("run")
    callbacks = [EMA(), RunCheckpoint(every_steps=2, keep_every_steps=2)]
    torch.manual_seed(0)
    fit(GPDiTStage(config), data_of(shards, label_dropout=0.5), folder, 4, callbacks)
    return folder


def test_a_checkpoint_records_the_names_of_the_classes(run: Path) -> None:
    assert read_checkpoint(run)["LatentDataModule"]["classes"] == ["bright", "dark"]
    trained = load_trained_model(run)
    assert trained.classes == ("bright", "dark")
    assert trained.backbone.facts.classes == ("bright", "dark")
    assert trained.backbone.config.classes == 2


def test_a_resumed_run_with_labels_ends_bit_equal(
    run: Path, fit: Fit, config: GPDiTConfig, shards: Path, tmp_path: Path
) -> None:
    data = data_of(shards, label_dropout=0.5)
    half = run / "checkpoints/step-2.ckpt"
    fit(GPDiTStage(config), data, tmp_path, 4, [EMA(), RunCheckpoint()], half)
    whole, resumed = (read_checkpoint(folder)["state_dict"] for folder in (run, tmp_path))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    data = data_of(shards, label_dropout=0.4)
    with pytest.raises(InputError, match=r"data\.label_dropout = 0\.5 and the recipe has 0\.4"):
        fit(GPDiTStage(config), data, tmp_path / "new", 4, [EMA(), RunCheckpoint()], half)


@pytest.mark.parametrize("names", [("dark", "bright"), ("bright", "dim")])
def test_initial_weights_must_have_the_same_classes(
    run: Path, fit: Fit, config: GPDiTConfig, shards: Path, tmp_path: Path, names: tuple[str, str]
) -> None:
    callbacks = [EMA(), RunCheckpoint()]
    fit(GPDiTStage(config, initial_weights=str(run)), data_of(shards), tmp_path / "next", 1, callbacks)
    assert load_trained_model(tmp_path / "next").classes == NAMES
    other = write_labelled(tmp_path / "other", names, images(16, names)).directory
    number = 0 if names[0] == "dark" else 1
    found, wanted = names[number], NAMES[number]
    with pytest.raises(InputError, match=f"was trained with '{wanted}' as class {number}, but the data has '{found}':"):
        fit(GPDiTStage(config, initial_weights=str(run)), data_of(other), tmp_path / "third", 1)


def test_initial_weights_without_class_names_are_accepted(
    fit: Fit, config: GPDiTConfig, shards: Path, tmp_path: Path
) -> None:
    GPDiT(config).save_pretrained(tmp_path / "model")
    stage = GPDiTStage(config, initial_weights=str(tmp_path / "model"))
    assert fit(stage, data_of(shards), tmp_path / "run", 1).global_step == 1
