"""Training with blocks that are not frames: objective, data, resumption, previews, and data that do not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from gpdit_lightning import GPDiT, GPDiTConfig, InputError
from gpdit_lightning.codecs import load_codec
from gpdit_lightning.data.batches import LatentBatch
from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.diffusion import NoiseSchedule
from gpdit_lightning.stages import GPDiTStage
from gpdit_lightning.training.callbacks.ema import EMA
from gpdit_lightning.training.callbacks.held_out import select_clips
from gpdit_lightning.training.callbacks.previews import Preview
from gpdit_lightning.training.callbacks.run_checkpoint import RunCheckpoint
from gpdit_lightning.training.callbacks.scores import Scores
from gpdit_lightning.training.optimizer import OptimizerConfig
from tests.checkpoints.content import read_checkpoint
from tests.data.labelled import write_labelled

Fit = Callable[..., Trainer]
CODEC = load_codec("pca")
FRAMES, SIDE = 4, 8  # latents of the videos; images have one frame
LABELS = ("a", "b")
ADALN = {"time_conditioning": "adaln", "target": "epsilon"}
# Fields of the backbone, the source, and settings of the source and of the data.
SYSTEMS: dict[str, tuple[dict[str, Any], str, dict[str, Any], dict[str, Any]]] = {
    "acdit-video": ({"block_shape": (2, 0, 0), "classes": 10, **ADALN}, "videos", {}, {"labels": True}),
    "acdit-image": ({"block_shape": (1, 2, 2), "classes": 2, **ADALN}, "images", {}, {"labels": True}),
    "squares-rotation": ({"block_shape": (1, 2, 4), "attention": "of"}, "images", {}, {"noise_levels": "clip"}),
    "context-noise": ({"block_shape": (2, 0, 0)}, "videos", {}, {"context_noise": 0.6}),
    "full-sequence": ({"block_shape": (0, 0, 0)}, "videos", {}, {}),
    "continuation": (
        {"block_shape": (0, 0, 0), "first_block_frames": 2, **ADALN},
        "videos",
        {"frames_without_loss": 2},
        {},
    ),
    "vid-gpt": (
        {"block_shape": (3, 0, 0), "first_block_frames": 1, "causal_in_block": True, "factorized": True, **ADALN},
        "videos",
        {},
        {},
    ),
}


def config_of(**fields: Any) -> GPDiTConfig:
    sizes: dict[str, Any] = {"layers": 2, "width": 16, "mlp_width": 24, "heads": 2, "latent_channels": 16}
    return GPDiTConfig(**{"size": "tiny", **sizes, **fields})


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled videos and images, of which some are held out, as if the codec `pca` had made them."""
    numbers = np.random.default_rng(0)

    def samples(count: int) -> list[tuple[str | None, np.ndarray]]:
        shapes = [(1 if place % 2 else FRAMES, 16, SIDE, SIDE) for place in range(2 * count)]
        return [(LABELS[place // 2 % 2], numbers.normal(size=shape)) for place, shape in enumerate(shapes)]

    folder = tmp_path_factory.mktemp("shards")
    write_labelled(folder, LABELS, samples(8), samples(4), CODEC.spec())
    return folder


def data_of(shards: Path, source: str, of_source: dict[str, Any], **settings: Any) -> LatentDataModule:
    sources: dict[str, Any] = {source: SourceConfig([str(shards)], batch_size=4, **of_source)}
    return LatentDataModule(**sources, **{"context_dropout": 0.5, "noise_draws": 2, "validation_batches": 1} | settings)


def stage_of(config: GPDiTConfig, **optimizer: Any) -> GPDiTStage:
    torch.manual_seed(0)
    schedule = NoiseSchedule("linear" if config.target == "epsilon" else "cosine")
    return GPDiTStage(config, schedule, OptimizerConfig(**{"learning_rate": 0.01} | optimizer))


class Batches(Callback):
    """Records batches and losses of training, and the losses of validation."""

    def __init__(self) -> None:
        self.training: list[tuple[LatentBatch, float]] = []
        self.validation: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.training.append((batch, float(outputs["loss"])))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.validation.append(float(outputs["loss"]))


def loss_of_rows(model: GPDiT, schedule: NoiseSchedule, batch: LatentBatch) -> Tensor:
    """The loss from the formulas: each noisy row by itself, noised latent by latent, with an average over blocks."""
    rows = []
    for row, clip in enumerate(batch.clip_of_row.tolist()):
        x0, has_context = batch.latents[clip : clip + 1].double(), clip < batch.context
        positions = range(x0.shape[1]) if batch.frames is None else batch.frames
        layout, length = model.layout(*x0.shape[-2:]), positions[-1] + 1
        theta = schedule.theta(batch.t[row].double())
        of_latent, blocks = torch.empty_like(x0[0]), list[tuple[Any, ...]]()
        for number, block in enumerate(layout.blocks_of(positions)):
            group = layout.group_of(block, length)
            part = slice(group.start, group.stop), slice(None), *layout.parts[block % layout.blocks_per_group]
            of_latent[part] = theta[number]
            blocks.append(part)
        noise = torch.zeros_like(x0)
        noise[:, list(positions)] = batch.noise[row].double()
        noisy, v = of_latent.cos() * x0 + of_latent.sin() * noise, of_latent.cos() * noise - of_latent.sin() * x0
        label = None if batch.labels is None else batch.labels[row : row + 1]
        given, of_given = x0.clone() if has_context else None, None
        if given is not None and batch.clean_theta is not None and batch.clean_noise is not None:
            of_given = batch.clean_theta[clip : clip + 1]
            for number, part in enumerate(blocks):  # those of the whole clip, as all of them have a loss
                angle, of_noise = of_given[0, number].double(), batch.clean_noise[clip].double()
                given[0][part] = angle.cos() * given[0][part] + angle.sin() * of_noise[part]
        output = model(noisy[:, list(positions)], theta[None], given, label, 1, tuple(positions), of_given)
        error = torch.zeros_like(x0)
        wanted = noise if model.config.target == "epsilon" else v
        error[:, list(positions)] = (output - wanted[:, list(positions)]).square()
        rows.append(torch.stack([error[0][part].mean() for part in blocks]).mean())
    return torch.stack(rows).mean()


@pytest.mark.parametrize("name", SYSTEMS)
def test_training(fit: Fit, shards: Path, randomise: Callable[[GPDiT], GPDiT], tmp_path: Path, name: str) -> None:
    """The loss is that of the formulas; a resumed run ends bit-equal; clips of several blocks have two noisy copies."""
    fields, source, of_source, settings = SYSTEMS[name]
    config, found = config_of(**fields), Batches()
    callbacks = [EMA(), RunCheckpoint(every_steps=2, keep_every_steps=2)]
    stage = stage_of(config, learning_rate=1e-30)
    stage.configure_model()
    randomise(stage.backbone)
    checked = data_of(shards, source, of_source, **settings)
    fit(stage.double(), checked, tmp_path / "checked", 2, [found], precision="64-true", limit_val_batches=1)
    blocks = len(stage.backbone.layout(SIDE, SIDE).blocks_of(range(FRAMES if source == "videos" else 1)))
    for batch, loss in found.training:
        assert batch.draws == (2 if blocks > 1 else 1)
        assert batch.t.shape == (4 * batch.draws, blocks - (1 if of_source else 0))
        assert (batch.clean_theta is None) == ("context_noise" not in settings)
        differ = bool((batch.t != batch.t[:, :1]).any())
        assert differ == (batch.t.shape[1] > 1 and settings.get("noise_levels") != "clip")
        with torch.no_grad():
            assert loss == pytest.approx(loss_of_rows(stage.backbone, stage.schedule, batch).item(), rel=1e-9)
    assert {batch.context for batch, _ in found.training} <= {1, 2, 3}  # some clips of each batch, so both kinds
    if settings.get("labels"):
        assert {-1} < {int(label) for batch, _ in found.training for label in batch.labels.tolist()} <= {-1, 0, 1}

    data = {"shards": shards, "source": source, "of_source": of_source, **settings}
    fit(stage_of(config), data_of(**data), tmp_path / "whole", 4, callbacks)
    callbacks = [EMA(), RunCheckpoint()]
    half = tmp_path / "whole/checkpoints/step-2.ckpt"
    fit(stage_of(config), data_of(**data), tmp_path / "resumed", 4, callbacks, half)
    whole, resumed = (read_checkpoint(tmp_path / folder)["state_dict"] for folder in ("whole", "resumed"))
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
    before = stage_of(config)
    before.configure_model()
    assert any(not torch.equal(whole[key], value) for key, value in before.state_dict().items())


def test_worker_processes_count_blocks(fit: Fit, shards: Path, tmp_path: Path) -> None:
    config, runs = config_of(block_shape=(1, 2, 2)), []
    for workers in (0, 1):
        found = Batches()
        fit(stage_of(config), data_of(shards, "images", {}, workers=workers), tmp_path / str(workers), 1, [found])
        runs.append(found.training[0])
    (batch, loss), (of_worker, loss_of_worker) = runs
    assert batch.t.shape == (8, 4)
    assert torch.equal(of_worker.t, batch.t)
    assert torch.equal(of_worker.noise, batch.noise)
    assert loss_of_worker == loss


@pytest.mark.parametrize(
    ("fields", "source", "context", "files"),
    [
        ({"block_shape": (2, 0, 0)}, "videos", 2, ("gif", "png")),
        ({"block_shape": (0, 0, 0), "first_block_frames": 3}, "videos", 3, ("gif", "png")),
        ({"block_shape": (0, 0, 0), **ADALN}, "videos", 0, ("gif", "png")),
        ({"block_shape": (1, 2, 2), **ADALN}, "images", 0, ("png",)),
    ],
    ids=str,
)
def test_previews(
    fit: Fit, shards: Path, tmp_path: Path, fields: dict[str, Any], source: str, context: int, files: tuple[str, ...]
) -> None:
    """Of whole blocks after at least one frame of context, or of the whole clip if it is one block."""
    preview = Preview(every_steps=1, clips=2, context_frames=1, sampler_steps=2)
    config, data = config_of(**fields), data_of(shards, source, {})
    assert select_clips(data, 2, 1, config).context == context
    fit(stage_of(config), data, tmp_path, 1, [preview])
    written = list((tmp_path / "previews").iterdir())
    assert {path.suffix[1:] for path in written} == set(files)
    with Image.open(tmp_path / "previews/step-000001.png") as strip:
        rows = 1 if source == "images" else 4 if context else 2
        assert rows * 96 <= strip.height < (rows + 1) * 96


@pytest.mark.parametrize(
    ("fields", "of_source", "message"),
    [
        ({"block_shape": (2, 0, 0)}, {}, "data.images has single frames, which are no whole block"),
        (
            {"block_shape": (3, 0, 0)},
            {},
            r"clips of 4 latent frames, .* cut longer clips by data\.videos\.frames 3, or",
        ),
        ({"block_shape": (5, 0, 0)}, {}, r"clips of 4 latent frames, .* latent frames, a later one 5\): prepare clips"),
        (
            {"block_shape": (2, 0, 0)},
            {"frames_without_loss": 1},
            r"frames_without_loss is 1, which cuts .* give 2, or 0",
        ),
        (
            {"block_shape": (2, 0, 0), "first_block_frames": 2},
            {"frames_without_loss": 3},
            r"frames_without_loss is 3, which cuts .* give 2 or 4, or 0",
        ),
        ({"block_shape": (1, 3, 3)}, {}, r"data\.videos: latent frames of 8x8 are 4x4 tokens, which do not divide"),
    ],
)
def test_data_that_do_not_divide_into_blocks_are_refused(
    fit: Fit, shards: Path, tmp_path: Path, fields: dict[str, Any], of_source: dict[str, Any], message: str
) -> None:
    source = "videos" if "data.images" not in message else "images"
    with pytest.raises(InputError, match=message):
        fit(stage_of(config_of(**fields)), data_of(shards, source, of_source), tmp_path, 1)


def test_few_shot_sequences_need_blocks_of_one_image(
    fit: Fit, write_shards: Callable[..., Manifest], tmp_path: Path
) -> None:
    folder = write_shards(tmp_path / "shards", {("train", "sequence", (6, 4, 4)): 4}).directory

    def train(of_source: dict[str, Any], **fields: Any) -> None:
        data = data_of(folder, "sequences", of_source)
        fit(stage_of(config_of(latent_channels=4, **fields)), data, tmp_path, 1)

    for fields in ({"block_shape": (1, 1, 2)}, {"block_shape": (0, 0, 0), "first_block_frames": 5}):
        train({}, **fields)
    with pytest.raises(InputError, match="is in one block of the backbone with others"):
        train({}, block_shape=(2, 0, 0))
    with pytest.raises(InputError, match=r"loss_frames is targets, .* set it to all"):
        train({"loss_frames": "targets"}, block_shape=(0, 0, 0), first_block_frames=5)


@pytest.mark.parametrize(
    ("fields", "context"), [({"block_shape": (2, 0, 0)}, 5), ({"block_shape": (0, 0, 0)}, 0)], ids=str
)
def test_scores(
    fit: Fit,
    shards: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    fields: dict[str, Any],
    context: int,
) -> None:
    """Of the frames after whole blocks; a clip that is one block has scores by networks only."""
    scores = Scores(every_steps=1, clips=3, chunk=2, context_frames=1, sampler_steps=2)
    callbacks = [scores, EMA(), RunCheckpoint()]
    fit(stage_of(config_of(**fields)), data_of(shards, "videos", {}), tmp_path, 1, callbacks)
    if not context:
        assert "no scores are computed: videos that are generated as one block" in caplog.text
        return
    record = read_checkpoint(tmp_path)["scores"]
    assert (record["context_frames"], record["generated_frames"]) == (context, 13 - context)
    assert record["values"].keys() >= {"psnr", "psnr_repeated", "rollout_error_ratio"}
