"""The codec `wan`: the WanVAE that GPDiT uses (section 5.1), by diffusers' `AutoencoderKLWan`."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from gpdit_lightning.codecs.base import Codec, fingerprint_of
from gpdit_lightning.errors import InputError

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

DEFAULT_SOURCE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
HUB_TIMEOUT = 10.0  # seconds
SUBFOLDER = "vae"  # of the autoencoder in the folder of a diffusers pipeline


class WanCodec(Codec):
    """The WanVAE; latents are the mode of the posterior.

    Args:
        autoencoder: the network; it is set to evaluation mode and converted to float32.
        source: folder or hub name of the weights.

    Raises:
        InputError: the autoencoder does not reduce space by 8x8 and time by 4 without patches, or does not have one
            pair of whitening constants for each channel.
    """

    latent_channels, spatial_factor, temporal_factor = 16, 8, 4
    default_source = DEFAULT_SOURCE

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
        self.autoencoder = autoencoder.eval().requires_grad_(False).float()
        self.source = source
        self.latent_channels = config.z_dim
        self.mean = torch.tensor(config.latents_mean, dtype=torch.float32)
        self.std = torch.tensor(config.latents_std, dtype=torch.float32)
        if self.mean.shape != (config.z_dim,) or self.std.shape != (config.z_dim,):
            raise InputError(
                f"the WanVAE of {source} has {config.z_dim} latent channels but latents_mean and latents_std of "
                f"{len(self.mean)} and {len(self.std)}: correct its config.json."
            )
        self.fingerprint = fingerprint_of(autoencoder.state_dict())

    @classmethod
    def load(cls, source: str | None = None) -> Self:
        """Load the WanVAE from a folder or the hub, or from the subfolder `vae` of either; safetensors only.

        Raises:
            InputError: the source is neither a folder nor available from the hub.
        """
        source = source or DEFAULT_SOURCE
        folder = Path(source).expanduser()
        if folder.is_dir():
            has_subfolder = (folder / SUBFOLDER / "config.json").is_file()
            autoencoder, reason = _from_pretrained(str(folder), (SUBFOLDER if has_subfolder else None,))
        elif folder.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
            raise InputError(f"the WanVAE folder {source} does not exist: give an existing folder or a hub name.")
        else:
            autoencoder, reason = _from_hub(source)
        if autoencoder is None:
            raise InputError(
                f"the WanVAE {source!r} could not be loaded ({reason}): download it where there is a network and give "
                "its folder as --codec_source, or use the codec that is part of this package, --codec pca."
            )
        return cls(autoencoder, source)

    def to(self, device: str | torch.device) -> Self:
        """Move the weights; return the codec itself."""
        self.device = torch.device(device)
        self.autoencoder.to(self.device)
        return self

    def encode_values(self, values: Tensor) -> Tensor:
        """Return the mode of the posterior."""
        posterior = self.autoencoder.encode(values.transpose(1, 2)).latent_dist  # diffusers: channels before frames
        return posterior.mode().transpose(1, 2).contiguous()

    def decode_frame(self, latent: Tensor, first: bool, state: list[Any]) -> Tensor:
        """Decode one frame; the state is the cached inputs of the causal convolutions."""
        # Like one iteration of diffusers' `AutoencoderKLWan._decode`, which keeps the state in the network instead.
        decoder = self.autoencoder.decoder
        if first:
            state += [None] * sum(isinstance(layer, nn.Conv3d) for layer in decoder.modules())
        inputs = self.autoencoder.post_quant_conv(latent[:, :, None])
        return decoder(inputs, feat_cache=state, feat_idx=[0], first_chunk=first).transpose(1, 2)


def _from_hub(source: str) -> tuple["AutoencoderKLWan | None", str]:
    """Load the network from the local cache of the hub, else from the hub; return it, or None and the reason.

    The hub is requested once before the download, because without a network each request of the download is repeated
    for half a minute.
    """
    from huggingface_hub import HfApi  # takes half a second to import

    autoencoder, _ = _from_pretrained(source, (SUBFOLDER, None), local_files_only=True)
    if autoencoder is not None:
        return autoencoder, ""
    try:
        HfApi().model_info(source, timeout=HUB_TIMEOUT)
    except Exception as error:  # of the HTTP library that the installed release of huggingface_hub uses
        return None, f"the hub: {_first_line_of(error)}"
    return _from_pretrained(source, (SUBFOLDER, None))


def _from_pretrained(
    location: str, subfolders: Sequence[str | None], **settings: Any
) -> tuple["AutoencoderKLWan | None", str]:
    """Load the network from the first of the subfolders that has it; return it, or None and the reason."""
    with _errors_only("xformers"):  # diffusers imports it, which prints what it lacks
        from diffusers import AutoencoderKLWan  # slow to import

    reason = ""
    for subfolder in subfolders:
        try:
            # Messages on packages that would save host memory, and on arguments with which diffusers calls the hub.
            with _errors_only("diffusers"), warnings.catch_warnings(action="ignore"):
                autoencoder = AutoencoderKLWan.from_pretrained(
                    location, subfolder=subfolder, use_safetensors=True, **settings
                )
        except (OSError, ValueError, RuntimeError) as error:
            reason = _first_line_of(error)
        else:
            return autoencoder, ""
    return None, reason


@contextmanager
def _errors_only(library: str) -> Iterator[None]:
    """Let the logger of a library log errors only."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _first_line_of(error: Exception) -> str:
    """Return the first line of an error's message; its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
