"""Frame-by-frame generation with cached keys and values equals the full forward."""

import pytest
import torch
from torch import Tensor
from toys import assert_near, toy_batch, toy_model

from gpdit_lightning import GPDiT, InputError
from gpdit_lightning.model import KVCache

VARIANTS = ("of2", "of")
FRAMES = 5


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> GPDiT:
    return toy_model(attention=request.param, layers=3)


def rollout(model: GPDiT, batch: tuple[Tensor, Tensor, Tensor], steps: list[int]) -> KVCache:
    """Extend a cache by `steps` frames at a time and check each frame that can be denoised on the way."""
    noisy, theta, clean = batch
    with torch.no_grad():
        expected = model(noisy, theta, clean)
    cache = model.new_cache(len(noisy), FRAMES, *noisy.shape[-2:])
    held = 0
    for step in steps:
        model.extend(cache, clean[:, held : held + step])
        held += step
        assert cache.frames == held
        if held < FRAMES:
            velocity = model.denoise(noisy[:, held], theta[:, held], cache)
            assert_near(velocity, expected[:, held], what=f"frame {held}")
    return cache


@pytest.mark.parametrize("steps", [[1, 1, 1, 1, 1], [4], [2, 2], [1, 3], [3, 1, 1], [5]], ids=str)
def test_denoised_frames_equal_the_full_forward(model: GPDiT, steps: list[int]) -> None:
    rollout(model, toy_batch(2, frames=FRAMES), steps)


@pytest.mark.parametrize("site", ["branch_inverse", "input", "residual", "none"])
def test_at_every_time_site(site: str) -> None:
    rollout(toy_model(time_site=site), toy_batch(2, frames=FRAMES), [1, 2, 1])


def test_first_frame_needs_no_cache(model: GPDiT) -> None:
    noisy, theta, clean = toy_batch(2, frames=FRAMES)
    with torch.no_grad():
        expected = model(noisy, theta, clean)[:, 0]
        empty = model.denoise(noisy[:, 0], theta[:, 0], model.new_cache(2, FRAMES, 4, 6))
        none = model.denoise(noisy[:, 0], theta[:, 0], None)
    assert_near(none, expected)
    assert torch.equal(empty, none)


@pytest.mark.parametrize("frame", range(FRAMES))
def test_without_cache_any_frame_looks_like_a_first_one(model: GPDiT, frame: int) -> None:
    """RoPE is relative, so a frame that lost its context is the same at every position."""
    noisy, theta, _ = toy_batch(2, frames=FRAMES)
    with torch.no_grad():
        expected = model(noisy, theta, None)[:, frame]
    assert_near(model.denoise(noisy[:, frame], theta[:, frame]), expected)


def test_asking_twice_changes_nothing(model: GPDiT) -> None:
    noisy, theta, clean = toy_batch(2, frames=FRAMES)
    cache = model.new_cache(2, FRAMES, 4, 6)
    model.extend(cache, clean[:, :2])
    first = model.denoise(noisy[:, 2], theta[:, 2], cache)
    model.denoise(noisy[:, 3], theta[:, 0], cache)  # another question in between
    assert torch.equal(model.denoise(noisy[:, 2], theta[:, 2], cache), first)
    assert cache.frames == 2
    model.extend(cache, clean[:, 2:3])
    with torch.no_grad():
        expected = model(noisy, theta, clean)[:, 3]
    assert_near(model.denoise(noisy[:, 3], theta[:, 3], cache), expected)


def test_unwritten_room_is_never_read(model: GPDiT) -> None:
    noisy, theta, clean = toy_batch(2, frames=FRAMES)
    answers = []
    for rubbish in (torch.nan, 1e30):
        cache = model.new_cache(2, FRAMES + 3, 4, 6)
        cache._buffer.fill_(rubbish)
        model.extend(cache, clean[:, :1])
        model.extend(cache, clean[:, 1:3])
        answers.append(model.denoise(noisy[:, 3], theta[:, 3], cache))
    assert answers[0].isfinite().all()
    assert torch.equal(*answers)


def test_denoise_gradients_equal_those_of_the_full_forward(model: GPDiT) -> None:
    """Distillation and guidance differentiate through the frame in hand; the cache is a constant to them."""
    noisy, theta, clean = toy_batch(2, frames=FRAMES)
    noisy.requires_grad_()
    cache = model.new_cache(2, FRAMES, 4, 6)
    model.extend(cache, clean[:, :2])
    (full,) = torch.autograd.grad(model(noisy, theta, clean)[:, 2].square().sum(), noisy)
    (cached,) = torch.autograd.grad(model.denoise(noisy[:, 2], theta[:, 2], cache).square().sum(), noisy)
    assert_near(cached, full)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_cached_under_autocast_is_close_to_full(model: GPDiT) -> None:
    model = model.float()
    noisy, theta, clean = (x.float() for x in toy_batch(2, frames=FRAMES))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(noisy, theta, clean)
        cache = model.new_cache(2, FRAMES, 4, 6)
        assert cache._buffer.dtype == torch.bfloat16
        model.extend(cache, clean[:, :1])
        model.extend(cache, clean[:, 1:4])
        assert_near(model.denoise(noisy[:, 4], theta[:, 4], cache), expected[:, 4], 0.03)


@pytest.mark.parametrize(
    ("cache_in_autocast", "use_in_autocast"),
    [
        (True, True),
        (False, True),
        (False, False),
        (True, False),
    ],
)
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_a_cache_serves_whatever_precision_it_was_made_in(
    model: GPDiT, cache_in_autocast: bool, use_in_autocast: bool
) -> None:
    model = model.float()
    noisy, theta, clean = (x.float() for x in toy_batch(2, frames=FRAMES))
    with torch.no_grad():
        expected = model(noisy, theta, clean)[:, 2]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cache_in_autocast):
        cache = model.new_cache(2, FRAMES, 4, 6)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=use_in_autocast):
        model.extend(cache, clean[:, :2])
        assert_near(model.denoise(noisy[:, 2], theta[:, 2], cache), expected, 0.05)


@pytest.mark.parametrize(
    ("clean", "match"),
    [
        (torch.zeros(2, 6, 3, 4, 6), "room for 5 frames and holds 0"),
        (torch.zeros(1, 1, 3, 4, 6), "holds 2 clips of 4x6"),
        (torch.zeros(3, 1, 3, 4, 6), "3 of 4x6 were given"),
        (torch.zeros(2, 1, 3, 6, 4), "2 of 6x4 were given"),
        (torch.zeros(2, 1, 4, 4, 6), "C = 3"),
        (torch.zeros(2, 3, 4, 6), "takes"),
        (torch.zeros(2, 1, 3, 4, 5), "multiples of"),
    ],
    ids=lambda value: "x".join(map(str, value.shape)) if isinstance(value, Tensor) else "",
)
def test_frames_that_do_not_fit(model: GPDiT, clean: Tensor, match: str) -> None:
    cache = model.new_cache(2, FRAMES, 4, 6)
    with pytest.raises(InputError, match=match):
        model.extend(cache, clean.double())
    assert cache.frames == 0


def test_extending_by_no_frames_changes_nothing(model: GPDiT) -> None:
    _, _, clean = toy_batch(2, frames=FRAMES)
    cache = model.new_cache(2, FRAMES, 4, 6)
    model.extend(cache, clean[:, :0])
    assert cache.frames == 0


def test_room_runs_out(model: GPDiT) -> None:
    _, _, clean = toy_batch(2, frames=FRAMES)
    cache = model.new_cache(2, FRAMES, 4, 6)
    model.extend(cache, clean[:, :4])
    with pytest.raises(InputError, match="room for 5 frames and holds 4: no 2 more fit"):
        model.extend(cache, clean[:, :2])
    model.extend(cache, clean[:, 4:])
    with pytest.raises(InputError, match="max_frames"):
        model.extend(cache, clean[:, :1])
    assert cache.frames == 5


@pytest.mark.parametrize(
    ("shape", "theta_shape", "match"),
    [
        ((1, 3, 4, 6), (1,), "holds 2 clips"),
        ((2, 3, 6, 4), (2,), "2 of 6x4 were given"),
        ((2, 3, 4, 6), (2, 1), "theta has shape"),
        ((2, 3, 4, 6), (1,), "theta has shape"),
        ((2, 5, 4, 6), (2,), "C = 3"),
    ],
)
def test_questions_that_do_not_fit(
    model: GPDiT, shape: tuple[int, ...], theta_shape: tuple[int, ...], match: str
) -> None:
    cache = model.new_cache(2, FRAMES, 4, 6)
    with pytest.raises(InputError, match=match):
        model.denoise(torch.zeros(shape).double(), torch.zeros(theta_shape).double(), cache)


def test_a_full_cache_still_answers(model: GPDiT) -> None:
    """The frame after the last clean one needs no room of its own."""
    noisy, theta, clean = toy_batch(2, frames=FRAMES)
    with torch.no_grad():
        expected = model(noisy, theta, clean)[:, 4]
    cache = model.new_cache(2, 4, 4, 6)
    model.extend(cache, clean[:, :4])
    assert_near(model.denoise(noisy[:, 4], theta[:, 4], cache), expected)
