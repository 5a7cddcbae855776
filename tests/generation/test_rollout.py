"""Rollouts, compared with dense float64 forward passes over the whole video at every sampler step."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from gpdit_lightning import GPDiT, InputError
from gpdit_lightning.diffusion import Guidance, NoiseSchedule, RotationSampler, StochasticSampler
from gpdit_lightning.generation import ClipInputs, GenerationConfig, rollout
from gpdit_lightning.generation.rollout import frame_noise
from tests.model import oracle
from tests.model.toys import assert_near, toy_model

SCHEDULE = NoiseSchedule(shift=2.0)
SAMPLER = RotationSampler(steps=3, schedule=SCHEDULE)
CLASSES = 3


@pytest.fixture(params=["of2", "of"])
def model(request: pytest.FixtureRequest) -> GPDiT:
    return toy_model(attention=request.param).eval()


@pytest.fixture(params=["of2", "of"])
def labelled(request: pytest.FixtureRequest) -> GPDiT:
    return toy_model(attention=request.param, classes=CLASSES).eval()


def random_context(clips: int, frames: int, seed: int = 0) -> Tensor:
    return torch.randn(clips, frames, 3, 4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generate(
    model: GPDiT, context: Tensor, frames: int, seeds: Any = 0, condition: Tensor | None = None, **config: Any
) -> Tensor:
    config = {"sampler": SAMPLER} | config
    generated = list(rollout(model, context, frames, GenerationConfig(**config), ClipInputs(seeds, condition)))
    return torch.stack(generated, dim=1)


@torch.no_grad()
def reference_rollout(
    model: GPDiT,
    context: Tensor,
    frames: int,
    window: oracle.Window | None = None,
    guidance: Guidance | None = None,
    condition: Tensor | None = None,
    sampler: RotationSampler = SAMPLER,
) -> Tensor:
    """Generate each frame with forward passes of the oracle over all frames so far, of which the last frame is used."""
    guidance, weights = guidance or Guidance(), model.state_dict()
    so_far = context
    for frame in range(context.shape[1], context.shape[1] + frames):
        x = torch.stack([frame_noise(seed, frame, context.shape[2:]) for seed in range(len(context))]).to(context)

        def velocity(noisy: Tensor, theta: float, label: Tensor | None, clean: bool, so_far: Tensor = so_far) -> Tensor:
            # The values of unused inputs, which must not influence the result.
            unused_noisy, unused_clean = torch.full_like(so_far, -9.0), torch.full_like(noisy, 9.0)[:, None]
            angles = torch.full((len(noisy), so_far.shape[1] + 1), theta, dtype=torch.float64)
            all_clean = torch.cat([so_far, unused_clean], dim=1) if clean else None
            all_noisy = torch.cat([unused_noisy, noisy[:, None]], dim=1)
            return oracle.forward(weights, model.config, all_noisy, angles, all_clean, 1, label, window)[:, -1]

        angles = sampler.angles(torch.float64).tolist()
        for theta, next_theta in pairwise(angles):
            v = full = velocity(x, theta, condition, so_far.shape[1] > 0)
            if guidance.least_level * torch.pi / 2 <= theta <= guidance.most_level * torch.pi / 2:
                v = v + (guidance.context - 1) * (full - velocity(x, theta, condition, False))
                v = v + (guidance.label - 1) * (full - velocity(x, theta, None, so_far.shape[1] > 0))
            step = torch.tensor(theta - next_theta, dtype=torch.float64)
            x = step.cos() * x - step.sin() * v
        so_far = torch.cat([so_far, x[:, None]], dim=1)
    return so_far[:, context.shape[1] :]


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("context_frames", [0, 1, 3])
def test_rollout_equals_reference(model: GPDiT, context_frames: int, cached: bool) -> None:
    context = random_context(2, context_frames)
    generated = generate(model, context, frames=3, use_cache=cached)
    assert generated.shape == (2, 3, 3, 4, 6)
    assert generated.std() > 0.1
    assert_near(generated, reference_rollout(model, context, frames=3))


@pytest.mark.parametrize(
    ("attention", "context_frames", "window", "sinks"),
    [
        ("of2", 0, 2, 0),
        ("of", 0, 1, 2),
        ("of2", 1, 2, 1),
        ("of", 6, 1, 0),
        ("of2", 6, 1, 2),
        ("of", 6, 3, 2),
        pytest.param("of2", 6, 3, 2, marks=pytest.mark.slow),
        pytest.param("of", 6, 1, 2, marks=pytest.mark.slow),
    ],
)
def test_rolling_window_equals_masked_reference(attention: str, context_frames: int, window: int, sinks: int) -> None:
    """Includes contexts longer than the window, and rollouts longer than the ring buffer of the cache."""
    model, context = toy_model(attention=attention).eval(), random_context(1, context_frames)
    generated = generate(model, context, frames=7, window=window, sinks=sinks)
    assert_near(generated, reference_rollout(model, context, 7, (window, sinks)))
    assert not torch.allclose(generated, generate(model, context, frames=7))


@pytest.mark.parametrize(("window", "sinks"), [(2, 0), (1, 2)])
@pytest.mark.parametrize("context_frames", [0, 5])
def test_of_gives_the_same_result_without_a_cache(window: int, sinks: int, context_frames: int) -> None:
    model, context = toy_model(attention="of").eval(), random_context(2, context_frames)
    with_cache = generate(model, context, frames=5, window=window, sinks=sinks)
    assert_near(generate(model, context, frames=5, window=window, sinks=sinks, use_cache=False), with_cache)


def test_window_as_long_as_the_video_changes_nothing(model: GPDiT) -> None:
    context = random_context(1, 2)
    assert torch.equal(generate(model, context, 4, window=5), generate(model, context, 4))
    assert torch.equal(generate(model, context, 4, window=3, sinks=2), generate(model, context, 4))


@pytest.mark.parametrize(
    ("context_frames", "guidance"),
    [
        (0, Guidance(context=2.0)),
        (0, Guidance(context=1.2, label=2.0)),
        (2, Guidance(context=2.0)),
        (2, Guidance(label=3.0)),
        (2, Guidance(context=1.2, label=2.0)),
        (2, Guidance(context=2.0, label=0.5, least_level=0.5, most_level=0.8)),
    ],
    ids=["0-context", "0-both", "context", "label", "both", "levels"],
)
def test_guidance_equals_reference(labelled: GPDiT, context_frames: int, guidance: Guidance) -> None:
    context, labels = random_context(2, context_frames), torch.tensor([2, 0])
    sampler = RotationSampler(steps=3)  # without shift, so that some levels lie in the guided range
    generated = generate(labelled, context, 2, condition=labels, guidance=guidance, sampler=sampler)
    assert_near(generated, reference_rollout(labelled, context, 2, None, guidance, labels, sampler))
    if context_frames or guidance.label != 1:
        assert not torch.allclose(generated, generate(labelled, context, 2, condition=labels, sampler=sampler))


def test_guidance_adds_one_noisy_frame_per_clip_without_history(model: GPDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does so only at the guided noise levels."""
    calls: list[tuple[int, int]] = []
    denoise = model.denoise

    def recorded(noisy: Tensor, *arguments: Any, **options: Any) -> Tensor:
        clean = arguments[3]
        calls.append((len(noisy), 0 if clean is None else clean.shape[1]))
        return denoise(noisy, *arguments, **options)

    monkeypatch.setattr(model, "denoise", recorded)
    guidance = Guidance(context=2.0, least_level=0.4, most_level=0.7)
    sampler = RotationSampler(steps=4)  # at levels 1, 3/4, 1/2 and 1/4
    generate(model, random_context(2, 3), 2, guidance=guidance, sampler=sampler)
    # The preceding clean frame is an input of the first pass of each frame only.
    assert calls == [(2, 1), (2, 0), (4, 0), (2, 0)] * 2


def test_every_label_changes_the_frames(labelled: GPDiT) -> None:
    context = random_context(1, 1)
    by_label = [generate(labelled, context, 1, condition=torch.tensor([label])) for label in range(-1, CLASSES)]
    for number, frames in enumerate(by_label):
        assert not any(torch.allclose(frames, other) for other in by_label[:number])
    assert torch.equal(generate(labelled, context, 1), by_label[0])


def test_guidance_over_texts_uses_the_null_condition() -> None:
    model, context = toy_model(text_width=5).eval(), random_context(2, 1)
    text, empty = torch.randn(2, 4, 5, dtype=torch.float64), torch.zeros(2, 4, 5, dtype=torch.float64)
    config = GenerationConfig(SAMPLER, Guidance(label=2.0))
    (guided,) = rollout(model, context, 1, config, ClipInputs(condition=text, null_condition=empty))
    (conditional,), (unconditional,) = (
        rollout(model, context, 1, GenerationConfig(SAMPLER), ClipInputs(condition=c)) for c in (text, empty)
    )
    assert not torch.allclose(conditional, unconditional)
    assert not torch.allclose(guided, conditional)
    with pytest.raises(InputError, match="as null_condition"):
        next(rollout(model, context, 1, config, ClipInputs(condition=text)))
    with pytest.raises(InputError, match=r"text embeddings \(B, L, 5\) with B = 2"):
        next(rollout(model, context, 1))


def test_result_is_independent_of_batch_composition(labelled: GPDiT) -> None:
    """Up to rounding, since sums are ordered differently."""
    context, labels, guidance = random_context(3, 2), torch.tensor([1, -1, 0]), Guidance(context=2.0, label=1.5)
    options: dict[str, Any] = {"guidance": guidance, "sampler": StochasticSampler(3), "window": 2}
    together = generate(labelled, context, 3, seeds=[7, 3, 5], condition=labels, **options)
    for clip, seed in enumerate([7, 3, 5]):
        part = slice(clip, clip + 1)
        alone = generate(labelled, context[part], 3, seeds=[seed], condition=labels[part], **options)
        assert_near(alone, together[part])


def test_one_seed_gives_clips_consecutive_seeds(model: GPDiT) -> None:
    context = random_context(1, 1).expand(2, -1, -1, -1, -1)
    generated = generate(model, context, 1, seeds=4)
    assert torch.equal(generated, generate(model, context, 1, seeds=[4, 5]))
    assert not torch.allclose(generated[0], generated[1])


def test_context_changes_the_frames(model: GPDiT) -> None:
    first, second = (generate(model, random_context(1, 2, seed), frames=2) for seed in (0, 1))
    assert not torch.allclose(first, second)


def test_longer_rollout_begins_like_a_shorter_one(model: GPDiT) -> None:
    context = random_context(1, 1)
    longer, shorter = generate(model, context, frames=4), generate(model, context, frames=2)
    assert_near(longer[:, :2], shorter)


def test_endless_and_empty_rollouts(model: GPDiT) -> None:
    frames = rollout(model, random_context(1, 1), None, GenerationConfig(SAMPLER, window=2))
    for _ in range(5):
        assert next(frames).shape == (1, 3, 4, 6)
    assert not next(frames).requires_grad
    assert list(rollout(model, random_context(1, 2), 0)) == []


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_bfloat16_products_are_close(labelled: GPDiT) -> None:
    model, context = labelled.float(), random_context(2, 2).float()
    options: dict[str, Any] = {"guidance": Guidance(context=1.5), "window": 2}
    exact = generate(model, context, 2, **options)
    rounded = generate(model, context, 2, autocast_dtype=torch.bfloat16, **options)
    assert not torch.equal(rounded, exact)
    assert_near(rounded, exact, tolerance=0.05)


def test_noise_depends_on_seed_frame_and_draw_only() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    draws = {frame_noise(seed, frame, (2, 3), draw).numpy().tobytes() for seed, frame, draw in keys}
    assert len(draws) == 4
    torch.manual_seed(1)
    first = frame_noise(3, 1, (2, 3))
    torch.manual_seed(2)
    assert torch.equal(frame_noise(3, 1, (2, 3)), first)
    large = frame_noise(0, 0, (100_000,)).double()
    assert abs(large.mean().item()) < 4 / len(large) ** 0.5
    assert abs(large.var().item() - 1) < 4 * (2 / len(large)) ** 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [1, 2, 3]}, r"\[1, 2, 3\] for 2 clips"),
        ({"seeds": -1}, "at least 0"),
        ({"frames": None}, "give it a window"),
        ({"guidance": Guidance(label=2.0)}, "over a label needs a label"),
        ({"condition": torch.tensor([0, 1])}, "has neither classes nor text_width"),
    ],
)
def test_invalid_input_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(toy_model().eval(), random_context(2, 1), **{"frames": 2} | options)


def test_window_of_of2_without_a_cache_is_refused() -> None:
    with pytest.raises(InputError, match="but the window is 2"):
        generate(toy_model().eval(), random_context(1, 1), 5, window=2, use_cache=False)


def test_invalid_config_is_refused() -> None:
    with pytest.raises(InputError, match="window is 0"):
        GenerationConfig(window=0)
    with pytest.raises(InputError, match="sinks is -1"):
        GenerationConfig(sinks=-1)
