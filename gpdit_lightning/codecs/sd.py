"""The codec `sd`: the image VAE of Stable Diffusion, which ACDiT uses (section 4.4), by diffusers' `AutoencoderKL`."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpdit_lightning.codecs.autoencoders import AutoencoderCodec
from gpdit_lightning.errors import InputError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

DEFAULT_SOURCE = "stabilityai/sd-vae-ft-ema"  # the weights of DiT, which ACDiT follows


class SdCodec(AutoencoderCodec):
    """The image VAE of Stable Diffusion, frame by frame; latents are the means of the posterior.

    The whitened latents are those that diffusers' pipelines give to the network: (latents - shift_factor)
    scaling_factor, or (latents - latents_mean) scaling_factor / latents_std where the configuration has these. Weights
    with 4 channels have no shift; later ones may have other numbers of channels and a shift.

    Args:
        autoencoder: the network; it is set to evaluation mode and converted to float32.
        source: folder or hub name of the weights.

    Raises:
        InputError: the autoencoder does not reduce space by 8x8, is not one of colour images, or has invalid whitening
            constants.
    """

    latent_channels, spatial_factor, temporal_factor = 4, 8, 1
    default_source = DEFAULT_SOURCE
    class_name, description = "AutoencoderKL", "the image VAE"

    def __init__(self, autoencoder: "AutoencoderKL", source: str | None = None) -> None:
        config = autoencoder.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        if (factor, config.in_channels, config.out_channels) != (self.spatial_factor, 3, 3):
            raise InputError(
                f"the image VAE of {source} reduces space {factor} times and has {config.in_channels} input and "
                f"{config.out_channels} output channels, where this library needs {self.spatial_factor}, 3 and 3: use "
                "a VAE of Stable Diffusion."
            )
        super().__init__(autoencoder, source)
        self.latent_channels = config.latent_channels
        self.mean, self.std = whitening_constants(config, source)

    def posterior_values(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means and standard deviations of the posteriors of all frames."""
        # One frame of all clips at a time: the memory is that of a batch of images, for clips of any length.
        posteriors = [self.autoencoder.encode(frame).latent_dist for frame in values.unbind(1)]
        mean, std = (torch.stack([getattr(one, name) for one in posteriors], dim=1) for name in ("mean", "std"))
        return mean, std

    def decode_frame(self, latent: Tensor, first: bool, state: list[Any]) -> Tensor:
        """Decode one frame by itself; the state is not used."""
        values: Tensor = self.autoencoder.decode(latent).sample
        return values[:, None]


def whitening_constants(config: Any, source: str | None) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation (C,) that whiten latents, by the configuration of an `AutoencoderKL`.

    Args:
        config: the configuration.
        source: folder or hub name of the weights, for messages.

    Raises:
        InputError: the scaling factor is not above 0, or `latents_mean` or `latents_std` do not have one number per
            channel.
    """
    channels, scale = config.latent_channels, config.scaling_factor
    if not scale or scale < 0:
        raise InputError(
            f"the image VAE of {source} has scaling_factor {scale}, which must be above 0: correct its config.json."
        )
    mean = config.latents_mean or [config.shift_factor or 0.0] * channels
    std = config.latents_std or [1.0] * channels
    if {len(mean), len(std)} != {channels}:
        raise InputError(
            f"the image VAE of {source} has {channels} latent channels but latents_mean and latents_std of {len(mean)} "
            f"and {len(std)}: correct its config.json."
        )
    if min(std) <= 0:
        raise InputError(
            f"the image VAE of {source} has latents_std {std}, which must be above 0: correct its config.json."
        )
    return torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32) / scale
