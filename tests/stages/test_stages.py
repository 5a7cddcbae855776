import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.data.batches import LatentBatch
from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.diffusion import NoiseSchedule
from gpdit_lightning.errors import InputError
from gpdit_lightning.stages import FewShotStage, GPDiTStage, ImageWarmupStage, LongVideoStage, MixedStage
from gpdit_lightning.training.optimizer import OptimizerConfig

Fit = Callable[..., Trainer]
Randomise = Callable[[GPDiT], GPDiT]
SHIFT = 2.0


class Gradients(Callback):
    """Records the gradient and the batches of the last optimizer step."""

    def __init__(self) -> None:
        self.batches: list[LatentBatch] = []
        self.gradient = torch.empty(0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.gradient = torch.cat([p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]).clone()


class Losses(Callback):
    """Records the mean loss of every micro-batch."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.found.append(float(outputs["quartiles"].sums.sum() / outputs["quartiles"].counts.sum()))


def stage_of(kind: type[GPDiTStage], config: GPDiTConfig, randomise: Randomise) -> GPDiTStage:
    """A float64 stage with a learning rate so small that its weights stay the initial ones."""
    stage = kind(config, NoiseSchedule(shift=SHIFT), OptimizerConfig(learning_rate=1e-30))
    stage.configure_model()
    randomise(stage.backbone)
    return stage.double()


def data_of(shards: Path, images: dict[str, Any], videos: dict[str, Any], **settings: Any) -> LatentDataModule:
    sources = {
        name: SourceConfig([str(shards)], **source)
        for name, source in (("images", images), ("videos", videos))
        if source
    }
    return LatentDataModule(**sources, **settings)


def losses_of_clips(model: GPDiT, batch: LatentBatch) -> Tensor:
    """Each clip's loss by itself, from the formulas: (B,)."""
    losses = []
    for clip in range(len(batch.keys)):
        x0, eps, t = (values[clip : clip + 1].double() for values in (batch.latents, batch.noise, batch.t))
        theta = torch.atan(SHIFT * torch.tan(t * math.pi / 2))
        cos, sin = theta.cos()[..., None, None, None], theta.sin()[..., None, None, None]
        prediction = model(cos * x0 + sin * eps, theta, x0 if clip < batch.context else None)
        losses.append((prediction - (cos * eps - sin * x0)).square().mean())
    return torch.stack(losses)


def mean_loss(model: GPDiT, batches: list[LatentBatch], source: str) -> Tensor:
    return torch.cat([losses_of_clips(model, batch) for batch in batches if batch.source == source]).mean()


def gradient_of(model: GPDiT, loss: Tensor) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize(
    ("images", "videos", "share_of_images"),
    [
        ({"batch_size": 6}, {"batch_size": 4}, 0.5),
        ({"batch_size": 6, "micro_batches": 3}, {"batch_size": 4, "micro_batches": 2}, 0.5),
        ({"batch_size": 2}, {"batch_size": 8, "micro_batches": 4}, 0.5),
        ({"batch_size": 6, "micro_batches": 2, "weight": 3.0}, {"batch_size": 4, "weight": 1.0}, 0.75),
    ],
)
def test_mixed_training_weights_images_and_videos_by_their_settings(
    fit: Fit,
    randomise: Randomise,
    tiny_config: GPDiTConfig,
    tiny_shards: Path,
    tmp_path: Path,
    images: dict[str, Any],
    videos: dict[str, Any],
    share_of_images: float,
) -> None:
    """The gradient is that of the two weighted means for all sizes and numbers of micro-batches."""
    stage, found = stage_of(MixedStage, tiny_config, randomise), Gradients()
    data = data_of(tiny_shards, images, videos, context_dropout=0.25)
    fit(stage, data, tmp_path, max_steps=1, callbacks=[found], precision="64-true")
    assert len(found.batches) == images.get("micro_batches", 1) + videos.get("micro_batches", 1)
    model = stage.backbone
    loss_of_images, loss_of_videos = (mean_loss(model, found.batches, name) for name in ("images", "videos"))
    expected = gradient_of(model, share_of_images * loss_of_images + (1 - share_of_images) * loss_of_videos)
    torch.testing.assert_close(found.gradient, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("source", ["images", "videos"])
def test_the_loss_of_a_single_source_is_the_mean_of_its_batch(
    fit: Fit, randomise: Randomise, tiny_config: GPDiTConfig, tiny_shards: Path, tmp_path: Path, source: str
) -> None:
    stage, found = stage_of(GPDiTStage, tiny_config, randomise), Gradients()
    settings = {"images": {}, "videos": {}} | {source: {"batch_size": 6, "micro_batches": 2, "weight": 5.0}}
    fit(stage, data_of(tiny_shards, **settings), tmp_path, 1, [found], precision="64-true")
    expected = gradient_of(stage.backbone, mean_loss(stage.backbone, found.batches, source))
    torch.testing.assert_close(found.gradient, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("context", [0, 1, 3])
def test_the_objective_of_clips_with_and_without_context(
    randomise: Randomise, tiny_config: GPDiTConfig, context: int
) -> None:
    stage = stage_of(GPDiTStage, tiny_config, randomise)
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 4, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    batch = LatentBatch(latents, noise, t, context, 1.0, "videos", ["a", "b", "c"])
    loss, quartiles, _ = stage.objective(batch)
    torch.testing.assert_close(loss, losses_of_clips(stage.backbone, batch).mean(), rtol=1e-10, atol=0)
    torch.testing.assert_close(quartiles.sums.sum() / quartiles.counts.sum(), loss.detach())
    assert quartiles.counts.sum() == 3 * 4


def test_context_changes_the_prediction(randomise: Randomise, tiny_config: GPDiTConfig) -> None:
    stage = stage_of(GPDiTStage, tiny_config, randomise)
    latents, noise = torch.randn(2, 2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.full((2, 3), 0.5, dtype=torch.float64)
    with_context, without = (
        stage.objective(LatentBatch(latents, noise, t, context, 1.0, "videos", ["a", "b"]))[0] for context in (2, 0)
    )
    assert not torch.allclose(with_context, without)


@pytest.mark.parametrize(
    ("stage", "sources", "message"),
    [
        (
            ImageWarmupStage,
            ["images", "videos"],
            r"trains on data\.images, but the data are data\.images and data\.v",
        ),
        (LongVideoStage, ["images"], r"trains on data\.videos, but the data are data\.images:"),
        (FewShotStage, ["videos"], r"trains on data\.sequences, but the data are data\.videos:"),
    ],
)
def test_a_stage_refuses_other_sources(
    fit: Fit,
    tiny_config: GPDiTConfig,
    tiny_shards: Path,
    tmp_path: Path,
    stage: type[GPDiTStage],
    sources: list[str],
    message: str,
) -> None:
    given: dict[str, Any] = {name: {"batch_size": 2 if name in sources else 0} for name in ("images", "videos")}
    with pytest.raises(InputError, match=message):
        fit(stage(tiny_config), data_of(tiny_shards, **given), tmp_path, max_steps=1)


def test_the_long_video_stage_trains_on_every_length(
    fit: Fit, tiny_config: GPDiTConfig, tiny_shards: Path, tmp_path: Path
) -> None:
    found = Gradients()
    data = data_of(tiny_shards, {"batch_size": 0}, {"batch_size": 2, "least_frames": 1})
    fit(LongVideoStage(tiny_config), data, tmp_path, max_steps=6, callbacks=[found])
    assert sorted(batch.latents.shape[1] for batch in found.batches) == [1, 1, 2, 2, 3, 3]


def test_the_few_shot_stage_trains_on_sequences(
    fit: Fit, write_shards: Any, tiny_config: GPDiTConfig, tmp_path: Path
) -> None:
    folder = write_shards(tmp_path / "shards", {("train", "sequence", (6, 8, 8)): 4}).directory
    data, found = LatentDataModule(sequences=SourceConfig([str(folder)], 4, loss_frames="targets")), Gradients()
    assert fit(FewShotStage(tiny_config), data, tmp_path, max_steps=1, callbacks=[found]).global_step == 1
    assert [batch.frames for batch in found.batches] == [(1, 3, 5)]


def test_training_lowers_the_loss(fit: Fit, tiny_config: GPDiTConfig, tiny_shards: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    losses = Losses()
    data = data_of(tiny_shards, {"batch_size": 8}, {"batch_size": 8})
    stage = MixedStage(tiny_config, optimizer=OptimizerConfig(learning_rate=3e-3))
    fit(stage, data, tmp_path, max_steps=80, callbacks=[losses])
    assert sum(losses.found[-20:]) < 0.9 * sum(losses.found[:20])


def test_a_checkpoint_records_the_facts_of_its_weights(tiny_config: GPDiTConfig) -> None:
    checkpoint: dict[str, Any] = {}
    MixedStage(tiny_config, NoiseSchedule(shift=3.0)).on_save_checkpoint(checkpoint)
    assert checkpoint["gpdit"]["stage"] == "MixedStage"
    assert GPDiTConfig(**checkpoint["gpdit"]["backbone"]) == tiny_config
    assert NoiseSchedule(**checkpoint["gpdit"]["schedule"]) == NoiseSchedule(shift=3.0)


def test_a_backbone_for_texts_cannot_be_trained(
    tiny_shards: Path, tiny_config: GPDiTConfig, fit: Fit, tmp_path: Path
) -> None:
    stage = GPDiTStage(tiny_config.replaced(text_width=5))
    data = LatentDataModule(images=SourceConfig([str(tiny_shards)], batch_size=2))
    with pytest.raises(
        InputError, match=r"backbone\.text_width is 5, but training on texts is not implemented: set it"
    ):
        fit(stage, data, tmp_path, 1)
    assert "backbone" not in stage._modules


def test_data_of_another_number_of_channels_are_refused_before_the_backbone_is_built(
    tiny_shards: Path, tiny_config: GPDiTConfig, fit: Fit, tmp_path: Path
) -> None:
    stage = GPDiTStage(tiny_config.replaced(latent_channels=16))
    data = LatentDataModule(images=SourceConfig([str(tiny_shards)], batch_size=2))
    with pytest.raises(InputError, match=r"16 channels, but the data have 4: give --model\.init_args\..*_channels 4,"):
        fit(stage, data, tmp_path, 1)
    assert "backbone" not in stage._modules
