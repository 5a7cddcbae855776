"""Contexts, windows and frames of models whose blocks are not frames, from the pipeline's options to its frames."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpdit_lightning import GPDiTConfig, GPDiTPipeline, InputError
from gpdit_lightning.checkpoints.hub import GPDiT
from gpdit_lightning.checkpoints.reading import TrainedModel
from gpdit_lightning.codecs import load_codec
from gpdit_lightning.diffusion import NoiseSchedule
from gpdit_lightning.generation import transform
from gpdit_lightning.generation.plans import block_window
from gpdit_lightning.model.layout import BlockLayout
from gpdit_lightning.specs import ClipGeometry
from tests.model.toys import toy_config, toy_model

CODEC = load_codec("pca")  # a latent frame after the first has 4 frames
SIDE = 32  # pixels, which are 2x2 tokens
STEPS: dict[str, Any] = {"steps": 2, "output_type": "pt"}


def pipeline_of(frames: int, **fields: Any) -> GPDiTPipeline:
    """A model with random weights, as if trained on clips of `frames` latent frames."""
    config = toy_config(latent_channels=16, layers=1, **fields)
    model = GPDiT(config).eval()
    model.load_state_dict(toy_model(config).float().state_dict())
    geometry = ClipGeometry(1, ((SIDE, SIDE),), frames, None)
    schedule = NoiseSchedule("linear" if config.target == "epsilon" else "cosine")
    trained = TrainedModel(model, Path("model"), "ema", schedule, CODEC.spec(), geometry, 1)
    return GPDiTPipeline(trained, CODEC)


def video(frames: int) -> Tensor:
    numbers = torch.Generator().manual_seed(0)
    return torch.randint(256, (frames, 3, SIDE, SIDE), generator=numbers, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("fields", "trained_frames", "context"),
    [
        ({"block_shape": (2, 0, 0)}, 6, 13),
        ({"block_shape": (4, 0, 0), "time_conditioning": "adaln", "target": "epsilon"}, 8, 13),
        ({"block_shape": (4, 0, 0)}, 4, 13),  # in training the only block, which is continued nevertheless
        ({"block_shape": (2, 0, 0), "first_block_frames": 1, "causal_in_block": True}, 5, 9),
        ({"block_shape": (0, 0, 0), "first_block_frames": 2}, 6, 5),
        ({"block_shape": (1, 1, 2)}, 3, 5),
    ],
    ids=str,
)
def test_the_default_context_is_whole_blocks(fields: dict[str, Any], trained_frames: int, context: int) -> None:
    """The frames are those of the rollout, of which only the requested ones are kept, and arrive by blocks."""
    pipeline, given = pipeline_of(trained_frames, **fields), video(40)
    (result,) = pipeline(given, frames=7, **STEPS).videos
    assert len(result.clip.context.pixels) == context
    assert torch.equal(result.clip.context.pixels, given[-context:])
    assert result.pixels.shape == (7, 3, SIDE, SIDE)
    pieces = [step.frames[0] for step in pipeline.stream(given, frames=7, **STEPS)]
    assert [len(piece) for piece in pieces] == [4, 3]
    assert torch.equal(torch.cat(pieces), result.pixels / 255)
    shorter = pipeline(given, frames=2, **STEPS).videos[0].pixels
    if fields["block_shape"][0]:  # otherwise the block is shorter
        assert torch.equal(shorter, result.pixels[:2])


def test_a_whole_clip_is_generated_without_context() -> None:
    pipeline = pipeline_of(3, block_shape=(0, 0, 0))
    assert pipeline(frames=9, **STEPS).videos[0].pixels.shape[0] == 9
    for given in (video(20), video(1)):
        with pytest.raises(InputError, match=r"generates a clip as one block, .* leave the context out"):
            pipeline(given, frames=4, **STEPS)


def test_contexts_that_cut_a_block_are_refused_or_shortened(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    pipeline = pipeline_of(6, block_shape=(2, 0, 0))
    with pytest.raises(InputError, match=r"--context_frames is 9, and its 3 latent frames .* give 5 or 13"):
        pipeline(video(20), context_frames=9, frames=4, **STEPS)
    (result,) = pipeline(video(12), frames=4, **STEPS).videos
    assert len(result.clip.context.pixels) == 5
    assert "has 12 frames at stride 1: its context has 5 frames instead of 13" in caplog.text
    with pytest.raises(InputError, match=r"has 3 frames at stride 1, but the context needs 13: give a longer video"):
        pipeline(video(3), frames=4, **STEPS)
    with pytest.raises(InputError, match=r"is one frame, but the first block of the model has 2 latent frames \(5"):
        pipeline(video(1), frames=4, **STEPS)
    first_alone = pipeline_of(5, block_shape=(2, 0, 0), first_block_frames=1)
    assert first_alone(video(1), frames=4, **STEPS).videos[0].pixels.shape[0] == 4


@pytest.mark.parametrize(("given", "warns"), [(None, 0), (1, 1), (5, 2), (9, None)])
def test_a_context_that_ends_before_the_first_frame_with_a_loss_is_named(
    given: int | None, warns: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = pipeline_of(6)
    pipeline.trained = replace(pipeline.trained, frames_without_loss=3)
    pipeline(None if given is None else video(given), frames=4, **STEPS)
    expected = f"{warns} latent frames are given, but the first 3 of each video had no loss in training"
    assert (expected in caplog.text) == (warns is not None)
    assert ("give a context of at least 9 frames" in caplog.text) == (warns is not None)


def layout_of(**fields: Any) -> BlockLayout:
    return BlockLayout.of(GPDiTConfig(size="tiny", **fields), 8, 8)


@pytest.mark.parametrize(
    ("fields", "in_training", "frames", "window", "sinks", "expected"),
    [
        ({}, 5, 20, None, 0, (4, 0)),
        ({}, 5, 20, None, 1, (3, 1)),
        ({"block_shape": (2, 0, 0)}, 8, 20, None, 0, (6, 0)),
        ({"block_shape": (2, 0, 0)}, 8, 20, None, 2, (4, 2)),
        ({"block_shape": (2, 0, 0)}, 2, 20, None, 0, (2, 0)),
        ({"block_shape": (2, 0, 0)}, 8, 20, 4, 0, (4, 0)),
        # The first block cannot leave a window in the way of the others, and stays.
        ({"block_shape": (2, 0, 0), "first_block_frames": 1}, 7, 20, None, 0, (4, 1)),
        ({"block_shape": (2, 0, 0), "first_block_frames": 1}, 7, 5, None, 0, (4, 0)),
        ({"block_shape": (1, 2, 2)}, 3, 20, None, 0, (None, 0)),
        ({"block_shape": (0, 0, 0), "first_block_frames": 2}, 6, 6, None, 0, (None, 0)),
    ],
)
def test_windows_are_whole_blocks(
    fields: dict[str, Any],
    in_training: int,
    frames: int,
    window: int | None,
    sinks: int,
    expected: tuple[int | None, int],
) -> None:
    assert block_window(layout_of(**fields), in_training, frames, window, sinks) == expected


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"block_shape": (2, 0, 0)}, {"window": 3}, "--window is 3, which cuts a block .* give a multiple of 2"),
        ({"block_shape": (2, 0, 0)}, {"sinks": 3}, "--sinks is 3, which cuts a block .* give 2 or 4, or 0"),
        ({"block_shape": (1, 1, 1)}, {"window": 2}, "are parts of frames: leave them out"),
        ({"block_shape": (0, 0, 0), "first_block_frames": 2}, {"sinks": 1}, "are all frames of a clip: leave them out"),
    ],
)
def test_windows_that_cut_a_block_are_refused(fields: dict[str, Any], options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipeline_of(6, **fields)(video(40), frames=40, **STEPS, **options)


def test_a_long_video_has_a_window_of_blocks() -> None:
    """In the default window of the pipeline, also where the first block is shorter."""
    for fields in ({"block_shape": (2, 0, 0)}, {"block_shape": (2, 0, 0), "first_block_frames": 1}):
        pipeline = pipeline_of(5 if "first_block_frames" in fields else 6, **fields)
        (result,) = pipeline(video(40), frames=40, **STEPS).videos
        assert result.pixels.shape[0] == 40


def test_one_image_after_examples_needs_blocks_of_one_frame() -> None:
    images = video(7)
    pairs, source = [(images[0], images[1]), (images[2], images[3])], images[4][None]
    for fields in ({}, {"block_shape": (1, 1, 1)}, {"block_shape": (0, 0, 0), "first_block_frames": 5}):
        pipeline = pipeline_of(6, **fields)
        assert transform(pipeline.model, CODEC, pairs, source).shape == source.shape
    for fields in ({"block_shape": (2, 0, 0)}, {"block_shape": (2, 0, 0), "first_block_frames": 1}):
        with pytest.raises(InputError, match="cannot generate one image after 5 others"):
            transform(pipeline_of(6, **fields).model, CODEC, pairs, source)


def test_context_noise_needs_a_model_that_receives_its_angle() -> None:
    with pytest.raises(InputError, match=r"^--context_noise is 0.5, but with time_conditioning adaln clean tokens"):
        pipeline_of(3, time_conditioning="adaln")(video(5), context_noise=0.5)
