from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.codecs import Codec, load_codec
from gpdit_lightning.diffusion import RotationSampler
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation import continue_video, rollout

SAMPLER = RotationSampler(steps=2)


@pytest.fixture(scope="module")
def codec() -> Codec:
    return load_codec("pca")


@pytest.fixture(scope="module")
def model(tiny_config: GPDiTConfig, randomise: Callable[[GPDiT], GPDiT]) -> GPDiT:
    return randomise(GPDiT(tiny_config.replaced(latent_channels=16)).eval())


def pixels(clips: int = 2, frames: int = 5, height: int = 32, width: int = 48) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (clips, frames, 3, height, width), generator=generator, dtype=torch.uint8)


def whitened(codec: Codec, values: Tensor) -> Tensor:
    return (codec.encode(values) - codec.mean[:, None, None]) / codec.std[:, None, None]


@pytest.mark.parametrize("known", [1, 5, 9])
@pytest.mark.parametrize("frames", [1, 3, 4, 5, 8])
def test_as_many_frames_as_asked_follow_the_untouched_context(
    model: GPDiT, codec: Codec, known: int, frames: int
) -> None:
    context = pixels(frames=known)
    video = continue_video(model, codec, context, frames, SAMPLER)
    latent_frames = 1 + (known - 1) // 4 + -(-frames // 4)
    assert video.pixels.shape == (2, known + frames, 3, 32, 48)
    assert video.pixels.dtype == torch.uint8
    assert video.latents.shape == (2, latent_frames, 16, 4, 6)
    assert torch.equal(video.pixels[:, :known], context)


def test_surplus_frames_are_dropped_from_the_end(model: GPDiT, codec: Codec) -> None:
    short, long = (continue_video(model, codec, pixels(), frames, SAMPLER).pixels for frames in (6, 8))
    assert torch.equal(short, long[:, : 5 + 6])


def test_the_latents_are_those_of_the_context_and_of_the_rollout(model: GPDiT, codec: Codec) -> None:
    context = pixels()
    video = continue_video(model, codec, context, 8, SAMPLER, seed=4)
    known = whitened(codec, context)
    torch.testing.assert_close(video.latents[:, :2], known, rtol=0, atol=1e-6)
    generated = torch.stack(list(rollout(model, SAMPLER, known, 2, seed=4)), dim=1)
    torch.testing.assert_close(video.latents[:, 2:], generated, rtol=0, atol=1e-6)


def test_the_pixels_are_the_decoded_latents(model: GPDiT, codec: Codec) -> None:
    video = continue_video(model, codec, pixels(), 8, SAMPLER)
    decoded = codec.decode(video.latents * codec.std[:, None, None] + codec.mean[:, None, None])
    assert torch.equal(video.pixels[:, 5:], decoded[:, 5:])
    assert video.pixels[:, 5:].float().std() > 1


def test_the_seed_gives_the_video(model: GPDiT, codec: Codec) -> None:
    first, again, other = (continue_video(model, codec, pixels(), 4, SAMPLER, seed).latents for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_the_progress_bar_changes_nothing(model: GPDiT, codec: Codec, capsys: pytest.CaptureFixture[str]) -> None:
    silent = continue_video(model, codec, pixels(), 8, SAMPLER)
    assert capsys.readouterr().err == ""
    shown = continue_video(model, codec, pixels(), 8, SAMPLER, progress=True)
    assert "2/2" in capsys.readouterr().err
    assert torch.equal(silent.pixels, shown.pixels)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (pixels(frames=4), "4 pixel frames are not 1 "),
        (pixels(height=36), "The height 36"),
        (pixels(height=40), "do not divide into 2x2 patches"),
        (pixels().float(), "convert them"),
    ],
)
def test_a_context_that_does_not_suit_is_refused(model: GPDiT, codec: Codec, context: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        continue_video(model, codec, context, 4, SAMPLER)
