import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpdit_lightning.codecs import WanCodec, load_codec, load_codec_from_spec
from gpdit_lightning.codecs.loading import CodecNotAllowedError
from gpdit_lightning.errors import InputError


@pytest.fixture(scope="module")
def autoencoder() -> Any:
    """The class of diffusers with small random weights."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1)


def random_clip(frames: int) -> torch.Tensor:
    return torch.randint(0, 256, (1, frames, 3, 16, 24), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_shapes_of_encoding_and_decoding(autoencoder: Any) -> None:
    codec = WanCodec(autoencoder)
    latents = codec.encode(random_clip(9))
    assert latents.shape == (1, 3, 16, 2, 3)
    assert latents.dtype == torch.float32
    pixels = codec.decode(latents)
    assert pixels.shape == (1, 9, 3, 16, 24)
    assert pixels.dtype == torch.uint8


def test_latents_are_the_posterior_mode(autoencoder: Any) -> None:
    clip = random_clip(5)
    with torch.no_grad():
        posterior = autoencoder.encode(clip.permute(0, 2, 1, 3, 4).float() / 127.5 - 1).latent_dist
    codec = WanCodec(autoencoder)
    torch.testing.assert_close(codec.encode(clip), posterior.mean.permute(0, 2, 1, 3, 4))
    torch.testing.assert_close(codec.encode_posterior(clip)[1], posterior.std.permute(0, 2, 1, 3, 4))
    assert torch.equal(codec.encode(clip), codec.encode(clip))


def test_encoding_is_causal(autoencoder: Any) -> None:
    codec = WanCodec(autoencoder)
    clip = random_clip(13)
    torch.testing.assert_close(codec.encode(clip)[:, :2], codec.encode(clip[:, :5]), atol=1e-5, rtol=0)


def random_latents(frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, frames, 16, 2, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("residual", [False, True])
def test_decoding_equals_that_of_the_network(residual: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    autoencoder = diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1, is_residual=residual)
    latents = random_latents(4)
    pixels = WanCodec(autoencoder).decode(latents)
    with torch.no_grad():
        values = autoencoder.decode(latents.transpose(1, 2)).sample.transpose(1, 2)
    expected = ((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert pixels.shape == expected.shape == (2, 13, 3, 16, 24)
    assert (
        pixels.int() - expected.int()
    ).abs().max() <= 1  # the network multiplies all frames at once, which rounds differently
    assert (pixels == expected).float().mean() > 0.999


@pytest.mark.parametrize("pieces", [(5,), (1, 1, 1, 1, 1), (2, 0, 3), (0, 4, 1)])
def test_streaming_decoding_equals_decoding_at_once(autoencoder: Any, pieces: tuple[int, ...]) -> None:
    codec, latents = WanCodec(autoencoder), random_latents(5)
    decoder = codec.decoder()
    assert torch.equal(torch.cat([decoder(piece) for piece in latents.split(pieces, 1)], dim=1), codec.decode(latents))


def test_interleaved_decoders_are_independent(autoencoder: Any) -> None:
    codec, videos = WanCodec(autoencoder), [random_latents(4, seed) for seed in (0, 1)]
    decoders = [codec.decoder() for _ in videos]
    pieces: list[list[torch.Tensor]] = [[], []]
    for frames in (slice(0, 1), slice(1, 3), slice(3, 4)):
        for parts, decoder, latents in zip(pieces, decoders, videos, strict=True):
            parts.append(decoder(latents[:, frames]))
            codec.encode(random_clip(5))  # overwrites the features that the network itself caches
    for parts, latents in zip(pieces, videos, strict=True):
        assert torch.equal(torch.cat(parts, dim=1), codec.decode(latents))


def test_the_state_of_a_decoder_has_constant_size(autoencoder: Any) -> None:
    decoder = WanCodec(autoencoder).decoder()
    sizes = []
    for latent in random_latents(5).requires_grad_().split(1, dim=1):
        decoder(latent)
        features = [feature for feature in decoder._state if isinstance(feature, torch.Tensor)]
        assert not any(feature.requires_grad for feature in features)
        sizes.append(sum(feature.untyped_storage().nbytes() for feature in features))
    assert 0 < sizes[0] < sizes[2] == sizes[3] == sizes[4]


def test_the_whitening_constants_are_the_published_ones(autoencoder: Any) -> None:
    codec = WanCodec(autoencoder)
    assert codec.mean.tolist() == pytest.approx(autoencoder.config.latents_mean)
    assert codec.std.tolist() == pytest.approx(autoencoder.config.latents_std)
    assert codec.mean[0].item() == pytest.approx(-0.7571)  # Wan 2.1
    assert codec.std[0].item() == pytest.approx(2.8184)


@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_loading_from_a_folder_and_from_a_spec(autoencoder: Any, tmp_path: Path, subfolder: str) -> None:
    autoencoder.save_pretrained(tmp_path / subfolder)
    codec = load_codec("wan", str(tmp_path))
    assert torch.equal(codec.encode(random_clip(5)), WanCodec(autoencoder).encode(random_clip(5)))
    assert codec.spec().source == str(tmp_path)
    source = str(tmp_path)
    loaded = load_codec_from_spec(codec.spec(), source=source)
    assert loaded.fingerprint == codec.fingerprint == WanCodec(autoencoder).fingerprint
    with pytest.raises(InputError, match="different codecs"):
        load_codec_from_spec(replace(codec.spec(), fingerprint="0" * 16), source=source)


def test_a_missing_or_empty_folder_is_reported(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    with pytest.raises(InputError, match="absent does not exist: give an existing folder or a hub name"):
        load_codec("wan", str(tmp_path / "absent"))
    with pytest.raises(InputError, match="could not be loaded"):
        load_codec("wan", str(tmp_path))


def test_an_unreachable_hub_is_reported_at_once_with_both_cures(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The download is not attempted: without a network each of its requests is repeated for half a minute.

    The request, which may take long too, is announced.
    """
    diffusers, hub = pytest.importorskip("diffusers"), pytest.importorskip("huggingface_hub")
    caplog.set_level(logging.INFO, "gpdit_lightning")

    def unreachable(*args: Any, timeout: float, **_: Any) -> None:
        assert timeout <= 10
        assert "loading the WanVAE from the hub (owner/model), since it is not in the local cache" in caplog.messages
        raise ConnectionError("We couldn't connect\nto the hub")

    def from_pretrained(*args: Any, use_safetensors: bool, local_files_only: bool, **_: Any) -> None:
        assert use_safetensors  # no pickled weights are loaded
        assert local_files_only
        raise OSError("it is not in the local cache")

    monkeypatch.setattr(hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(diffusers.AutoencoderKLWan, "from_pretrained", from_pretrained)
    cause = r"'owner/model' could not be loaded \(the hub: We couldn't connect\): download it"
    with pytest.raises(InputError, match=f"{cause} .* --codec_source, or use .* --codec pca"):
        load_codec("wan", "owner/model")


def test_weights_in_the_local_cache_need_no_network(
    monkeypatch: pytest.MonkeyPatch, autoencoder: Any, tmp_path: Path
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    cache = tmp_path / "models--owner--model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    autoencoder.save_pretrained(cache / "snapshots" / ("0" * 40) / "vae")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, **__: pytest.fail("the hub is requested"))
    codec = load_codec("wan", "owner/model")
    assert codec.fingerprint == WanCodec(autoencoder).fingerprint
    assert load_codec_from_spec(codec.spec(), source="owner/model").fingerprint == codec.fingerprint
    with pytest.raises(CodecNotAllowedError, match=r"owner/model.*a file must not choose which files .* downloaded"):
        load_codec_from_spec(codec.spec())


def test_other_compression_factors_are_rejected() -> None:
    diffusers = pytest.importorskip("diffusers")
    half_rate = diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1, temperal_downsample=[False, False, True])
    with pytest.raises(InputError, match="time 2 times"):
        WanCodec(half_rate, "somewhere")
    patched = diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1, in_channels=12, out_channels=12, patch_size=2)
    with pytest.raises(InputError, match=r"space 16 times .* by patches of 2 pixels"):
        WanCodec(patched, "Wan 2.2")
