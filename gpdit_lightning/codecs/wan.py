"""The codec `wan`: the WanVAE that GPDiT uses (section 5.1), by diffusers' `AutoencoderKLWan`."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gpdit_lightning.codecs.autoencoders import AutoencoderCodec
from gpdit_lightning.errors import InputError

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

DEFAULT_SOURCE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


class WanCodec(AutoencoderCodec):
    """The WanVAE; latents are the means of the posterior.

    Args:
        autoencoder: the network; it is set to evaluation mode and converted to float32.
        source: folder or hub name of the weights.

    Raises:
        InputError: the autoencoder does not reduce space by 8x8 and time by 4 without patches, or does not have one
            pair of whitening constants for each channel.
    """

    latent_channels, spatial_factor, temporal_factor = 16, 8, 4
    default_source = DEFAULT_SOURCE
    class_name, description = "AutoencoderKLWan", "the WanVAE"

    def __init__(self, autoencoder: "AutoencoderKLWan", source: str | None = None) -> None:
        config = autoencoder.config
        patch = config.patch_size or 1
        factors = (patch * 2 ** len(autoencoder.temperal_downsample), 2 ** sum(autoencoder.temperal_downsample))
        if (*factors, patch) != (self.spatial_factor, self.temporal_factor, 1):
            raise InputError(
                f"the WanVAE of {source} reduces space {factors[0]} times and time {factors[1]} times, by patches of "
                f"{patch} pixels, where this library needs {self.spatial_factor}, {self.temporal_factor} and 1: use "
                "the VAE of Wan 2.1."
            )
        super().__init__(autoencoder, source)
        self.latent_channels = config.z_dim
        self.mean = torch.tensor(config.latents_mean, dtype=torch.float32)
        self.std = torch.tensor(config.latents_std, dtype=torch.float32)
        if not (self.std > 0).all():
            raise InputError(f"the WanVAE of {source} has latents_std that are not above 0: correct its config.json.")
        if self.mean.shape != (config.z_dim,) or self.std.shape != (config.z_dim,):
            raise InputError(
                f"the WanVAE of {source} has {config.z_dim} latent channels but latents_mean and latents_std of "
                f"{len(self.mean)} and {len(self.std)}: correct its config.json."
            )

    def posterior_values(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means and standard deviations of the posterior."""
        posterior = self.autoencoder.encode(values.transpose(1, 2)).latent_dist  # diffusers: channels before frames
        return posterior.mean.transpose(1, 2).contiguous(), posterior.std.transpose(1, 2).contiguous()

    def decode_frame(self, latent: Tensor, first: bool, state: list[Any]) -> Tensor:
        """Decode one frame; the state is the cached inputs of the causal convolutions."""
        # Like one iteration of diffusers' `AutoencoderKLWan._decode`, which keeps the state in the network instead.
        decoder = self.autoencoder.decoder
        if first:
            state += [None] * sum(isinstance(layer, nn.Conv3d) for layer in decoder.modules())
        inputs = self.autoencoder.post_quant_conv(latent[:, :, None])
        return decoder(inputs, feat_cache=state, feat_idx=[0], first_chunk=first).transpose(1, 2)
