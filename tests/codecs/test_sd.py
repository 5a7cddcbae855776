"""The codec `sd` against diffusers called directly."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpdit_lightning.codecs import SdCodec, load_codec, load_codec_from_spec
from gpdit_lightning.errors import InputError
from tests.codecs.small_sd import small_autoencoder

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def autoencoder() -> Any:
    return small_autoencoder()


def random_clip(frames: int, clips: int = 1) -> Tensor:
    numbers = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (clips, frames, 3, 16, 24), generator=numbers).to(torch.uint8)


def test_posterior_scaling_and_decoding_are_those_of_diffusers(autoencoder: Any) -> None:
    """Each frame of a clip by itself, as diffusers' pipelines scale, unscale and decode an image."""
    codec, clip = SdCodec(autoencoder), random_clip(3, clips=2)
    assert codec.spec().latent_channels == 4
    assert (codec.spatial_factor, codec.temporal_factor) == (8, 1)
    mean, std = codec.encode_posterior(clip)
    assert torch.equal(codec.encode(clip), mean)
    assert mean.shape == std.shape == (2, 3, 4, 2, 3)
    whitened = codec.whitened(mean)
    decoded = codec.decode(mean)
    assert decoded.shape == clip.shape
    for number in range(3):
        with torch.no_grad():
            posterior = autoencoder.encode(clip[:, number].float() / 127.5 - 1).latent_dist
            values = autoencoder.decode(whitened[:, number] / autoencoder.config.scaling_factor).sample
        torch.testing.assert_close(mean[:, number], posterior.mean)
        torch.testing.assert_close(std[:, number], posterior.std)
        torch.testing.assert_close(whitened[:, number], posterior.mean * 0.18215)
        pixels = ((values / 2 + 0.5).clamp(0, 1) * 255).round().int()
        assert (decoded[:, number].int() - pixels).abs().max() <= 1
        assert (decoded[:, number].int() == pixels).float().mean() > 0.999


@pytest.mark.parametrize(
    ("config", "mean", "std"),
    [
        ({}, [0.0] * 4, [1 / 0.18215] * 4),
        ({"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}, [0.0609] * 16, [1 / 1.5305] * 16),
        (
            {"latents_mean": [1.0, -2.0, 3.0, 0.5], "latents_std": [2.0, 4.0, 8.0, 1.0], "scaling_factor": 0.5},
            [1.0, -2.0, 3.0, 0.5],
            [4.0, 8.0, 16.0, 2.0],
        ),
    ],
)  # fmt: skip
def test_whitening_constants_follow_the_configuration(config: Any, mean: list[float], std: list[float]) -> None:
    codec = SdCodec(small_autoencoder(**config))
    assert codec.mean.tolist() == pytest.approx(mean)
    assert codec.std.tolist() == pytest.approx(std)
    assert codec.encode(random_clip(1)).shape[2] == len(mean)


def test_streaming_and_prefixes_equal_the_whole(autoencoder: Any) -> None:
    codec, clip = SdCodec(autoencoder), random_clip(5)
    latents = codec.encode(clip)
    assert torch.equal(codec.encode(clip[:, :2]), latents[:, :2])
    decoder = codec.decoder()
    assert torch.equal(torch.cat([decoder(piece) for piece in latents.split((1, 3, 1), 1)], 1), codec.decode(latents))


@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_loading_from_a_folder_and_from_a_spec(autoencoder: Any, tmp_path: Path, subfolder: str) -> None:
    autoencoder.save_pretrained(tmp_path / subfolder)
    codec = load_codec("sd", str(tmp_path))
    assert torch.equal(codec.encode(random_clip(2)), SdCodec(autoencoder).encode(random_clip(2)))
    assert codec.spec().source == str(tmp_path)
    source = str(tmp_path)
    loaded = load_codec_from_spec(codec.spec(), source=source)
    assert loaded.fingerprint == codec.fingerprint == SdCodec(autoencoder).fingerprint
    with pytest.raises(InputError, match="different codecs"):
        load_codec_from_spec(replace(codec.spec(), fingerprint="0" * 16), source=source)


def test_incomplete_foreign_or_pickled_weights_are_refused(autoencoder: Any, tmp_path: Path) -> None:
    """diffusers initializes weights that a file lacks at random; a codec of noise must not be used."""
    autoencoder.save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    save_file({name: values for name, values in weights.items() if name != "decoder.conv_in.bias"}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=r"lacks 1 weights, such as decoder\.conv_in\.bias\): download"):
        load_codec("sd", str(tmp_path))
    save_file(weights | {"decoder.conv_in.bias": torch.zeros(7)}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=r"not those of AutoencoderKL: size mismatch for decoder\.conv_in\.bias"):
        load_codec("sd", str(tmp_path))
    (tmp_path / WEIGHTS).unlink()
    torch.save(weights, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match="could not be loaded"):
        load_codec("sd", str(tmp_path))
    with pytest.raises(InputError, match=r"image VAE folder .* does not exist"):
        load_codec("sd", str(tmp_path / "absent"))


def test_other_factors_and_scales_are_refused() -> None:
    with pytest.raises(InputError, match="reduces space 4 times"):
        SdCodec(small_autoencoder(levels=3), "somewhere")
    with pytest.raises(InputError, match=r"scaling_factor 0\.0, which must be above 0"):
        SdCodec(small_autoencoder(scaling_factor=0.0), "somewhere")
    with pytest.raises(InputError, match="4 latent channels but latents_mean and latents_std of 2 and 4"):
        SdCodec(small_autoencoder(latents_mean=[0.0, 0.0]), "somewhere")


def test_a_codec_without_a_posterior_is_named() -> None:
    with pytest.raises(InputError, match="codec 'pca' has no posterior, only latents"):
        load_codec("pca").encode_posterior(random_clip(1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("latent_channels", 10**9),
        ("latent_channels", -1),
        ("layers_per_block", 1000),
        ("block_out_channels", [32] * 5000),
        ("block_out_channels", 3),
        ("scaling_factor", "abc"),
        ("_class_name", "UNet2DModel"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_configuration_beyond_any_autoencoder_is_refused_before_it_is_built(
    field: str, value: Any, tmp_path: Path
) -> None:
    pytest.importorskip("diffusers")
    content = {"_class_name": "AutoencoderKL", "latent_channels": 4, field: value}
    (tmp_path / "config.json").write_text(json.dumps(content))
    save_file({"a": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match=rf"config\.json (has {field} = |is of a )"):
        load_codec("sd", str(tmp_path))
