"""A task shown by examples, against the network's full forward pass and a sampler written out by hand."""

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


def pictures(count: int, seed: int) -> Tensor:
    """Smooth ones: (count, 3, HEIGHT, WIDTH)."""
    coarse = torch.rand(count, 3, 4, 6, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic") * 255).clamp(0, 255).byte()


def pairs(count: int = 2) -> Pairs:
    shown = pictures(2 * count, seed=1)
    return list(zip(shown[::2], shown[1::2], strict=True))


def by_hand(model: GPDiT, codec: Codec, frames: Sequence[Tensor], seed: int) -> Tensor:
    """The picture that follows these ones: each step a whole forward pass, without cache and batch."""
    mean, std = codec.mean[:, None, None], codec.std[:, None, None]
    clean = torch.stack([(codec.encode(frame[None, None])[0, 0] - mean) / std for frame in (*frames, frames[0])])
    noisy, theta = torch.zeros_like(clean), torch.zeros(1, len(clean))  # only the last one is asked for
    noisy[-1] = frame_noise(seed, len(frames), clean.shape[1:])
    step = math.pi / 2 / STEPS
    for number in range(STEPS):
        theta[0, -1] = math.pi / 2 - number * step
        with torch.no_grad():
            velocity = model(noisy[None], theta, clean[None])[0, -1]
        noisy[-1] = math.cos(step) * noisy[-1] - math.sin(step) * velocity
    return codec.decode((noisy[-1] * std + mean)[None, None])[0, 0]


def alike(first: Tensor, second: Tensor) -> bool:
    """Whether pictures are equal but for values that round to the other side."""
    return bool((first.int() - second.int()).abs().max() <= 1)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_the_result_follows_source_target_source_target_source(model: GPDiT, codec: Codec, count: int) -> None:
    examples, sources = pairs(count), pictures(2, seed=2)
    made = transform(model, codec, examples, sources, CONFIG, seeds=5)
    assert made.shape == sources.shape
    assert made.dtype == torch.uint8
    assert made.float().std() > 10
    for source, picture in zip(sources, made, strict=True):
        shown = [picture for pair in examples for picture in pair]
        assert alike(picture, by_hand(model, codec, [*shown, source], seed=5))


def test_every_picture_of_the_context_matters_and_so_does_its_place(model: GPDiT, codec: Codec) -> None:
    (a, b), (c, d) = pairs()
    (source, other), (new,) = pictures(2, seed=2), pictures(1, seed=3)

    def made(examples: Pairs, source: Tensor = source) -> Tensor:
        return transform(model, codec, examples, source[None], CONFIG)

    before = made([(a, b), (c, d)])
    changed: list[Pairs] = [
        [(new, b), (c, d)],
        [(a, new), (c, d)],
        [(a, b), (new, d)],
        [(a, b), (c, new)],
        [(c, d), (a, b)],
        [(b, a), (c, d)],
    ]
    for after in (*map(made, changed), made([(a, b), (c, d)], other)):
        assert (after.float() - before.float()).abs().mean() > 0.3


def test_a_result_depends_on_its_source_and_seed_and_not_on_the_batch(model: GPDiT, codec: Codec) -> None:
    examples, sources = pairs(), pictures(3, seed=2)
    together = transform(model, codec, examples, sources, CONFIG, seeds=4)
    for source, picture in zip(sources, together, strict=True):
        assert alike(transform(model, codec, examples, source[None], CONFIG, seeds=4)[0], picture)
    assert alike(transform(model, codec, examples, sources.flip(0), CONFIG, seeds=4).flip(0), together)
    twice = sources[:1].repeat(2, 1, 1, 1)
    same, different = (transform(model, codec, examples, twice, CONFIG, seeds=seeds) for seeds in (4, [4, 5]))
    assert alike(same[0], same[1])
    assert alike(different[0], same[0])
    assert not alike(different[1], same[1])


class Puppet(GPDiT):
    """Gives the latents it is told to, and notes how many clean frames it has taken in."""

    def __init__(self, config: GPDiTConfig, answer: Tensor) -> None:
        super().__init__(config)
        self.answer, self.seen = answer, set[int]()

    def denoise(self, noisy: Tensor, theta: Tensor, cache: KVCache | None = None, *rest: Any, **more: Any) -> Tensor:
        assert cache is not None
        if rest[1] is not None:
            self.extend(cache, rest[1])
        self.seen.add(cache.frames)
        angle = theta[:, None, None, None]
        return (angle.cos() * noisy - self.answer) / angle.sin()


def test_what_the_model_gives_is_decoded_as_a_picture_alone(codec: Codec, tiny_config: GPDiTConfig) -> None:
    raw = codec.encode(pictures(2, seed=7)[:, None])
    white = (raw[:, 0] - codec.mean[:, None, None]) / codec.std[:, None, None]
    puppet = Puppet(tiny_config.replaced(latent_channels=16), white).eval()
    made = transform(puppet, codec, pairs(), pictures(2, seed=2), CONFIG)
    assert alike(made, codec.decode(raw)[:, 0])
    assert puppet.seen == {5}


def test_what_is_no_context_is_refused(model: GPDiT, codec: Codec) -> None:
    (a, b), pair = pairs()
    with pytest.raises(InputError, match=r"example has shape \(3, 32, 40\) and a source \(3, 32, 48\)"):
        transform(model, codec, [(a, b[..., :40]), pair], pictures(1, seed=2), CONFIG)
    with pytest.raises(InputError, match=r"sources have shape \(3, 32, 48\): give images \(B, 3, H, W\), at least one"):
        transform(model, codec, pairs(), pictures(1, seed=2)[0], CONFIG)
    with pytest.raises(InputError, match="at least one"):
        transform(model, codec, pairs(), pictures(1, seed=2)[:0], CONFIG)
    with pytest.raises(InputError, match="give pairs of a source and its target"):
        transform(model, codec, [(*pairs(1)[0], pictures(1, seed=2)[0])], pictures(1, seed=2), CONFIG)  # type: ignore
    with pytest.raises(InputError, match="give one seed per clip"):
        transform(model, codec, [pair], pictures(1, seed=2), CONFIG, seeds=[0, 1])
