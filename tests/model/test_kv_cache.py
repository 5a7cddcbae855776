"""Frame-by-frame generation with cached keys and values equals the full forward."""

import pytest
import torch
from torch import Tensor

from gpdit_lightning import GPDiT, InputError
from gpdit_lightning.model import KVCache
from gpdit_lightning.model.positions import shift_frames
from tests.model.toys import assert_near, toy_batch, toy_model

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


def rolled(model: GPDiT, clean: Tensor, room: int, sinks: int, folded: bool) -> KVCache:
    """A rolling cache that has taken in `clean`, frame after frame, with passes of their own or in those of others."""
    cache = model.new_cache(len(clean), room, 4, 6, sinks)
    for frame in range(clean.shape[1]):
        if folded:
            noisy = torch.randn(len(clean), 3, 4, 6, dtype=torch.float64)
            model.denoise(noisy, noisy.new_ones(len(clean)), cache, clean=clean[:, frame : frame + 1])
        else:
            model.extend(cache, clean[:, frame : frame + 1])
    return cache


@pytest.mark.parametrize("sinks", [0, 1, 2])
@pytest.mark.parametrize("frames", [2, 5, 9])
def test_a_frame_taken_in_on_the_way_leaves_the_same_cache(model: GPDiT, frames: int, sinks: int) -> None:
    _, _, clean = toy_batch(2, frames=frames)
    alone, folded = (rolled(model, clean, 4, sinks, folded) for folded in (False, True))
    at_once = model.new_cache(2, 4, 4, 6, sinks)
    model.extend(at_once, clean)
    held = min(frames, 4) * alone.tokens
    for other in (folded, at_once):
        assert other.frames == frames
        assert_near(other._buffer[:, :, :, :held], alone._buffer[:, :, :, :held])


@pytest.mark.parametrize("frames", [3, 40])
def test_sinks_are_turned_along_without_adding_up_errors(model: GPDiT, frames: int) -> None:
    """In half precision: as if they had been turned once, from where they were written."""
    model = model.float()
    _, _, clean = toy_batch(1, frames=1)
    cache = rolled(model, clean.float().expand(-1, frames, -1, -1, -1), 2, 1, folded=False)
    key = cache._buffer[:, 0, :, : cache.tokens]
    expected = shift_frames(
        model.config, rolled(model, clean.float(), 2, 1, False)._buffer[:, 0, :, : cache.tokens], frames - 2
    )
    assert_near(key, expected, tolerance=1e-5)
    at_first, expected_at_first = (shift_frames(model.config, keys, 2 - frames) for keys in (key, expected))
    assert_near(expected_at_first, at_first, tolerance=1e-5)


def test_rows_share_a_context_or_have_none(model: GPDiT) -> None:
    noisy, theta, clean = toy_batch(6, 2, frames=3)
    with torch.no_grad():
        expected = model(noisy, theta, clean, draws=2)[:, 2]
    cache = model.new_cache(2, 3, 4, 6)
    model.extend(cache, clean[:, :1])
    for place in (cache, None):  # without a cache all frames before are given
        before = clean[:, 1:2] if place is not None else clean[:, :2]
        velocity = model.denoise(noisy[:, 2], theta[:, 2], place, clean=before, draws=2, without_context=2)
        assert_near(velocity, expected)
    assert cache.frames == 2
    assert_near(model.denoise(noisy[:, 2], theta[:, 2], cache, draws=2, without_context=2), expected)


def test_a_rolling_cache_holds_no_more_than_its_room(model: GPDiT) -> None:
    cache = model.new_cache(1, 3, 4, 6, sinks=1)
    before = cache._buffer.data_ptr(), cache._buffer.shape
    for _ in range(20):
        model.extend(cache, torch.randn(1, 1, 3, 4, 6, dtype=torch.float64))
    assert (cache._buffer.data_ptr(), cache._buffer.shape) == before
    assert cache.frames == 20


@pytest.mark.parametrize("sinks", [3, 4, -1])
def test_a_rolling_cache_needs_a_window(model: GPDiT, sinks: int) -> None:
    with pytest.raises(InputError, match=f"cache of 3 frames has no room for {sinks} sinks"):
        model.new_cache(1, 3, 4, 6, sinks)


def test_frames_that_do_not_fit_are_refused(model: GPDiT) -> None:
    noisy, theta, clean = toy_batch(2, frames=3)
    full, rolling = model.new_cache(2, 2, 4, 6), model.new_cache(2, 2, 4, 6, sinks=0)
    model.extend(full, clean[:, :2])
    model.extend(rolling, clean[:, :2])
    for cache, given, message in (
        (full, clean[:, 2:], "no 1 more fit"),
        (rolling, clean[:, :2], "no 2 more fit at once"),
        (rolling, clean[:1, 2:], "clean has shape"),
        (None, clean[:, :2, :, :2], "clean has shape"),
    ):
        with pytest.raises(InputError, match=message):
            model.denoise(noisy[:, 2], theta[:, 2], cache, clean=given)
    with pytest.raises(InputError, match="the cache holds 2 clips"):
        model.denoise(noisy[:1, 2], theta[:1, 2], full)
    with pytest.raises(InputError, match="the cache holds 2 clips"):
        model.denoise(noisy[:, 2], theta[:, 2], full, without_context=1)
