"""Generated pixels, compared with decoded rollouts."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.codecs import Codec, load_codec
from gpdit_lightning.diffusion import Guidance, RotationSampler, Sampler
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation import (
    ClipInputs,
    GeneratedFrames,
    GenerationConfig,
    continue_video,
    rollout,
    stream_video,
    transform,
)

STEPS = 2
CONFIG = GenerationConfig(RotationSampler(STEPS), window=2)


@pytest.fixture(scope="module")
def codec() -> Codec:
    return load_codec("pca")


@pytest.fixture(scope="module")
def model(tiny_config: GPDiTConfig, randomise: Callable[[GPDiT], GPDiT]) -> GPDiT:
    return randomise(GPDiT(tiny_config.replaced(latent_channels=16, classes=3)).eval())


def pixels(clips: int = 2, frames: int = 5, height: int = 32, width: int = 48) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (clips, frames, 3, height, width), generator=generator, dtype=torch.uint8)


def latents(codec: Codec, frames: int, channels: int = 16) -> Tensor:
    """Return raw latents of two videos, (2, F, C, 4, 6)."""
    if frames == 0 or channels != 16:
        return torch.zeros(2, frames, channels, 4, 6)
    return codec.encode(pixels(frames=codec.pixel_frames(frames)))


def joined(pieces: Sequence[GeneratedFrames]) -> tuple[Tensor, Tensor]:
    return torch.cat([piece.pixels for piece in pieces], dim=1), torch.cat([piece.latents for piece in pieces], dim=1)


@pytest.mark.parametrize(("context_frames", "frames"), [(1, 1), (1, 8), (5, 3), (5, 4), (9, 5)])
def test_requested_number_of_frames_follows_the_unchanged_context(
    model: GPDiT, codec: Codec, context_frames: int, frames: int
) -> None:
    context = pixels(frames=context_frames)
    video = continue_video(model, codec, context, frames, CONFIG)
    latent_frames = 1 + (context_frames - 1) // 4 + -(-frames // 4)
    assert video.pixels.shape == (2, context_frames + frames, 3, 32, 48)
    assert video.pixels.dtype == torch.uint8
    assert video.latents.shape == (2, latent_frames, 16, 4, 6)
    assert torch.equal(video.pixels[:, :context_frames], context)


class NotFinite(Sampler):
    def solve(self, velocity: Any, x: Tensor, angles: Sequence[float], fresh: Any) -> Tensor:
        return x / 0


def test_latents_that_are_not_finite_are_refused(model: GPDiT, codec: Codec) -> None:
    config = replace(CONFIG, sampler=NotFinite())
    with pytest.raises(InputError, match=r"not finite, because of sampler '.*NotFinite' or the weights"):
        continue_video(model, codec, pixels(), 4, config)
    with pytest.raises(InputError, match="not finite"):
        transform(model, codec, [], pixels()[:, 0], config)


@pytest.mark.parametrize("context_frames", [0, 1, 3])
def test_stream_equals_the_decoded_rollout(model: GPDiT, codec: Codec, context_frames: int) -> None:
    context, frames = latents(codec, context_frames), 12 + (context_frames == 0)
    shown, latent_frames = joined(list(stream_video(model, codec, context, frames, CONFIG, ClipInputs([7, 3]))))
    mean, std = codec.mean[:, None, None], codec.std[:, None, None]
    generated = torch.stack(
        list(rollout(model, (context - mean) / std, latent_frames.shape[1], CONFIG, ClipInputs([7, 3]))), dim=1
    )
    torch.testing.assert_close(latent_frames, generated * std + mean, rtol=0, atol=1e-6)
    decoded = codec.decode(torch.cat([context, latent_frames], dim=1))
    assert shown.shape[1] == frames
    assert torch.equal(shown, decoded[:, -frames:])
    assert shown.float().std() > 1


def test_continued_video_is_the_context_and_the_stream(model: GPDiT, codec: Codec) -> None:
    context, context_latents = pixels(), latents(codec, 2)
    inputs = ClipInputs(5, torch.tensor([2, 0]), torch.tensor([1, 1]))
    config = GenerationConfig(RotationSampler(STEPS), Guidance(label=2.0))
    video = continue_video(model, codec, context, 10, config, inputs)
    shown, latent_frames = joined(list(stream_video(model, codec, context_latents, 10, config, inputs)))
    assert torch.equal(video.pixels, torch.cat([context, shown], dim=1))
    assert torch.equal(video.latents, torch.cat([context_latents, latent_frames], dim=1))
    for name, other in (("condition", [0, 0]), ("null_condition", [-1, -1]), ("seeds", 6)):
        changed = replace(inputs, **{name: torch.tensor(other) if isinstance(other, list) else other})
        assert not torch.allclose(continue_video(model, codec, context, 10, config, changed).latents, video.latents)


@pytest.mark.parametrize(
    ("context_frames", "frames", "lengths"),
    [(2, 8, [4, 4]), (2, 6, [4, 2]), (0, 1, [1]), (0, 5, [1, 4]), (0, 7, [1, 4, 2]), (1, 0, []), (0, 0, [])],
)
def test_surplus_frames_of_the_last_latent_frame_are_dropped(
    model: GPDiT, codec: Codec, context_frames: int, frames: int, lengths: list[int]
) -> None:
    pieces = list(stream_video(model, codec, latents(codec, context_frames), frames, CONFIG))
    assert [piece.pixels.shape for piece in pieces] == [(2, length, 3, 32, 48) for length in lengths]
    assert [piece.latents.shape for piece in pieces] == [(2, 1, 16, 4, 6)] * len(lengths)
    whole = list(stream_video(model, codec, latents(codec, context_frames), 13, CONFIG))
    for piece, long in zip(pieces, whole, strict=False):
        assert torch.equal(piece.pixels, long.pixels[:, : piece.pixels.shape[1]])
        assert torch.equal(piece.latents, long.latents)


def test_stream_computes_and_keeps_one_frame_at_a_time(
    model: GPDiT, codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    denoise = model.denoise

    def counted(*arguments: Any, **options: Any) -> Tensor:
        calls.append(None)
        return denoise(*arguments, **options)

    monkeypatch.setattr(model, "denoise", counted)
    stream, alive = stream_video(model, codec, latents(codec, 1), 10**9, CONFIG), list[weakref.ref[Tensor]]()
    for number in range(1, 6):
        alive += map(weakref.ref, next(stream))
        assert len(calls) == number * STEPS
        assert not any(tensor() is not None for tensor in alive[:-2])  # the latest piece is in use


def test_progress_bar_changes_nothing(model: GPDiT, codec: Codec, capsys: pytest.CaptureFixture[str]) -> None:
    silent = continue_video(model, codec, pixels(), 8, CONFIG)
    assert capsys.readouterr().err == ""
    shown = continue_video(model, codec, pixels(), 8, CONFIG, progress=True)
    assert "2/2" in capsys.readouterr().err
    assert torch.equal(silent.pixels, shown.pixels)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (pixels(frames=4), "the number of pixel frames is 4, which is not 1 "),
        (pixels(height=36), "36x48 pixels are not multiples of 8"),
        (pixels(height=40), "do not divide into 2x2 patches"),
        (pixels().float(), "convert them"),
    ],
)
def test_mismatched_context_is_refused(model: GPDiT, codec: Codec, context: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        continue_video(model, codec, context, 4, CONFIG)


@pytest.mark.parametrize("context_frames", [0, 1])
def test_latents_of_another_codec_are_refused(model: GPDiT, codec: Codec, context_frames: int) -> None:
    with pytest.raises(InputError, match=r"takes \(B, F, 16, h, w\)"):
        next(stream_video(model, codec, latents(codec, context_frames, channels=4), 4, CONFIG))
