from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.diffusion import NoiseSchedule, RotationSampler
from gpdit_lightning.generation import rollout
from gpdit_lightning.generation.rollout import frame_noise

Randomise = Callable[[GPDiT], GPDiT]
SAMPLER = RotationSampler(steps=3, schedule=NoiseSchedule(shift=2.0))


@pytest.fixture(params=["of2", "of"])
def model(request: pytest.FixtureRequest, tiny_config: GPDiTConfig, randomise: Randomise) -> GPDiT:
    return randomise(GPDiT(tiny_config.replaced(attention=request.param)).double().eval())


def context_of(clips: int, frames: int, seed: int = 0) -> Tensor:
    return torch.randn(clips, frames, 4, 4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generate(model: GPDiT, context: Tensor, frames: int, seed: int = 0, sampler: RotationSampler = SAMPLER) -> Tensor:
    return torch.stack(list(rollout(model, sampler, context, frames, seed)), dim=1)


@torch.no_grad()
def generate_without_cache(model: GPDiT, context: Tensor, frames: int, seed: int) -> Tensor:
    """The full forward over all frames so far at every sampler step; only its last frame is used."""
    known = context
    for frame in range(context.shape[1], context.shape[1] + frames):
        noise = torch.stack([frame_noise(seed, clip, frame, tuple(context.shape[2:])) for clip in range(len(context))])

        def velocity(noisy: Tensor, theta: Tensor, known: Tensor = known) -> Tensor:
            nobody_sees = torch.full_like(noisy, 9.0)[:, None]
            earlier = torch.full_like(known, -9.0)
            angles = torch.cat([torch.ones(known.shape[:2]).to(theta), theta[:, None]], dim=1)
            clean = torch.cat([known, nobody_sees], dim=1)
            return model(torch.cat([earlier, noisy[:, None]], dim=1), angles, clean)[:, -1]

        known = torch.cat([known, SAMPLER.sample(velocity, noise.to(context))[:, None]], dim=1)
    return known[:, context.shape[1] :]


@pytest.mark.parametrize("known", [0, 1, 3])
def test_the_cache_changes_nothing(model: GPDiT, known: int) -> None:
    context = context_of(2, known)
    generated = generate(model, context, frames=3, seed=5)
    assert generated.shape == (2, 3, 4, 4, 6)
    expected = generate_without_cache(model, context, frames=3, seed=5)
    torch.testing.assert_close(generated, expected, rtol=0, atol=1e-9)
    assert generated.std() > 0.1


def test_context_and_generated_frames_are_seen(model: GPDiT) -> None:
    first, second = (generate(model, context_of(1, 2, seed), frames=2) for seed in (0, 1))
    assert not torch.allclose(first, second)
    model_without_memory = generate(model, context_of(1, 0), frames=1)
    assert not torch.allclose(first[:, :1], model_without_memory)


def test_the_seed_gives_the_frames(model: GPDiT) -> None:
    context = context_of(2, 1)
    assert torch.equal(generate(model, context, 2, seed=3), generate(model, context, 2, seed=3))
    assert not torch.allclose(generate(model, context, 2, seed=3), generate(model, context, 2, seed=4))


def test_a_clip_does_not_depend_on_its_neighbours(model: GPDiT) -> None:
    context, other = context_of(3, 2), context_of(3, 2, seed=1)
    together = generate(model, context, frames=2)
    torch.testing.assert_close(generate(model, context[:1], frames=2), together[:1], rtol=0, atol=1e-9)
    for clip in range(3):
        neighbours = other.clone()
        neighbours[clip] = context[clip]
        alone = generate(model, neighbours, frames=2)
        torch.testing.assert_close(alone[clip], together[clip], rtol=0, atol=1e-9)


def test_equal_clips_in_a_batch_differ_by_their_noise(model: GPDiT) -> None:
    generated = generate(model, context_of(1, 1).expand(2, -1, -1, -1, -1), frames=1)
    assert not torch.allclose(generated[0], generated[1])


def test_a_longer_rollout_begins_like_a_shorter_one(model: GPDiT) -> None:
    context = context_of(1, 1)
    longer, shorter = generate(model, context, frames=4), generate(model, context, frames=2)
    torch.testing.assert_close(longer[:, :2], shorter, rtol=0, atol=1e-9)


def test_frames_are_given_one_by_one(model: GPDiT) -> None:
    frames = rollout(model, SAMPLER, context_of(1, 1), 1000)
    assert next(frames).shape == (1, 4, 4, 6)
    assert not next(frames).requires_grad


def test_no_frame_is_asked_for_none_is_given(model: GPDiT) -> None:
    assert list(rollout(model, SAMPLER, context_of(1, 2), 0)) == []


def test_noise_belongs_to_seed_clip_and_frame() -> None:
    draws = {frame_noise(*words, (2, 3)).numpy().tobytes() for words in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
    assert len(draws) == 4
    torch.manual_seed(1)
    first = frame_noise(3, 1, 2, (2, 3))
    torch.manual_seed(2)
    assert torch.equal(frame_noise(3, 1, 2, (2, 3)), first)
    large = frame_noise(0, 0, 0, (100_000,)).double()
    assert abs(large.mean().item()) < 4 / len(large) ** 0.5
    assert abs(large.var().item() - 1) < 4 * (2 / len(large)) ** 0.5
