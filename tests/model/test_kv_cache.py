"""Frame-by-frame generation with cached keys and values equals the full forward."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gpdit_lightning import GPDiT, InputError
from gpdit_lightning.diffusion import RotationSampler
from gpdit_lightning.generation import GenerationConfig
from gpdit_lightning.generation import rollout as generate
from gpdit_lightning.model import KVCache
from gpdit_lightning.model.positions import shift_frames
from tests.model.toys import assert_near, toy_batch, toy_config, toy_model

VARIANTS = ("of2", "of")
FRAMES = 5


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> GPDiT:
    return toy_model(attention=request.param, layers=3)


def rollout(model: GPDiT, batch: tuple[Tensor, Tensor, Tensor], steps: list[int]) -> KVCache:
    """Extend a cache by `steps` frames at a time and check the velocity of each frame that follows."""
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


@pytest.mark.parametrize("steps", [[1, 1, 1, 1, 1], [4], [1, 3, 1]], ids=str)
def test_denoised_frames_equal_the_full_forward(model: GPDiT, steps: list[int]) -> None:
    rollout(model, toy_batch(2, frames=FRAMES), steps)


@pytest.mark.parametrize("site", ["branch_inverse", "input", "residual", "none"])
def test_at_every_time_site(site: str) -> None:
    rollout(toy_model(time_site=site), toy_batch(2, frames=FRAMES), [1, 2, 1])


def test_the_first_frame_is_denoised_without_a_cache(model: GPDiT) -> None:
    noisy, theta, clean = toy_batch(2, frames=FRAMES)
    with torch.no_grad():
        expected = model(noisy, theta, clean)[:, 0]
        empty = model.denoise(noisy[:, 0], theta[:, 0], model.new_cache(2, FRAMES, 4, 6))
        none = model.denoise(noisy[:, 0], theta[:, 0], None)
    assert_near(none, expected)
    assert torch.equal(empty, none)


def test_without_a_cache_every_frame_is_a_first_frame(model: GPDiT) -> None:
    """RoPE is relative, so a frame without context is the same at every position."""
    noisy, theta, _ = toy_batch(2, frames=FRAMES)
    with torch.no_grad():
        expected = model(noisy, theta, None)
    for frame in range(FRAMES):
        assert_near(model.denoise(noisy[:, frame], theta[:, frame]), expected[:, frame])


def test_denoise_does_not_change_the_cache(model: GPDiT) -> None:
    noisy, theta, clean = toy_batch(2, frames=FRAMES)
    cache = model.new_cache(2, FRAMES, 4, 6)
    model.extend(cache, clean[:, :2])
    first = model.denoise(noisy[:, 2], theta[:, 2], cache)
    model.denoise(noisy[:, 3], theta[:, 0], cache)  # another frame in between
    assert torch.equal(model.denoise(noisy[:, 2], theta[:, 2], cache), first)
    assert cache.frames == 2
    model.extend(cache, clean[:, 2:3])
    with torch.no_grad():
        expected = model(noisy, theta, clean)[:, 3]
    assert_near(model.denoise(noisy[:, 3], theta[:, 3], cache), expected)


def test_unwritten_capacity_is_never_read(model: GPDiT) -> None:
    noisy, theta, clean = toy_batch(2, frames=FRAMES)
    velocities = []
    for unwritten in (torch.nan, 1e30):
        cache = model.new_cache(2, FRAMES + 3, 4, 6)
        cache._buffer.fill_(unwritten)
        model.extend(cache, clean[:, :1])
        model.extend(cache, clean[:, 1:3])
        velocities.append(model.denoise(noisy[:, 3], theta[:, 3], cache))
    assert velocities[0].isfinite().all()
    assert torch.equal(*velocities)


def test_denoise_gradients_equal_those_of_the_full_forward(model: GPDiT) -> None:
    """Distillation and guidance differentiate through the noisy frame; the cache is a constant for them."""
    noisy, theta, clean = toy_batch(2, frames=FRAMES)
    noisy.requires_grad_()
    cache = model.new_cache(2, FRAMES, 4, 6)
    model.extend(cache, clean[:, :2])
    (full,) = torch.autograd.grad(model(noisy, theta, clean)[:, 2].square().sum(), noisy)
    (cached,) = torch.autograd.grad(model.denoise(noisy[:, 2], theta[:, 2], cache).square().sum(), noisy)
    assert_near(cached, full)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_cached_passes_under_autocast_are_close_to_the_full_forward(model: GPDiT) -> None:
    model = model.float()
    noisy, theta, clean = (x.float() for x in toy_batch(2, frames=FRAMES))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(noisy, theta, clean)
        cache = model.new_cache(2, FRAMES, 4, 6)
        assert cache._buffer.dtype == torch.bfloat16
        model.extend(cache, clean[:, :1])
        model.extend(cache, clean[:, 1:4])
        assert_near(model.denoise(noisy[:, 4], theta[:, 4], cache), expected[:, 4], 0.03)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_a_cache_can_be_used_in_another_precision(model: GPDiT) -> None:
    model = model.float()
    noisy, theta, clean = (x.float() for x in toy_batch(2, frames=FRAMES))
    with torch.no_grad():
        expected = model(noisy, theta, clean)[:, 2]
    for made_in_autocast, used_in_autocast in ((True, False), (False, True)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=made_in_autocast):
            cache = model.new_cache(2, FRAMES, 4, 6)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=used_in_autocast):
            model.extend(cache, clean[:, :2])
            assert_near(model.denoise(noisy[:, 2], theta[:, 2], cache), expected, 0.05)


@pytest.mark.parametrize(
    ("clean", "match"),
    [
        (torch.zeros(2, 6, 3, 4, 6), "capacity of 5 frames and contains 0: 6 more do not fit"),
        (torch.zeros(1, 1, 3, 4, 6), "is for 2 clips of 4x6"),
        (torch.zeros(3, 1, 3, 4, 6), "3 of 4x6 were given"),
        (torch.zeros(2, 1, 3, 6, 4), "2 of 6x4 were given"),
        (torch.zeros(2, 1, 4, 4, 6), "C = 3"),
        (torch.zeros(2, 3, 4, 6), "takes"),
        (torch.zeros(2, 1, 3, 4, 5), "multiples of"),
    ],
    ids=lambda value: "x".join(map(str, value.shape)) if isinstance(value, Tensor) else "",
)
def test_frames_that_do_not_fit(clean: Tensor, match: str) -> None:
    model = toy_model()
    cache = model.new_cache(2, FRAMES, 4, 6)
    with pytest.raises(InputError, match=match):
        model.extend(cache, clean.double())
    assert cache.frames == 0


def test_extending_by_no_frames_changes_nothing() -> None:
    model, (_, _, clean) = toy_model(), toy_batch(2, frames=FRAMES)
    cache = model.new_cache(2, FRAMES, 4, 6)
    model.extend(cache, clean[:, :0])
    assert cache.frames == 0


def test_more_frames_than_the_capacity_are_refused() -> None:
    model, (_, _, clean) = toy_model(), toy_batch(2, frames=FRAMES)
    cache = model.new_cache(2, FRAMES, 4, 6)
    model.extend(cache, clean[:, :4])
    with pytest.raises(InputError, match="capacity of 5 frames and contains 4: 2 more do not fit"):
        model.extend(cache, clean[:, :2])
    model.extend(cache, clean[:, 4:])
    with pytest.raises(InputError, match="max_frames"):
        model.extend(cache, clean[:, :1])
    assert cache.frames == 5


@pytest.mark.parametrize(
    ("shape", "theta_shape", "match"),
    [
        ((1, 3, 4, 6), (1,), "noisy has 1 rows for draws \\* B = 1 \\* 2"),
        ((2, 3, 6, 4), (2,), "2 of 6x4 were given"),
        ((2, 3, 4, 6), (2, 1), "theta has shape"),
        ((2, 3, 4, 6), (1,), "theta has shape"),
        ((2, 5, 4, 6), (2,), "C = 3"),
    ],
)
def test_noisy_frames_that_do_not_fit(shape: tuple[int, ...], theta_shape: tuple[int, ...], match: str) -> None:
    model = toy_model()
    cache = model.new_cache(2, FRAMES, 4, 6)
    with pytest.raises(InputError, match=match):
        model.denoise(torch.zeros(shape).double(), torch.zeros(theta_shape).double(), cache)


def test_the_frame_after_a_full_cache_can_be_denoised(model: GPDiT) -> None:
    """A noisy frame needs no capacity."""
    noisy, theta, clean = toy_batch(2, frames=FRAMES)
    with torch.no_grad():
        expected = model(noisy, theta, clean)[:, 4]
    cache = model.new_cache(2, 4, 4, 6)
    model.extend(cache, clean[:, :4])
    assert_near(model.denoise(noisy[:, 4], theta[:, 4], cache), expected)


def rolled(model: GPDiT, clean: Tensor, capacity: int, sinks: int, by_denoise: bool) -> KVCache:
    """A rolling cache with `clean` appended frame by frame, by `extend` or by `denoise`."""
    cache = model.new_cache(len(clean), capacity, 4, 6, sinks)
    for frame in range(clean.shape[1]):
        if by_denoise:
            noisy = torch.randn(len(clean), 3, 4, 6, dtype=torch.float64)
            model.denoise(noisy, noisy.new_ones(len(clean)), cache, clean=clean[:, frame : frame + 1])
        else:
            model.extend(cache, clean[:, frame : frame + 1])
    return cache


@pytest.mark.parametrize(("frames", "sinks"), [(2, 1), (5, 0), (9, 0), (9, 2)])
def test_extend_and_denoise_append_the_same(model: GPDiT, frames: int, sinks: int) -> None:
    _, _, clean = toy_batch(2, frames=frames)
    extended, denoised = (rolled(model, clean, 4, sinks, by_denoise) for by_denoise in (False, True))
    at_once = model.new_cache(2, 4, 4, 6, sinks)
    model.extend(at_once, clean)
    stored = min(frames, 4) * extended.tokens
    for other in (denoised, at_once):
        assert other.frames == frames
        assert_near(other._buffer[:, :, :, :stored], extended._buffer[:, :, :, :stored])


def test_shifting_sinks_does_not_accumulate_rounding_errors() -> None:
    """In float32: the sinks equal those that are shifted once from their original positions."""
    frames, model = 40, toy_model(layers=3).float()
    _, _, clean = toy_batch(1, frames=1)
    cache = rolled(model, clean.float().expand(-1, frames, -1, -1, -1), 2, 1, by_denoise=False)
    key = cache._buffer[:, 0, :, : cache.tokens]
    written = rolled(model, clean.float(), 2, 1, by_denoise=False)._buffer[:, 0, :, : cache.tokens]
    expected = shift_frames(model.config, written, frames - 2)
    assert_near(key, expected, tolerance=1e-5)
    at_first, expected_at_first = (shift_frames(model.config, keys, 2 - frames) for keys in (key, expected))
    assert_near(expected_at_first, at_first, tolerance=1e-5)


def test_rows_share_a_context_or_have_none(model: GPDiT) -> None:
    noisy, theta, clean = toy_batch(6, 2, frames=3)
    with torch.no_grad():
        expected = model(noisy, theta, clean, draws=2)[:, 2]
    cache = model.new_cache(2, 3, 4, 6)
    model.extend(cache, clean[:, :1])
    # Without a cache all frames before are given.
    for cache_or_none, before in ((cache, clean[:, 1:2]), (None, clean[:, :2])):
        velocity = model.denoise(noisy[:, 2], theta[:, 2], cache_or_none, clean=before, draws=2)
        assert_near(velocity, expected)
    assert cache.frames == 2
    assert_near(model.denoise(noisy[:, 2], theta[:, 2], cache, draws=2), expected)
    # No row is without context.
    assert_near(model.denoise(noisy[:4, 2], theta[:4, 2], cache, draws=2), expected[:4])


def test_a_rolling_cache_does_not_grow() -> None:
    model = toy_model()
    cache = model.new_cache(1, 3, 4, 6, sinks=1)
    before = cache._buffer.data_ptr(), cache._buffer.shape
    for _ in range(20):
        model.extend(cache, torch.randn(1, 1, 3, 4, 6, dtype=torch.float64))
    assert (cache._buffer.data_ptr(), cache._buffer.shape) == before
    assert cache.frames == 20


@pytest.mark.parametrize("sinks", [3, -1])
def test_a_rolling_cache_needs_a_window(sinks: int) -> None:
    with pytest.raises(InputError, match=f"cache of 3 frames has no room for {sinks} sinks"):
        toy_model().new_cache(1, 3, 4, 6, sinks)


def test_clean_frames_that_denoise_cannot_append_are_refused() -> None:
    model, (noisy, theta, clean) = toy_model(), toy_batch(2, frames=3)
    full, rolling = model.new_cache(2, 2, 4, 6), model.new_cache(2, 2, 4, 6, sinks=0)
    model.extend(full, clean[:, :2])
    model.extend(rolling, clean[:, :2])
    for cache, given, message in (
        (full, clean[:, 2:], "1 more do not fit"),
        (rolling, clean[:, :2], "2 more do not fit"),
        (rolling, clean[:1, 2:], "the cache is for 2 clips of 4x6 latent pixels, but 1 of"),
        (None, clean[:, :2, :, :2], "clean has shape"),
    ):
        with pytest.raises(InputError, match=message):
            model.denoise(noisy[:, 2], theta[:, 2], cache, clean=given)


@pytest.mark.parametrize(
    ("rows", "draws", "match"),
    [
        (4, 0, "draws is 0; it must be an integer of at least 1"),
        (4, 1.5, "draws is 1.5; it must be an integer of at least 1"),
        (3, 2, r"noisy has 3 rows for draws \* B = 2 \* 2 rows with context"),
        (5, 2, r"noisy has 5 rows for draws \* B = 2 \* 2 rows with context"),
        (3, 1, r"noisy has 3 rows for draws \* B = 1 \* 2 rows with context"),
    ],
)
def test_draws_that_do_not_fit_the_rows_are_refused(rows: int, draws: Any, match: str) -> None:
    model, (noisy, theta, clean) = toy_model(), toy_batch(rows, 2, frames=3)
    cache = model.new_cache(2, 2, 4, 6)
    for context in ({"cache": cache}, {"clean": clean[:, :2]}, {"cache": cache, "clean": clean[:, :1]}):
        with pytest.raises(InputError, match=match):
            model.denoise(noisy[:, 2], theta[:, 2], **context, draws=draws)
    assert cache.frames == 0


@pytest.mark.parametrize(
    ("size", "match"),
    [
        ((0, 3, 4, 6), "batch_size of the cache is 0"),
        ((2, 0, 4, 6), "max_frames of the cache is 0"),
        ((2, 3, 5, 6), "height of the cache is 5; it must be a positive multiple of 2"),
        ((2, 3, 4, 0), "width of the cache is 0"),
    ],
)
def test_a_cache_of_an_impossible_size_is_refused(size: tuple[int, int, int, int], match: str) -> None:
    with pytest.raises(InputError, match=match):
        toy_model().new_cache(*size)


def test_the_cache_of_another_model_is_refused() -> None:
    model, cache, (noisy, theta, clean) = toy_model(), toy_model(layers=3).new_cache(2, 3, 4, 6), toy_batch(2, frames=2)
    for call in (lambda: model.extend(cache, clean), lambda: model.denoise(noisy[:, 0], theta[:, 0], cache)):
        with pytest.raises(InputError, match="the cache is that of a model with another architecture"):
            call()


def test_latents_that_are_not_floating_point_are_refused() -> None:
    model, (noisy, theta, _) = toy_model(), toy_batch(2, frames=2)
    for call in (lambda: model(noisy.byte(), theta), lambda: model.features(noisy.byte(), [1])):
        with pytest.raises(
            InputError, match=r"latents have dtype torch\.uint8; this model takes whitened floating-point"
        ):
            call()


@pytest.mark.parametrize("sinks", [None, 1])
@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
def test_shapes_of_a_rollout_on_the_meta_device(sinks: int | None, autocast_dtype: torch.dtype | None) -> None:
    """Without memory for weights, caches and latents, also of a model that requests xformers."""
    with torch.device("meta"):
        model = GPDiT(toy_config(attention_backend="xformers"))
    cache = model.new_cache(2, 3, 4, 6, sinks)
    assert (cache.device.type, cache._buffer.dtype) == ("meta", torch.float32)
    clean, noisy = torch.empty(2, 2, 3, 4, 6, device="meta"), torch.empty(4, 3, 4, 6, device="meta")
    model.extend(cache, clean)
    assert model.denoise(noisy, torch.empty(4, device="meta"), cache, clean=clean[:, :1], draws=2).shape == noisy.shape
    assert cache.frames == 3
    config = GenerationConfig(RotationSampler(2), window=2, sinks=1, autocast_dtype=autocast_dtype)
    frames = list(generate(model.eval(), clean, 4, config))
    assert [(frame.device.type, frame.shape) for frame in frames] == [("meta", clean[:, 0].shape)] * 4
