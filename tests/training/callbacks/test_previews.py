import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.codecs import Codec, load_codec
from gpdit_lightning.codecs.pca import SHIPPED_WEIGHTS
from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.shard_entry import Split
from gpdit_lightning.data.shard_writer import ShardSetWriter
from gpdit_lightning.diffusion import Sampler
from gpdit_lightning.errors import InputError
from gpdit_lightning.model.kv_cache import KVCache
from gpdit_lightning.stages import GPDiTStage
from gpdit_lightning.training.callbacks.ema import EMA
from gpdit_lightning.training.callbacks.held_out import select_clips
from gpdit_lightning.training.callbacks.previews import DEFAULT_FRAME_RATE, Preview, frame_rate, rollout_error
from gpdit_lightning.training.callbacks.run_checkpoint import RunCheckpoint
from gpdit_lightning.training.optimizer import OptimizerConfig

Fit = Callable[..., Trainer]

SIDE, FRAMES, PIXEL_FRAMES, STILLS = 16, 3, 9, 4
CONFIG = GPDiTConfig(size="tiny", layers=1, width=16, mlp_width=24, heads=2, latent_channels=16)


def moving(seed: int, frames: int) -> Tensor:
    """A bright square on its way over a dark ground: (frames, 3, SIDE, SIDE) uint8."""
    numbers = np.random.default_rng(seed)
    pixels = torch.full((frames, 3, SIDE, SIDE), 40, dtype=torch.uint8)
    row, colour = numbers.integers(0, SIDE - 6), torch.from_numpy(numbers.integers(120, 250, (3, 1, 1)))
    for moment in range(frames):
        pixels[moment, :, row : row + 6, moment : moment + 6] = colour
    return pixels


def make_shards(
    folder: Path,
    splits: tuple[Split, ...] = ("train", "validation"),
    source: str | None = None,
    length: int = STILLS,
    pixel_frames: int = PIXEL_FRAMES,
) -> str:
    """Real encodings of the codec `pca`: in each split five images, five clips, five sequences of `length` images."""
    codec = load_codec("pca")
    with ShardSetWriter(folder) as writer:
        for number, split in enumerate(splits):
            for seed in range(5 * number, 5 * number + 5):
                clip = moving(seed, pixel_frames)
                clip_data = {"source": str(seed), "fps": 30.0, "stride": 3, "label": "ab"[seed % 2]}
                writer.write(split, "video", codec.encode(clip[None])[0].numpy(), clip_data)
                stills = codec.encode(moving(seed, length)[:, None]).squeeze(1).numpy()
                writer.write(split, "sequence", stills, {"source": str(seed)})
                writer.write(split, "image", stills[:1], {"source": str(seed)})
        shards = writer.close()
    Manifest(folder, replace(codec.spec(), source=source), shards, labels=("a", "b")).save()
    return str(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_shards(tmp_path_factory.mktemp("preview_shards"))


@pytest.fixture
def codec() -> Codec:
    return load_codec("pca")


def data_of(shards: str, source: str = "videos") -> LatentDataModule:
    """Two micro-batches in every optimizer step."""
    config = SourceConfig([shards], batch_size=4, micro_batches=2)
    return LatentDataModule(**{source: config}, seed=3)  # type: ignore[arg-type]


def stage_of(backbone: GPDiT | None = None) -> GPDiTStage:
    torch.manual_seed(0)
    stage = GPDiTStage(CONFIG, optimizer=OptimizerConfig(learning_rate=0.03))
    stage.configure_model()
    if backbone is not None:
        stage.backbone = backbone
    return stage


def held_out(data: LatentDataModule, source: str, clips: int) -> Tensor:
    """Held-out samples, spread evenly: (clips, F, C, h, w) raw."""
    bucket = data.buckets["validation"][source][0]
    numbers = (place * len(bucket) // clips for place in range(clips))
    return torch.from_numpy(np.stack([bucket.read(number)[0] for number in numbers])).float()


def logger_of(folder: Path) -> TensorBoardLogger:
    return TensorBoardLogger(folder, name="", version="tensorboard")


def events_of(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def made(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "previews").glob("*"))}


def scalar_of(folder: Path, name: str) -> float:
    return events_of(folder).Scalars(f"sample/{name}")[-1].value


class FixedOutput(GPDiT):
    """Generates given latents, and records the arguments and the state of each call."""

    def __init__(self, target: Tensor, codec: Codec) -> None:
        super().__init__(CONFIG)
        self.target = (target - codec.mean[:, None, None]) / codec.std[:, None, None]
        self.calls: list[dict[str, Any]] = []

    def denoise(
        self,
        noisy: Tensor,
        theta: Tensor,
        cache: KVCache | None = None,
        condition: Tensor | None = None,
        clean: Tensor | None = None,
        draws: int = 1,
        compiled: bool = False,
        clean_theta: Tensor | None = None,
    ) -> Tensor:
        assert cache is not None
        if clean is not None:
            self.extend(cache, clean)
        weights = {name: parameter.detach().clone() for name, parameter in self.named_parameters()}
        autocast = torch.is_autocast_enabled("cpu")
        self.calls.append(
            {"frame": cache.frames, "training": self.training, "autocast": autocast, "weights": weights, "noisy": noisy}
        )
        angle = theta[:, None, None, None]
        return (angle.cos() * noisy - self.target[:, cache.frames]) / angle.sin()


class Borders(Callback):
    """Records the state of the module before each micro-batch."""

    def __init__(self) -> None:
        self.normal: list[bool] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        training = all(module.training for module in pl_module.modules())
        self.normal.append(training and not any(p.is_inference() for p in pl_module.parameters()))


def test_previews_and_errors_are_written_at_their_steps(fit: Fit, shards: str, tmp_path: Path) -> None:
    preview = Preview(every_steps=2, clips=2, sampler_steps=2)
    fit(stage_of(), data_of(shards), tmp_path, 5, [EMA(), preview], logger=logger_of(tmp_path))
    steps = [2, 4, 5]  # 5 is the last
    files = made(tmp_path)
    assert files.keys() == {f"step-{step:06d}.{ending}" for step in steps for ending in ("png", "gif")}
    events = events_of(tmp_path)
    for tag, ending in (("sample/strip", "png"), ("sample/video", "gif")):
        logged = {f"step-{event.step:06d}.{ending}": event for event in events.Images(tag)}
        assert logged.keys() == {name for name in files if name.endswith(ending)}
        for name, event in logged.items():
            assert event.encoded_image_string == files[name]
            with Image.open(tmp_path / "previews" / name) as image:
                assert image.size == (event.width, event.height)
    for tag in ("sample/rollout_error", "sample/rollout_error_ratio"):
        assert [event.step for event in events.Scalars(tag)] == steps
    with Image.open(tmp_path / "previews/step-000005.gif") as animation:
        assert animation.n_frames == PIXEL_FRAMES  # type: ignore[attr-defined]
        assert animation.info["duration"] == 100  # 30 frames a second, every third


@pytest.mark.parametrize("source", ["videos", "sequences"])
def test_a_perfect_prediction_has_no_error(fit: Fit, codec: Codec, shards: str, tmp_path: Path, source: str) -> None:
    data = data_of(shards, source)
    model = FixedOutput(held_out(data, source, 3), codec)
    preview = Preview(every_steps=1, clips=3, sampler_steps=3)
    fit(stage_of(model), data, tmp_path, 1, [preview], logger=logger_of(tmp_path))
    assert scalar_of(tmp_path, "rollout_error") < 0.1  # a few values are rounded to the other side
    assert scalar_of(tmp_path, "rollout_error_ratio") < 1e-3
    context = {"videos": 2, "sequences": STILLS - 1}[source]
    assert {call["frame"] for call in model.calls} == {context}
    assert len(model.calls) == 3


def test_a_model_that_repeats_the_last_frame_has_ratio_one(fit: Fit, codec: Codec, shards: str, tmp_path: Path) -> None:
    data = data_of(shards)
    pixels = codec.decode(held_out(data, "videos", 4))
    pixels[:, 5:] = pixels[:, 4:5]
    preview = Preview(every_steps=1, sampler_steps=3)
    fit(stage_of(FixedOutput(codec.encode(pixels), codec)), data, tmp_path, 1, [preview], logger=logger_of(tmp_path))
    assert scalar_of(tmp_path, "rollout_error_ratio") == pytest.approx(1, abs=0.1)
    assert scalar_of(tmp_path, "rollout_error") > 100


def test_the_error_is_that_of_the_generated_frames() -> None:
    truth = torch.zeros(2, 5, 3, 4, 4, dtype=torch.uint8)
    truth[:, 1], truth[:, 2], truth[:, 3], truth[:, 4] = 10, 10, 14, 20
    prediction = truth.clone()
    prediction[:, 0], prediction[0, 4] = 99, 26
    error = rollout_error(prediction, truth, context=3)
    assert error["sample/rollout_error"] == pytest.approx(6**2 / 4)
    assert error["sample/rollout_error_ratio"] == pytest.approx(9 / ((4**2 + 10**2) / 2))
    assert rollout_error(truth, truth[:, :1].expand_as(truth), 3).keys() == {"sample/rollout_error"}  # nothing moves


def test_previews_do_not_change_the_training(fit: Fit, shards: str, tmp_path: Path) -> None:
    def run(every_steps: int) -> tuple[dict[str, Tensor], list[Any], list[bool]]:
        stage, borders = stage_of(), Borders()
        random.seed(0)
        np.random.seed(0)
        callbacks = [EMA(0.5), borders, Preview(every_steps, clips=2, sampler_steps=2)]
        fit(stage, data_of(shards), tmp_path / str(every_steps), 4, callbacks)
        state = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
        return stage.state_dict(), state, borders.normal

    weights, randomness, _ = run(0)
    previewed, previewed_randomness, normal = run(1)
    assert not (tmp_path / "0/previews").exists()
    assert len(made(tmp_path / "1")) == 8
    assert all(torch.equal(weights[name], previewed[name]) for name in weights)
    assert randomness == previewed_randomness
    assert normal == [True] * 8


def test_previews_use_the_average_fixed_noise_and_the_precision_of_training(
    fit: Fit, codec: Codec, shards: str, tmp_path: Path
) -> None:
    data, ema = data_of(shards), EMA(0.5)
    model = FixedOutput(held_out(data, "videos", 4), codec)
    stage = stage_of(model)
    preview = Preview(every_steps=1, context_frames=1, sampler_steps=2)
    fit(stage, data, tmp_path, 3, [ema, preview], precision="bf16-mixed")
    assert [call["frame"] for call in model.calls] == [1, 1, 2, 2] * 3
    assert all(call["autocast"] and not call["training"] for call in model.calls)
    for name, weight in model.calls[-1]["weights"].items():
        assert torch.equal(weight, ema.average[f"backbone.{name}"])
    trained = dict(stage.backbone.named_parameters())
    assert not all(torch.equal(weight, trained[name]) for name, weight in model.calls[-1]["weights"].items())
    for place in (0, 2):
        assert torch.equal(model.calls[place]["noisy"], model.calls[8 + place]["noisy"])


class Constant(Sampler):
    """A custom sampler without network calls."""

    value = 0.5

    def solve(self, velocity: Any, x: Tensor, angles: Sequence[float], fresh: Any) -> Tensor:
        return torch.full_like(x, self.value)


class NotFinite(Constant):
    value = math.nan


def test_previews_use_the_given_sampler(fit: Fit, shards: str, tmp_path: Path) -> None:
    for name in ("rotation", f"{__name__}.Constant"):
        preview = Preview(every_steps=1, clips=1, sampler=name, sampler_steps=2)
        fit(stage_of(), data_of(shards), tmp_path / name, 1, [preview])
    assert made(tmp_path / "rotation") != made(tmp_path / f"{__name__}.Constant")


def test_a_faulty_sampler_stops_the_run_before_it_trains(fit: Fit, shards: str, tmp_path: Path) -> None:
    stage, message = stage_of(), "sampler '.*NotFinite' returns values that are not finite in a trial call"
    with pytest.raises(InputError, match=message):
        fit(stage, data_of(shards), tmp_path, 1, [Preview(every_steps=1, sampler=f"{__name__}.NotFinite")])
    assert stage.trainer.global_step == 0


def test_images_are_generated_without_context(fit: Fit, shards: str, tmp_path: Path) -> None:
    preview = Preview(every_steps=2, clips=3, sampler_steps=2)
    fit(stage_of(), data_of(shards, "images"), tmp_path, 2, [preview], logger=logger_of(tmp_path))
    assert made(tmp_path).keys() == {"step-000002.png"}
    assert not events_of(tmp_path).Tags()["scalars"]
    with Image.open(tmp_path / "previews/step-000002.png") as strip:
        assert 3 * 96 < strip.width < 5 * 96
        assert 96 < strip.height < 2 * 96  # no row of truth


def test_previews_prefer_videos_then_sequences_then_images(shards: str) -> None:
    config = SourceConfig([shards], batch_size=4)
    everything = LatentDataModule(images=config, videos=config, sequences=config)
    stills = LatentDataModule(images=config, sequences=config)
    assert select_clips(everything, 2, 1, CONFIG).source == "videos"
    clips = select_clips(stills, 2, 1, CONFIG)
    assert (clips.source, clips.split, clips.context, clips.independent_frames) == ("sequences", "validation", 3, True)


def test_the_longest_clips_are_selected(write_shards: Callable[..., Manifest], tmp_path: Path) -> None:
    held_out = {("validation", "video", shape): 3 for shape in ((2, 8, 8), (4, 4, 4), (3, 8, 8))}
    manifest = write_shards(tmp_path, {("train", "video", (3, 8, 8)): 4} | held_out)
    data = LatentDataModule(videos=SourceConfig([str(manifest.directory)], batch_size=2, least_frames=2, frames=4))
    samples = select_clips(data, 8, 3, CONFIG).read(0, 8)
    assert samples.latents.shape == (3, 4, 4, 4, 4)  # all three there are
    assert frame_rate(samples.metadata[0]) == DEFAULT_FRAME_RATE  # not recorded in these clips


def test_clips_of_each_data_set_are_selected(write_shards: Callable[..., Manifest], tmp_path: Path) -> None:
    tasks = []
    for task, count in (("grayscale", 4), ("sketch", 3)):
        held_out = {("validation", "sequence", (10, 8, 8)): count}
        tasks.append(write_shards(tmp_path / task, {("train", "sequence", (10, 8, 8)): 4} | held_out))
    data = LatentDataModule(sequences=SourceConfig([str(task.directory) for task in tasks], batch_size=2))
    (bucket,) = data.buckets["validation"]["sequences"]
    clips = select_clips(data, 4, 1, CONFIG).read(0, 4).latents
    for clip, number in zip(clips, (0, 1, 3, 5), strict=True):
        assert np.array_equal(clip, bucket.read(number).latents)


def test_all_images_of_a_long_sequence_are_in_the_strip(fit: Fit, tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", length=12)
    preview = Preview(every_steps=2, clips=1, sampler_steps=1)
    fit(stage_of(), data_of(shards, "sequences"), tmp_path, 2, [preview])
    with Image.open(tmp_path / "previews/step-000002.png") as strip:
        assert strip.width > 12 * 96


def test_training_clips_are_selected_if_none_are_held_out(
    fit: Fit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = data_of(make_shards(tmp_path / "shards", ("train",)))
    fit(stage_of(), data, tmp_path, 2, [Preview(every_steps=1, clips=1, sampler_steps=1)])
    assert len(made(tmp_path)) == 4
    assert caplog.text.count("no samples of data.videos are held out") == 1


def test_missing_codec_weights_stop_the_run_before_it_trains(fit: Fit, tmp_path: Path) -> None:
    gone = tmp_path / "gone.safetensors"
    shards = make_shards(tmp_path / "shards", source=str(gone))
    with pytest.raises(InputError, match=rf"records '{gone}' as .* give --preview\.codec_source {gone} if you"):
        fit(stage_of(), data_of(shards), tmp_path, 1, [Preview(every_steps=1)])
    cure = rf"the codec 'pca'.*{gone}.*--preview\.codec_source PATH, or --preview\.every_steps 0"
    with pytest.raises(InputError, match=cure):
        fit(stage_of(), data_of(shards), tmp_path, 1, [Preview(every_steps=1, codec_source=str(gone))])
    fit(stage_of(), data_of(shards), tmp_path, 1, [Preview(every_steps=0)])
    moved = Preview(every_steps=1, sampler_steps=1, codec_source=str(SHIPPED_WEIGHTS))
    fit(stage_of(), data_of(shards), tmp_path, 1, [moved])
    assert len(made(tmp_path)) == 2


def test_short_videos_have_less_context(shards: str) -> None:
    for context_frames in (FRAMES, FRAMES + 1):
        assert select_clips(data_of(shards), 1, context_frames, CONFIG).context == FRAMES - 1


@pytest.mark.parametrize("option", ["every_steps", "clips", "context_frames", "sampler_steps"])
def test_invalid_numbers_are_refused(option: str) -> None:
    with pytest.raises(InputError, match=rf"preview\.{option} is -1; it must be"):
        Preview(**{option: -1})


def test_a_resumed_run_makes_the_same_previews(fit: Fit, shards: str, tmp_path: Path) -> None:
    def run(folder: Path, max_steps: int, resume_from: Path | None = None) -> None:
        preview = Preview(every_steps=2, clips=2, sampler_steps=2)
        fit(stage_of(), data_of(shards), folder, max_steps, [EMA(0.9), preview, RunCheckpoint()], resume_from)

    run(tmp_path / "uninterrupted", 4)
    run(tmp_path / "broken", 2)
    for path in (tmp_path / "broken/previews").iterdir():
        path.unlink()
    run(tmp_path / "broken", 4, tmp_path / "broken/checkpoints/last.ckpt")
    whole, resumed = made(tmp_path / "uninterrupted"), made(tmp_path / "broken")
    assert resumed.keys() == {"step-000004.png", "step-000004.gif"}  # that of step 2 was made already
    assert all(whole[name] == content for name, content in resumed.items())
