"""In-context tasks, compared with full forward passes and a sampler that is written out."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.codecs import Codec, load_codec
from gpdit_lightning.diffusion import RotationSampler
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation import GenerationConfig
from gpdit_lightning.generation.rollout import frame_noise
from gpdit_lightning.generation.transform import transform
from gpdit_lightning.model.kv_cache import KVCache

STEPS = 3
CONFIG = GenerationConfig(RotationSampler(STEPS))
HEIGHT, WIDTH = 32, 48

Pairs = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def codec() -> Codec:
    return load_codec("pca")


@pytest.fixture(scope="module", params=["of", "of2"])
def model(request: pytest.FixtureRequest, tiny_config: GPDiTConfig, randomise: Callable[[GPDiT], GPDiT]) -> GPDiT:
    return randomise(GPDiT(tiny_config.replaced(latent_channels=16, attention=request.param)).eval())


def images(count: int, seed: int) -> Tensor:
    """Return smooth images, (count, 3, HEIGHT, WIDTH)."""
    coarse = torch.rand(count, 3, 4, 6, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic") * 255).clamp(0, 255).byte()


def pairs(count: int = 2) -> Pairs:
    examples = images(2 * count, seed=1)
    return list(zip(examples[::2], examples[1::2], strict=True))


def reference(model: GPDiT, codec: Codec, frames: Sequence[Tensor], seed: int) -> Tensor:
    """Generate the image that follows these ones with a full forward pass per step, without cache and batch."""
    mean, std = codec.mean[:, None, None], codec.std[:, None, None]
    clean = torch.stack([(codec.encode(frame[None, None])[0, 0] - mean) / std for frame in (*frames, frames[0])])
    noisy, theta = torch.zeros_like(clean), torch.zeros(1, len(clean))  # only the last frame is generated
    noisy[-1] = frame_noise(seed, len(frames), clean.shape[1:])
    step = math.pi / 2 / STEPS
    for number in range(STEPS):
        theta[0, -1] = math.pi / 2 - number * step
        with torch.no_grad():
            velocity = model(noisy[None], theta, clean[None])[0, -1]
        noisy[-1] = math.cos(step) * noisy[-1] - math.sin(step) * velocity
    return codec.decode((noisy[-1] * std + mean)[None, None])[0, 0]


def nearly_equal(first: Tensor, second: Tensor) -> bool:
    """Return whether images are equal up to rounding."""
    return bool((first.int() - second.int()).abs().max() <= 1)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_result_equals_reference(model: GPDiT, codec: Codec, count: int) -> None:
    examples, sources = pairs(count), images(2, seed=2)
    results = transform(model, codec, examples, sources, CONFIG, seeds=5)
    assert results.shape == sources.shape
    assert results.dtype == torch.uint8
    assert results.float().std() > 10
    for source, result in zip(sources, results, strict=True):
        example_images = [image for pair in examples for image in pair]
        assert nearly_equal(result, reference(model, codec, [*example_images, source], seed=5))


def test_result_depends_on_every_example_image_and_their_order(model: GPDiT, codec: Codec) -> None:
    (a, b), (c, d) = pairs()
    (source, other), (new,) = images(2, seed=2), images(1, seed=3)

    def result(examples: Pairs, source: Tensor = source) -> Tensor:
        return transform(model, codec, examples, source[None], CONFIG)

    before = result([(a, b), (c, d)])
    changed: list[Pairs] = [
        [(new, b), (c, d)],
        [(a, new), (c, d)],
        [(a, b), (new, d)],
        [(a, b), (c, new)],
        [(c, d), (a, b)],
        [(b, a), (c, d)],
    ]
    for after in (*map(result, changed), result([(a, b), (c, d)], other)):
        assert (after.float() - before.float()).abs().mean() > 0.3


def test_result_is_independent_of_batch_composition(model: GPDiT, codec: Codec) -> None:
    examples, sources = pairs(), images(3, seed=2)
    together = transform(model, codec, examples, sources, CONFIG, seeds=4)
    for source, result in zip(sources, together, strict=True):
        assert nearly_equal(transform(model, codec, examples, source[None], CONFIG, seeds=4)[0], result)
    assert nearly_equal(transform(model, codec, examples, sources.flip(0), CONFIG, seeds=4).flip(0), together)
    twice = sources[:1].repeat(2, 1, 1, 1)
    same, different = (transform(model, codec, examples, twice, CONFIG, seeds=seeds) for seeds in (4, [4, 5]))
    assert nearly_equal(same[0], same[1])
    assert nearly_equal(different[0], same[0])
    assert not nearly_equal(different[1], same[1])


class FixedOutput(GPDiT):
    """Model whose velocity leads to fixed latents; it records the number of cached frames."""

    def __init__(self, config: GPDiTConfig, latents: Tensor) -> None:
        super().__init__(config)
        self.latents, self.cached_frames = latents, set[int]()

    def denoise(self, noisy: Tensor, theta: Tensor, cache: KVCache | None = None, *rest: Any, **more: Any) -> Tensor:
        assert cache is not None
        if rest[1] is not None:
            self.extend(cache, rest[1])
        self.cached_frames.add(cache.frames)
        angle = theta[:, None, None, None]
        return (angle.cos() * noisy - self.latents) / angle.sin()


def test_result_is_decoded_as_a_single_image(codec: Codec, tiny_config: GPDiTConfig) -> None:
    raw = codec.encode(images(2, seed=7)[:, None])
    whitened = (raw[:, 0] - codec.mean[:, None, None]) / codec.std[:, None, None]
    model = FixedOutput(tiny_config.replaced(latent_channels=16), whitened).eval()
    results = transform(model, codec, pairs(), images(2, seed=2), CONFIG)
    assert nearly_equal(results, codec.decode(raw)[:, 0])
    assert model.cached_frames == {5}


def test_invalid_examples_and_sources_are_refused(model: GPDiT, codec: Codec) -> None:
    (a, b), pair = pairs()
    with pytest.raises(InputError, match=r"example has shape \(3, 32, 40\) and a source \(3, 32, 48\)"):
        transform(model, codec, [(a, b[..., :40]), pair], images(1, seed=2), CONFIG)
    with pytest.raises(InputError, match=r"sources have shape \(3, 32, 48\): give images \(B, 3, H, W\), at least one"):
        transform(model, codec, pairs(), images(1, seed=2)[0], CONFIG)
    with pytest.raises(InputError, match="at least one"):
        transform(model, codec, pairs(), images(1, seed=2)[:0], CONFIG)
    with pytest.raises(InputError, match="give a source and its target"):
        transform(model, codec, [(*pairs(1)[0], images(1, seed=2)[0])], images(1, seed=2), CONFIG)  # type: ignore
    with pytest.raises(InputError, match="give one seed per clip"):
        transform(model, codec, [pair], images(1, seed=2), CONFIG, seeds=[0, 1])
