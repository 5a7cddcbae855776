"""Rollouts of blocks of any shape, compared with full float64 forward passes over the whole clip at every step."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from gpdit_lightning import GPDiT, InputError
from gpdit_lightning.diffusion import Guidance, NoiseSchedule, RotationSampler
from gpdit_lightning.generation import ClipInputs, GenerationConfig, rollout
from gpdit_lightning.generation.rollout import frame_noise
from gpdit_lightning.model.layout import ClipBlocks
from tests.model.toys import assert_near, toy_model

SAMPLER = RotationSampler(steps=3, schedule=NoiseSchedule(name="linear"))
SIZE = (3, 4, 8)  # channels, height and width
# Fields of the configuration, latent frames of the context, and of the request.
CASES: list[tuple[dict[str, Any], int, int]] = [
    ({"block_shape": (2, 0, 0)}, 2, 4),
    ({"block_shape": (2, 0, 0)}, 4, 3),
    ({"block_shape": (2, 0, 0)}, 0, 3),
    ({"block_shape": (2, 0, 0), "first_block_frames": 1}, 1, 3),
    ({"block_shape": (1, 0, 0), "first_block_frames": 3}, 3, 2),
    ({"block_shape": (2, 0, 0), "first_block_frames": 3}, 0, 4),
    ({"block_shape": (0, 0, 0)}, 0, 3),
    ({"block_shape": (0, 0, 0), "first_block_frames": 2}, 2, 3),
    ({"block_shape": (0, 0, 0), "first_block_frames": 2}, 0, 5),
    ({"block_shape": (1, 2, 2)}, 0, 1),
    ({"block_shape": (1, 1, 2)}, 1, 2),
    ({"block_shape": (2, 1, 4)}, 2, 3),
    ({"block_shape": (2, 1, 1)}, 2, 1),  # the last blocks are cut
    ({"block_shape": (2, 0, 0), "causal_in_block": True}, 2, 3),
    ({"block_shape": (2, 0, 0), "factorized": True}, 2, 3),
]
ADALN = {"time_conditioning": "adaln", "target": "epsilon", "classes": 3}
GUIDANCE = Guidance(context=1.5, label=2.0)


@torch.no_grad()
def reference_rollout(
    model: GPDiT, context: Tensor, frames: int, guidance: Guidance | None = None, labels: Tensor | None = None
) -> Tensor:
    """Generate each block with forward passes over the whole clip, with large values in the place of later blocks."""
    guidance, given, wanted = guidance or Guidance(), context.shape[1], context.shape[1] + frames
    of_block, first = model.config.block_shape[0], model.config.first_block_frames or model.config.block_shape[0]
    length = max(wanted, first)  # whole blocks
    length += -(length - first) % of_block if of_block else 0
    blocks = ClipBlocks.of(model.config, range(length), *context.shape[-2:])
    noise = [torch.stack([frame_noise(seed, frame, SIZE) for frame in range(length)]) for seed in range(len(context))]
    later = torch.full((len(context), length - given, *SIZE), 9.0, dtype=torch.float64)
    clip = torch.cat((context, later), dim=1)
    for number, block in enumerate(blocks.blocks):
        is_block = torch.zeros(1, len(blocks.blocks), dtype=torch.float64)
        is_block[:, number] = 1
        of_clip = blocks.spread(is_block).bool()
        if of_clip[:, :given].any():
            continue

        def velocity(x: Tensor, theta: float, label: Tensor | None, clean: Tensor | None) -> Tensor:
            angles = torch.full((len(x), len(blocks.blocks)), theta, dtype=torch.float64)
            output = model(x, angles, clean, label)
            epsilon = model.config.target == "epsilon"
            return (output - angles.sin()[0, 0] * x) / angles.cos()[0, 0] if epsilon else output

        x = torch.where(of_clip, torch.stack(noise).double(), -9.0)
        for theta, theta_next in pairwise(SAMPLER.angles(torch.float64).tolist()):
            v = full = velocity(x, theta, labels, clip)
            if guidance.context != 1:
                v = v + (guidance.context - 1) * (full - velocity(x, theta, labels, None))
            if guidance.label != 1:
                v = v + (guidance.label - 1) * (full - velocity(x, theta, None, clip))
            step = torch.tensor(theta - theta_next, dtype=torch.float64)
            x = torch.where(of_clip, step.cos() * x - step.sin() * v, -9.0)
        clip = torch.where(of_clip, x, clip)
        assert block == number
    return clip[:, given:wanted]


def random_context(frames: int, clips: int = 2) -> Tensor:
    return torch.randn(clips, frames, *SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def generate(model: GPDiT, context: Tensor, frames: int, labels: Tensor | None = None, **config: Any) -> Tensor:
    config = {"sampler": SAMPLER} | config
    generated = list(rollout(model, context, frames, GenerationConfig(**config), ClipInputs(0, labels)))
    return torch.stack(generated, dim=1)


@pytest.mark.parametrize("time", [{}, {"classes": 3}, ADALN], ids=["rotation", "labels", "adaln"])
@pytest.mark.parametrize(("fields", "given", "frames"), CASES, ids=str)
def test_rollout_equals_full_passes(fields: dict[str, Any], given: int, frames: int, time: dict[str, Any]) -> None:
    """With guidance over the label and the context if the model has labels."""
    variant = "of" if given % 2 else "of2"
    if fields.get("factorized") and time == {"classes": 3}:
        time = {}  # factorized attention takes no label as tokens
    model, context = toy_model(attention=variant, layers=2, **fields, **time).eval(), random_context(given)
    labels, guidance = (torch.tensor([2, 0]), GUIDANCE) if time else (None, Guidance())
    generated = generate(model, context, frames, labels, guidance=guidance)
    assert generated.shape == (2, frames, *SIZE)
    assert generated.std() > 0.1
    expected = reference_rollout(model, context, frames, guidance, labels)
    assert_near(generated, expected, tolerance=1e-8)
    if model.config.whole_frames:
        assert_near(generate(model, context, frames, labels, guidance=guidance, use_cache=False), expected, 1e-8)


@pytest.mark.parametrize(("sinks", "first"), [(0, 0), (2, 0), (1, 1)])
def test_a_window_of_whole_blocks(sinks: int, first: int) -> None:
    """A model with one layer: what a block attends to directly is the sinks and the blocks of the window."""
    model = toy_model(block_shape=(2, 0, 0), first_block_frames=first, layers=1).eval()
    context = random_context((first or 2) + 4)
    generated = generate(model, context, frames=6, window=2, sinks=sinks)
    clip = torch.cat((context, generated), dim=1)
    for start in range(context.shape[1], clip.shape[1], 2):
        visible = torch.cat((clip[:, :sinks], clip[:, start - 2 : start]), dim=1)
        noise = torch.stack([frame_noise(seed, frame, SIZE) for seed in (0, 1) for frame in (start, start + 1)])
        x = noise.view(2, 2, *SIZE).double()
        for theta, theta_next in pairwise(SAMPLER.angles(torch.float64).tolist()):
            angles = torch.full((2,), theta, dtype=torch.float64)
            step = torch.tensor(theta - theta_next, dtype=torch.float64)
            with torch.no_grad():
                x = step.cos() * x - step.sin() * model.denoise(x, angles, clean=visible)
        assert_near(clip[:, start : start + 2], x, what=f"frames from {start}")


def test_frames_are_yielded_as_their_block_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = toy_model(block_shape=(2, 0, 0)).eval(), 0
    denoise = model.denoise

    def counted(*arguments: Any, **options: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return denoise(*arguments, **options)

    monkeypatch.setattr(model, "denoise", counted)
    calls_at_frames = [calls for _ in rollout(model, random_context(2), 5, GenerationConfig(SAMPLER))]
    assert calls_at_frames == [3, 3, 6, 6, 9]


@pytest.mark.parametrize(
    ("fields", "given", "frames", "config", "message"),
    [
        ({"block_shape": (2, 0, 0)}, 3, 2, {}, "3 latent frames, which are not whole blocks .* of 2 or 4 latent"),
        ({"block_shape": (2, 0, 0), "first_block_frames": 3}, 2, 2, {}, "give a context of 3 latent frames"),
        ({"block_shape": (0, 0, 0)}, 2, 2, {}, "as one block, .* leave the context out"),
        ({"block_shape": (0, 0, 0), "first_block_frames": 2}, 3, 2, {}, "give a context of 2 latent frames"),
        ({"block_shape": (2, 1, 1)}, 1, 2, {}, "give a context of 2 latent frames"),
        ({"block_shape": (2, 0, 0)}, 2, 6, {"window": 3}, "a window of a multiple of 2 frames"),
        ({"block_shape": (2, 0, 0)}, 2, 8, {"window": 2, "sinks": 1}, "choose sinks that end with a block"),
        ({"block_shape": (1, 2, 2)}, 1, 4, {"window": 1}, "generate without a window"),
        ({"block_shape": (0, 0, 0)}, 0, None, {"window": 1}, "an endless rollout would be one endless block"),
        ({"block_shape": (1, 2, 2)}, 1, 2, {"use_cache": False}, "generate with the cache"),
        ({"target": "epsilon"}, 1, 1, {"sampler": RotationSampler(2)}, "epsilon, from which x0 cannot be computed"),
    ],
)
def test_unusable_requests_are_refused(
    fields: dict[str, Any], given: int, frames: int | None, config: dict[str, Any], message: str
) -> None:
    model = toy_model(**fields).eval()
    with pytest.raises(InputError, match=message):
        next(rollout(model, random_context(given), frames, GenerationConfig(**{"sampler": SAMPLER} | config)))
