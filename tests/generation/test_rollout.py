"""Rollouts against an independent one: a dense float64 forward over the whole video at every sampler step."""

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


def context_of(clips: int, frames: int, seed: int = 0) -> Tensor:
    return torch.randn(clips, frames, 3, 4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generate(
    model: GPDiT, context: Tensor, frames: int, seeds: Any = 0, condition: Tensor | None = None, **config: Any
) -> Tensor:
    config = {"sampler": SAMPLER} | config
    frames_made = list(rollout(model, context, frames, GenerationConfig(**config), ClipInputs(seeds, condition)))
    return torch.stack(frames_made, dim=1)


@torch.no_grad()
def slow_rollout(
    model: GPDiT,
    context: Tensor,
    frames: int,
    window: oracle.Window | None = None,
    guidance: Guidance | None = None,
    condition: Tensor | None = None,
    sampler: RotationSampler = SAMPLER,
) -> Tensor:
    """Every frame from the oracle's forward over all frames so far; only its last frame is used."""
    guidance, weights = guidance or Guidance(), model.state_dict()
    known = context
    for frame in range(context.shape[1], context.shape[1] + frames):
        x = torch.stack([frame_noise(seed, frame, context.shape[2:]) for seed in range(len(context))]).to(context)

        def velocity(noisy: Tensor, theta: float, label: Tensor | None, clean: bool, known: Tensor = known) -> Tensor:
            earlier, nobody_sees = torch.full_like(known, -9.0), torch.full_like(noisy, 9.0)[:, None]
            angles = torch.full((len(noisy), known.shape[1] + 1), theta, dtype=torch.float64)
            frames_before = torch.cat([known, nobody_sees], dim=1) if clean else None
            everything = torch.cat([earlier, noisy[:, None]], dim=1)
            return oracle.forward(weights, model.config, everything, angles, frames_before, 1, label, window)[:, -1]

        angles = sampler.angles(torch.float64).tolist()
        for theta, following in pairwise(angles):
            v = full = velocity(x, theta, condition, known.shape[1] > 0)
            if guidance.least_level * torch.pi / 2 <= theta <= guidance.most_level * torch.pi / 2:
                v = v + (guidance.context - 1) * (full - velocity(x, theta, condition, False))
                v = v + (guidance.label - 1) * (full - velocity(x, theta, None, known.shape[1] > 0))
            step = torch.tensor(theta - following, dtype=torch.float64)
            x = step.cos() * x - step.sin() * v
        known = torch.cat([known, x[:, None]], dim=1)
    return known[:, context.shape[1] :]


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("known", [0, 1, 3])
def test_a_rollout_equals_the_slow_one(model: GPDiT, known: int, cached: bool) -> None:
    context = context_of(2, known)
    generated = generate(model, context, frames=3, use_cache=cached)
    assert generated.shape == (2, 3, 3, 4, 6)
    assert generated.std() > 0.1
    assert_near(generated, slow_rollout(model, context, frames=3))


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (2, 0), (2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("known", [0, 1, 6])
def test_a_rolling_window_equals_its_mask_over_the_whole_video(
    model: GPDiT, known: int, window: int, sinks: int
) -> None:
    """Also where the context is longer than the window, and where the cache has rolled more than once around."""
    context = context_of(1, known)
    generated = generate(model, context, frames=7, window=window, sinks=sinks)
    assert_near(generated, slow_rollout(model, context, 7, (window, sinks)))
    assert not torch.allclose(generated, generate(model, context, frames=7))


@pytest.mark.parametrize(("window", "sinks"), [(2, 0), (1, 2)])
@pytest.mark.parametrize("known", [0, 5])
def test_of_needs_no_cache(window: int, sinks: int, known: int) -> None:
    model, context = toy_model(attention="of").eval(), context_of(2, known)
    with_cache = generate(model, context, frames=5, window=window, sinks=sinks)
    assert_near(generate(model, context, frames=5, window=window, sinks=sinks, use_cache=False), with_cache)


def test_a_window_as_long_as_the_video_changes_nothing(model: GPDiT) -> None:
    context = context_of(1, 2)
    assert torch.equal(generate(model, context, 4, window=5), generate(model, context, 4))
    assert torch.equal(generate(model, context, 4, window=3, sinks=2), generate(model, context, 4))


@pytest.mark.parametrize("known", [0, 2])
@pytest.mark.parametrize(
    "guidance",
    [
        Guidance(context=2.0),
        Guidance(label=3.0),
        Guidance(context=1.2, label=2.0),
        Guidance(context=2.0, label=0.5, least_level=0.5, most_level=0.8),
    ],
    ids=["context", "label", "both", "levels"],
)
def test_guidance_equals_the_slow_one(labelled: GPDiT, known: int, guidance: Guidance) -> None:
    context, labels = context_of(2, known), torch.tensor([2, 0])
    sampler = RotationSampler(steps=3)  # whose levels t are even
    generated = generate(labelled, context, 2, condition=labels, guidance=guidance, sampler=sampler)
    assert_near(generated, slow_rollout(labelled, context, 2, None, guidance, labels, sampler))
    if known or guidance.label != 1:
        assert not torch.allclose(generated, generate(labelled, context, 2, condition=labels, sampler=sampler))


def test_the_unguided_branch_has_no_history(model: GPDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one more noisy frame for each clip, and only at the guided noise levels."""
    asked: list[tuple[int, int, int]] = []
    denoise = model.denoise

    def counted(noisy: Tensor, *arguments: Any, without_context: int = 0, **options: Any) -> Tensor:
        clean = arguments[3]
        asked.append((len(noisy), without_context, 0 if clean is None else clean.shape[1]))
        return denoise(noisy, *arguments, without_context=without_context, **options)

    monkeypatch.setattr(model, "denoise", counted)
    guidance = Guidance(context=2.0, least_level=0.4, most_level=0.7)
    generate(model, context_of(2, 3), 2, guidance=guidance, sampler=RotationSampler(steps=4))  # t = 1, 3/4, 1/2, 1/4
    # The frame before goes into the first pass of each frame, and is never seen again.
    assert asked == [(2, 0, 1), (2, 0, 0), (4, 2, 0), (2, 0, 0)] * 2


def test_labels_reach_the_frames(labelled: GPDiT) -> None:
    context = context_of(1, 1)
    by_label = [generate(labelled, context, 1, condition=torch.tensor([label])) for label in range(-1, CLASSES)]
    for number, frames in enumerate(by_label):
        assert not any(torch.allclose(frames, other) for other in by_label[:number])
    assert torch.equal(generate(labelled, context, 1), by_label[0])


def test_texts_are_guided_over_with_an_empty_one() -> None:
    """Any encoder will do: the model takes its embeddings, of any number of tokens."""
    model, context = toy_model(text_width=5).eval(), context_of(2, 1)
    text, empty = torch.randn(2, 4, 5, dtype=torch.float64), torch.zeros(2, 4, 5, dtype=torch.float64)
    config = GenerationConfig(SAMPLER, Guidance(label=2.0))
    (guided,) = rollout(model, context, 1, config, ClipInputs(condition=text, null_condition=empty))
    (said,), (unsaid,) = (
        rollout(model, context, 1, GenerationConfig(SAMPLER), ClipInputs(condition=c)) for c in (text, empty)
    )
    assert not torch.allclose(said, unsaid)
    assert not torch.allclose(guided, said)
    with pytest.raises(InputError, match="as null_condition"):
        next(rollout(model, context, 1, config, ClipInputs(condition=text)))
    with pytest.raises(InputError, match=r"text embeddings \(B, L, 5\) with B = 2"):
        next(rollout(model, context, 1))


def test_batched_equals_one_by_one(labelled: GPDiT) -> None:
    """With the same seeds, whatever the neighbours; to rounding, as sums over a batch are ordered differently."""
    context, labels, guidance = context_of(3, 2), torch.tensor([1, -1, 0]), Guidance(context=2.0, label=1.5)
    options: dict[str, Any] = {"guidance": guidance, "sampler": StochasticSampler(3), "window": 2}
    together = generate(labelled, context, 3, seeds=[7, 3, 5], condition=labels, **options)
    for clip, seed in enumerate([7, 3, 5]):
        part = slice(clip, clip + 1)
        alone = generate(labelled, context[part], 3, seeds=[seed], condition=labels[part], **options)
        assert_near(alone, together[part])


def test_a_number_as_seed_gives_each_clip_the_next_one(model: GPDiT) -> None:
    context = context_of(1, 1).expand(2, -1, -1, -1, -1)
    generated = generate(model, context, 1, seeds=4)
    assert torch.equal(generated, generate(model, context, 1, seeds=[4, 5]))
    assert not torch.allclose(generated[0], generated[1])


def test_context_and_generated_frames_are_seen(model: GPDiT) -> None:
    first, second = (generate(model, context_of(1, 2, seed), frames=2) for seed in (0, 1))
    assert not torch.allclose(first, second)


def test_a_longer_rollout_begins_like_a_shorter_one(model: GPDiT) -> None:
    context = context_of(1, 1)
    longer, shorter = generate(model, context, frames=4), generate(model, context, frames=2)
    assert_near(longer[:, :2], shorter)


def test_frames_are_given_one_by_one_without_end(model: GPDiT) -> None:
    frames = rollout(model, context_of(1, 1), None, GenerationConfig(SAMPLER, window=2))
    for _ in range(5):
        assert next(frames).shape == (1, 3, 4, 6)
    assert not next(frames).requires_grad


def test_no_frame_is_asked_for_none_is_given(model: GPDiT) -> None:
    assert list(rollout(model, context_of(1, 2), 0)) == []


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_products_in_bfloat16_are_close(labelled: GPDiT) -> None:
    model, context = labelled.float(), context_of(2, 2).float()
    options: dict[str, Any] = {"guidance": Guidance(context=1.5), "window": 2}
    exact = generate(model, context, 2, **options)
    rounded = generate(model, context, 2, autocast_dtype=torch.bfloat16, **options)
    assert not torch.equal(rounded, exact)
    assert_near(rounded, exact, tolerance=0.05)


def test_noise_belongs_to_seed_frame_and_draw() -> None:
    words = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    draws = {frame_noise(seed, frame, (2, 3), draw).numpy().tobytes() for seed, frame, draw in words}
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
        ({"seeds": -1}, "from 0 on"),
        ({"frames": None}, "give it a window"),
        ({"guidance": Guidance(label=2.0)}, "over a label needs a label"),
        ({"condition": torch.tensor([0, 1])}, "built without a condition"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(toy_model().eval(), context_of(2, 1), **{"frames": 2} | options)


def test_without_a_cache_of2_must_see_all() -> None:
    with pytest.raises(InputError, match="but the window is 2"):
        generate(toy_model().eval(), context_of(1, 1), 5, window=2, use_cache=False)


def test_a_window_of_no_frame_is_refused() -> None:
    with pytest.raises(InputError, match="window is 0"):
        GenerationConfig(window=0)
    with pytest.raises(InputError, match="sinks is -1"):
        GenerationConfig(sinks=-1)
