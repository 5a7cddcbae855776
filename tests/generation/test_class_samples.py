"""Samples of classes from noise alone, with every layout of blocks, both time conditionings and two codecs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gpdit_lightning import GPDiTPipeline, InputError
from gpdit_lightning.checkpoints.hub import GPDiT
from gpdit_lightning.checkpoints.reading import TrainedModel
from gpdit_lightning.codecs import Codec, SdCodec, load_codec
from gpdit_lightning.diffusion import NoiseSchedule
from gpdit_lightning.generation.config import ClipInputs
from gpdit_lightning.generation.plans import sample_seed
from gpdit_lightning.generation.video import stream_video
from gpdit_lightning.options.sample import GenerationOptions
from gpdit_lightning.specs import ClipGeometry
from tests.codecs.small_sd import small_autoencoder
from tests.media.videos import read_video
from tests.model.toys import toy_config, toy_model

SIDE = 32  # pixels, which are 4x4 latent pixels
CLASSES = ("tench", "a/b", "night snake", "4")
MODELS: dict[str, dict[str, Any]] = {
    "frames, rotation": {},
    "blocks of frames, adaln": {"block_shape": (2, 0, 0), "time_conditioning": "adaln", "target": "epsilon"},
    "squares, adaln": {"block_shape": (1, 1, 1), "time_conditioning": "adaln", "target": "epsilon"},
    "squares, rotation": {"block_shape": (1, 1, 2)},
}


@pytest.fixture(scope="module")
def codecs() -> dict[int, Codec]:
    """Codecs by their temporal factor."""
    return {4: load_codec("pca"), 1: SdCodec(small_autoencoder())}


@pytest.fixture(scope="module")
def pipeline_of(codecs: dict[int, Codec]) -> Callable[..., GPDiTPipeline]:
    """`pipeline_of(frames, temporal_factor, **fields)`: a model of clips of `frames` latent frames, random weights."""

    def make(frames: int, temporal_factor: int, classes: int = len(CLASSES), **fields: Any) -> GPDiTPipeline:
        codec = codecs[temporal_factor]
        config = toy_config(latent_channels=codec.latent_channels, layers=1, classes=classes, **fields)
        model = GPDiT(config).eval()
        model.load_state_dict(toy_model(config).float().state_dict())
        schedule = NoiseSchedule("linear" if config.target == "epsilon" else "cosine")
        geometry = ClipGeometry(1, ((SIDE, SIDE),), frames, None)
        facts = (Path("model"), "ema", schedule, codec.spec(), geometry, 1)
        return GPDiTPipeline(TrainedModel(model, *facts, classes=CLASSES[:classes]), codec)

    return make


def assert_near(first: Tensor, second: Tensor) -> None:
    """Check that latents are equal up to rounding in float32, which noise prediction amplifies 157 times."""
    assert (first - second).norm() < 1e-3 * second.norm()


@pytest.mark.parametrize(
    ("name", "frames", "temporal_factor"),
    [
        ("frames, rotation", 1, 1),
        ("frames, rotation", 3, 4),
        ("blocks of frames, adaln", 4, 1),
        ("squares, adaln", 1, 4),
        ("squares, adaln", 2, 1),
        ("squares, rotation", 2, 4),
    ],
)
def test_a_sample_is_a_function_of_seed_label_and_number(
    pipeline_of: Callable[..., GPDiTPipeline], name: str, temporal_factor: int, frames: int
) -> None:
    pipeline = pipeline_of(frames, temporal_factor, **MODELS[name])
    options: Any = {"sampler": "dpm2m", "steps": 2, "label_guidance": 1.5, "seed": 3, "output_type": "latent"}
    together = pipeline(label="all", count=2, batch_size=8, **options)
    expected = [(label, number) for label in CLASSES for number in range(2)]
    clips = [video.clip for video in together.videos]
    assert [(clip.context.label, clip.sample) for clip in clips] == expected
    for video in together.videos:
        assert video.pixels.shape == (pipeline.codec.pixel_frames(frames), 3, SIDE, SIDE)
    # In other batches, with other classes, and a sample alone by a call of the library.
    few = pipeline(label=[2, "tench"], count=2, batch_size=3, **options)
    assert [(video.clip.context.label, video.clip.sample) for video in few.videos] == [*expected[4:6], *expected[:2]]
    for latents, other in zip(few.frames, together.frames[4:6] + together.frames[:2], strict=True):
        assert_near(latents, other)
    del options["output_type"]
    plan = pipeline.plan([], GenerationOptions(**options, label=("tench",), count=2))
    noise = ClipInputs([sample_seed(3, "tench", 1)], torch.tensor([0]))
    empty = pipeline.encode(plan.clips[:1])
    pieces = stream_video(pipeline.model, pipeline.codec, empty, plan.clips[0].frames, plan.config, noise)
    alone = torch.cat([piece.latents[0] for piece in pieces])
    assert_near(alone, together.frames[1])
    assert (together.frames[0] - together.frames[1]).abs().mean() > 0.1


def test_seeds_of_samples_differ() -> None:
    seeds = {sample_seed(seed, label, number) for seed in (0, 1) for label in (None, "1", "11") for number in range(50)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_images_are_saved_by_class_and_number_with_sheets(
    pipeline_of: Callable[..., GPDiTPipeline], tmp_path: Path
) -> None:
    output = pipeline_of(1, 4, **MODELS["squares, adaln"])(label=["a/b", "4", "tench"], count=11, steps=1)
    files = output.save(tmp_path)
    folders = ("a-b", "4", "tench")  # the first cannot be the name of a folder
    images = [tmp_path / name / f"{name}-{number:05d}.png" for name in folders for number in range(11)]
    assert files == [*images, tmp_path / "sheet.png"]
    for path, video in zip(images, output.videos, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), video.pixels[0].permute(1, 2, 0).numpy())
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.height == 24 + 6 * (96 + 4)  # two rows for each class: ten images and one
    gap, left = 4, sheet.width - 10 * (96 + 4)
    for row, video in ((0, output.videos[0]), (1, output.videos[10]), (4, output.videos[22])):
        shown = sheet.crop((left, 24 + row * (96 + gap), left + 96, 24 + row * (96 + gap) + 96)).resize((SIDE, SIDE))
        difference = np.asarray(shown, dtype=float) - video.pixels[0].permute(1, 2, 0).numpy()
        assert np.abs(difference).mean() < 12, row


def test_clips_are_saved_as_mp4_and_long_sheets_in_pages(
    pipeline_of: Callable[..., GPDiTPipeline], tmp_path: Path
) -> None:
    output = pipeline_of(2, 1, **MODELS["blocks of frames, adaln"])(label="night snake", count=25, steps=1)
    files = output.save(tmp_path)
    assert [path.name for path in files[-2:]] == ["sheet.png", "sheet-2.png"]
    assert files[24] == tmp_path / "night snake" / "night snake-00024.mp4"
    assert read_video(files[24]).shape == (2, 3, SIDE, SIDE)
    several = pipeline_of(2, 1, **MODELS["blocks of frames, adaln"])(label=["4", "tench"], steps=1)
    assert [video.pixels.shape[0] for video in several.videos] == [2, 2]
    unlabelled = pipeline_of(2, 1, classes=0)(count=2, steps=1)
    assert unlabelled.save(tmp_path / "u")[:2] == [tmp_path / "u" / f"sample-{number:05d}.mp4" for number in (0, 1)]


@pytest.mark.parametrize(
    ("context", "options", "message"),
    [
        (torch.zeros(9, 3, SIDE, SIDE, dtype=torch.uint8), {"count": 2}, "a context is given with --count or several"),
        (torch.zeros(9, 3, SIDE, SIDE, dtype=torch.uint8), {"label": ["4", "tench"]}, "leave the context out"),
        (None, {"label": ["tench", "9"]}, "--label is '9', which is no class of the checkpoint"),
        (None, {"count": 2, "samples": 3}, "--samples is 3, but samples of classes are counted by --count"),
        (None, {"count": 0}, "--count is 0: give at least 1"),
        (None, {"count": 2, "seed": [1, 2]}, "samples of classes have one seed"),
        (None, {"count": 2, "label_guidance": 2.0}, "--label_guidance is 2.0, but sample has no label"),
    ],
)
def test_samples_that_cannot_be_generated_are_refused(
    pipeline_of: Callable[..., GPDiTPipeline], context: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        pipeline_of(2, 4)(context, steps=1, **options)
    if "tench" in options.get("label", ()):
        with pytest.raises(InputError, match="was trained without labels"):
            pipeline_of(2, 4, classes=0)(label="all")
