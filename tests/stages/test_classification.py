"""Classification on the clean stream: scores, regularization, learning rates, accuracy, resuming, and refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from torch import Tensor
from torch.nn.functional import cross_entropy, rms_norm

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.checkpoints.reading import load_trained_model
from gpdit_lightning.data.batches import LatentBatch
from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.errors import InputError
from gpdit_lightning.stages import ClassificationStage, GPDiTStage
from gpdit_lightning.stages.classification import ClassificationConfig
from gpdit_lightning.stages.mixing import Mixing
from gpdit_lightning.training.callbacks.ema import EMA
from gpdit_lightning.training.callbacks.metrics import LossTable
from gpdit_lightning.training.callbacks.previews import Preview
from gpdit_lightning.training.callbacks.run_checkpoint import RunCheckpoint
from gpdit_lightning.training.optimizer import OptimizerConfig
from tests.checkpoints.content import read_checkpoint
from tests.data.labelled import write_labelled

Fit = Callable[..., Trainer]
Randomise = Callable[[GPDiT], GPDiT]
NAMES = tuple("abcdefg")
# Blocks of frames; squares with adaLN; chunks of frames with factorized attention.
LAYOUTS: dict[str, dict[str, Any]] = {
    "frames": {"classes": 3},
    "squares": {"block_shape": (1, 2, 1), "time_conditioning": "adaln", "target": "epsilon", "classes": 2},
    "chunks": {"block_shape": (2, 0, 0), "first_block_frames": 1, "causal_in_block": True, "factorized": True},
    "own frames": {"attention": "of"},
}
REGULARIZED = ClassificationConfig(label_smoothing=0.1, mixup=0.8, cutmix=1.0, drop_path=0.5)
LAYERWISE = OptimizerConfig(1e-2, weight_decay=0.05, layer_decay=0.5, decay_vectors=False, decay="cosine")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random clips of three latent frames with random labels of seven classes. Do not change it."""
    numbers = np.random.default_rng(0)

    def clips(count: int) -> list[tuple[str | None, np.ndarray]]:
        return [(NAMES[numbers.integers(7)], numbers.normal(size=(3, 4, 4, 4))) for _ in range(count)]

    return write_labelled(tmp_path_factory.mktemp("clips"), NAMES, clips(24), clips(16)).directory


def data_of(folder: Path, batch_size: int = 8, **settings: Any) -> LatentDataModule:
    options: dict[str, Any] = {"labels": True, "label_dropout": 0.0, "max_ranks": 2}
    videos = SourceConfig([str(folder)], batch_size, frames_without_loss=settings.pop("frames_without_loss", 0))
    return LatentDataModule(videos=videos, **options | settings)


class Watcher(Callback):
    """Records training gradients, losses and validation batches."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.held_out: list[LatentBatch] = []
        self.losses: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        named = pl_module.named_parameters()
        self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        self.held_out.append(batch)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer", [0, 1])
def test_scores_are_those_of_the_features_and_all_weights_are_trained(
    fit: Fit, randomise: Randomise, tiny_config: GPDiTConfig, shards: Path, tmp_path: Path, layout: str, layer: int
) -> None:
    """The initial weights are a generative model with other classes than the data, or none."""
    config = tiny_config.replaced(patch_size=2, **LAYOUTS[layout])
    generative = randomise(GPDiT(config))
    generative.save_pretrained(tmp_path / "model")
    stage = ClassificationStage(
        config,
        optimizer=OptimizerConfig(learning_rate=1e-30),
        initial_weights=str(tmp_path / "model"),
        classification=ClassificationConfig(layer=layer),
    )
    watcher = Watcher()
    fit(stage, data_of(shards), tmp_path / "run", 1, [watcher], limit_val_batches=1, val_check_interval=1)
    assert watcher.gradients.keys() == dict(stage.named_parameters()).keys()
    assert all(gradient.any() for gradient in watcher.gradients.values())

    batch = watcher.held_out[0]
    tokens = generative.features(batch.latents, [layer or 2])[layer or 2]
    with torch.no_grad():
        scores = stage.backbone(batch.latents)
        pooled = rms_norm(tokens.flatten(1, 2).mean(dim=1), (16,), eps=1e-6)
        expected = pooled @ stage.backbone.output.weight.T + stage.backbone.output.bias
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(stage.objective(batch).mean, cross_entropy(expected, batch.labels))


@pytest.mark.parametrize(("batch_size", "batches", "clips"), [(8, None, 16), (6, None, 16), (24, 5, 16), (6, 2, 12)])
def test_accuracy_and_loss_of_the_held_out_clips(
    fit: Fit, tiny_config: GPDiTConfig, shards: Path, tmp_path: Path, batch_size: int, batches: int | None, clips: int
) -> None:
    """Each clip once, also if the batch size does not divide their number; against scikit-learn and torch."""
    torch.manual_seed(0)
    stage = ClassificationStage(tiny_config, optimizer=OptimizerConfig(learning_rate=1e-2))
    data, watcher = data_of(shards, batch_size, validation_batches=batches), Watcher()
    trainer = fit(stage, data, tmp_path, 4, [watcher], limit_val_batches=1.0, val_check_interval=4)
    assert len([key for batch in watcher.held_out for key in batch.keys]) == clips
    assert len({key for batch in watcher.held_out for key in batch.keys}) == clips
    with torch.no_grad():
        scores = torch.cat([stage.backbone(batch.latents) for batch in watcher.held_out])
    labels = np.concatenate([batch.labels for batch in watcher.held_out])
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert found["val/top1_accuracy"] == pytest.approx(accuracy_score(labels, scores.numpy().argmax(axis=1)))
    expected = top_k_accuracy_score(labels, scores.numpy(), k=5, labels=range(7))
    assert found["val/top5_accuracy"] == pytest.approx(expected)
    assert 0 < expected < 1
    table = LossTable()
    for batch in watcher.held_out:
        table.add(batch.source, batch.weight, stage.validation_step(batch, 0)["quartiles"])
    assert table.means(trainer)["loss"] == pytest.approx(float(cross_entropy(scores, torch.from_numpy(labels))))
    assert stage.predictions is not None
    assert stage.predictions.step == 4
    assert len(set(stage.predictions.sources)) == clips


def test_a_small_labelled_set_is_memorized(fit: Fit, tiny_config: GPDiTConfig, shards: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    watcher = Watcher()
    stage = ClassificationStage(tiny_config, optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=10))
    fit(stage, data_of(shards, 24), tmp_path, 60, [watcher])
    assert watcher.losses[0] == pytest.approx(np.log(7), rel=1e-3)
    assert watcher.losses[-1] < 0.05


@pytest.mark.parametrize("time_conditioning", ["rotation", "adaln"])
def test_learning_rates_fall_by_layer_and_vectors_have_no_weight_decay(
    fit: Fit, tiny_config: GPDiTConfig, shards: Path, tmp_path: Path, time_conditioning: Any
) -> None:
    config = tiny_config.replaced(time_conditioning=time_conditioning, layers=3)
    stage = ClassificationStage(config, optimizer=LAYERWISE)
    (optimizer,) = fit(stage, data_of(shards), tmp_path, 1).optimizers
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    factors = {"patch_embedding": 4, "blocks.0": 3, "blocks.1": 2, "blocks.2": 1, "output": 0, "output_norm": 0}
    for name, parameter in stage.backbone.named_parameters():
        part = name.rpartition(".")[0] if "blocks" not in name else ".".join(name.split(".")[:2])
        group = groups[id(parameter)]
        assert group["initial_lr"] == 1e-2 * 0.5 ** factors[part], name
        assert group["weight_decay"] == (0.05 if parameter.ndim == 2 else 0), name
    assert optimizer.param_groups[0]["initial_lr"] == 1e-2  # the one that is logged


def test_a_resumed_run_ends_bit_equal(fit: Fit, tiny_config: GPDiTConfig, shards: Path, tmp_path: Path) -> None:
    """With all random parts of the training; then the recipe's settings replace those of the checkpoint."""

    def run(folder: str, steps: int, resume: Path | None = None, optimizer: OptimizerConfig = LAYERWISE) -> Trainer:
        stage = ClassificationStage(tiny_config, optimizer=optimizer, classification=REGULARIZED)
        data = LatentDataModule(
            videos=SourceConfig([str(shards)], 8, micro_batches=2), labels=True, label_dropout=0.0, max_ranks=2
        )
        callbacks = [EMA(), RunCheckpoint(every_steps=2, keep_every_steps=2)]
        return fit(stage, data, tmp_path / folder, steps, callbacks, resume)

    torch.manual_seed(0)
    run("whole", 4)
    half = tmp_path / "whole" / "checkpoints" / "step-2.ckpt"
    run("half", 4, half)
    whole, resumed = (read_checkpoint(tmp_path / folder) for folder in ("whole", "half"))
    for part in (lambda content: content["state_dict"], lambda content: content["ema"]["weights"]):
        assert all(torch.equal(part(resumed)[name], value) for name, value in part(whole).items())
    changed = OptimizerConfig(1e-3, weight_decay=0.01, layer_decay=0.25, decay_vectors=False)
    (optimizer,) = run("changed", 4, half, changed).optimizers
    rates = {(group["layers_above"], group["weight_decay"]): group["lr"] for group in optimizer.param_groups}
    assert rates == {(n, decay): 1e-3 * 0.25**n for n in range(4) for decay in (0.01, 0)}
    with pytest.raises(InputError, match=r"layer_decay is 1\.0 and decay_vectors is True, but the checkpoint"):
        run("uniform", 4, half, OptimizerConfig())


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_clips_and_their_targets(tiny_config: GPDiTConfig, mixup: float, cutmix: float) -> None:
    """The share of a clip is that of its values, and the loss is that of soft targets."""
    ramp = torch.arange(4.0)[:, None, None, None, None].expand(4, 2, 3, 6, 8)
    cuts = []
    for seed in range(40):
        mixing = Mixing.draw(np.random.default_rng(seed), mixup, cutmix, 6, 8)
        assert mixing is not None
        cuts.append(mixing.box is not None)
        mixed, share = mixing.mixed(ramp), mixing.share
        expected = torch.tensor([share * n + (1 - share) * (3 - n) for n in range(4)])
        torch.testing.assert_close(mixed.mean(dim=(1, 2, 3, 4)), expected)
        assert not cuts[-1] or all(set(clip.unique().tolist()) <= {n, 3 - n} for n, clip in enumerate(mixed))
    assert (any(cuts), all(cuts)) == (cutmix > 0, mixup == 0)
    stage = ClassificationStage(tiny_config)
    scores, labels = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 4, 3])
    batch = LatentBatch(ramp, ramp, ramp[:, :, 0, 0, 0], 4, 1.0, "videos", list("abcd"), labels=labels)
    one_hot = torch.eye(5)[labels]
    soft = 0.9 * (share * one_hot + (1 - share) * one_hot.flip(0)) + 0.1 / 5
    loss = stage._loss(scores, batch, mixing, 0.1)
    torch.testing.assert_close(loss.mean, cross_entropy(scores, soft))
    assert loss.quartiles.sums / loss.quartiles.counts == pytest.approx(float(loss.mean))


def test_stochastic_depth_drops_branches_by_clip(tiny_config: GPDiTConfig, randomise: Randomise) -> None:
    """Its rate rises from 0 to that of the recipe; a clip of dropped branches keeps its stream, others none of it."""
    stage = ClassificationStage(tiny_config.replaced(layers=3), classification=ClassificationConfig(drop_path=0.4))
    noise = torch.randn(3000, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    batch = LatentBatch(noise, noise, noise[:, :, 0, 0, 0], 0, 1.0, "videos", [])
    scales = stage._branch_scales(batch)
    assert scales is not None
    assert scales.shape == (3, 2, 3000)
    torch.testing.assert_close((scales == 0).float().mean(dim=(1, 2)), torch.tensor([0, 0.2, 0.4]), atol=0.02, rtol=0)
    torch.testing.assert_close(scales.mean(dim=2), torch.ones(3, 2), atol=0.05, rtol=0)

    model = randomise(GPDiT(tiny_config))
    latents = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    ones = torch.ones(2, 2, 2)
    dropped = ones.clone()
    dropped[1, :, 0] = 0  # both branches of the second block, for the first clip
    features = model.features(latents, [1, 2], branch_scales=dropped)
    torch.testing.assert_close(features[2][0], features[1][0], rtol=0, atol=0)
    plain = model.features(latents, [1, 2])
    torch.testing.assert_close(features[2][1], plain[2][1])
    doubled = model.features(latents[:, :1], [0, 1], branch_scales=2 * ones)  # one block of tokens
    assert not torch.allclose(doubled[1], model.features(latents[:, :1], [1])[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": False}, r"data\.labels is false, but ClassificationStage learns labels: set it to true\."),
        ({"label_dropout": 0.1}, r"data\.label_dropout is 0\.1, but ClassificationStage needs 0: set it to 0\."),
        ({"noise_draws": 2}, r"data\.noise_draws is 2, but ClassificationStage needs 1: set it to 1\."),
        ({"frames_without_loss": 1}, r"data\.videos\.frames_without_loss is 1, but .* uses all frames: set it to 0\."),
    ],
)
def test_data_without_all_labels_are_refused(
    fit: Fit, tiny_config: GPDiTConfig, shards: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        fit(ClassificationStage(tiny_config), data_of(shards, **settings), tmp_path, 1)


@pytest.mark.parametrize("initial_weights", ["", " "])
def test_empty_initial_weights_are_refused(tiny_config: GPDiTConfig, initial_weights: str) -> None:
    """They come from an unset variable of the shell, and would be random weights."""
    with pytest.raises(InputError, match=r"^model\.init_args\.initial_weights is empty: give a run folder"):
        ClassificationStage(tiny_config, initial_weights=initial_weights)


def test_a_single_class_and_samples_without_labels_are_refused(
    fit: Fit, tiny_config: GPDiTConfig, tmp_path: Path
) -> None:
    clips: list[tuple[str | None, np.ndarray]] = [("a", np.zeros((1, 4, 4, 4))), (None, np.zeros((1, 4, 4, 4)))] * 4
    for names, message in (
        (("a",), r"has the class 'a' only"),
        (("a", "b"), r"the sample .* has no label"),
    ):
        folder = write_labelled(tmp_path / "".join(names), names, clips).directory
        data = LatentDataModule(SourceConfig([str(folder)], 8), labels=True, label_dropout=0.0)
        with pytest.raises(InputError, match=message):
            fit(ClassificationStage(tiny_config), data, tmp_path / "run", 1)


def test_a_classifier_cannot_generate_and_its_classes_are_those_of_its_data(
    fit: Fit, tiny_config: GPDiTConfig, shards: Path, tmp_path: Path
) -> None:
    fit(ClassificationStage(tiny_config), data_of(shards), tmp_path / "run", 1, [EMA(), RunCheckpoint()])
    with pytest.raises(InputError, match=r"step-1\.ckpt is a classifier, which has no output layer for denoising:"):
        load_trained_model(tmp_path / "run")
    other = write_labelled(tmp_path / "other", ("x", "y"), [(name, np.zeros((3, 4, 4, 4))) for name in "xy" * 8])
    checkpoint = tmp_path / "run" / "checkpoints" / "step-1.ckpt"
    stage, data = ClassificationStage(tiny_config), data_of(other.directory)
    with pytest.raises(InputError, match=r"classes|data\.labels"):
        fit(stage, data, tmp_path / "more", 2, [EMA(), RunCheckpoint()], checkpoint)
    with pytest.raises(InputError, match=r"preview\.every_steps is 1, but a classifier generates nothing: set it to 0"):
        ClassificationStage.setup(_attached(ClassificationStage(tiny_config), data_of(shards)), "fit")
    with pytest.raises(InputError, match=r"layer 3 does not exist: give a number from 1 to 2, or 0 for the last"):
        ClassificationStage(tiny_config, classification=ClassificationConfig(layer=3))


def _attached(stage: GPDiTStage, data: LatentDataModule) -> Any:
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[Preview(every_steps=1)], enable_checkpointing=False)
    trainer.datamodule = data  # type: ignore[attr-defined]
    stage.trainer = trainer
    return stage
