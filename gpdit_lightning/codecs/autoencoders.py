"""Codecs by autoencoders of diffusers, which are loaded from a folder or the hub: safetensors, nothing pickled."""

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from gpdit_lightning.codecs.base import Codec, fingerprint_of
from gpdit_lightning.codecs.diffusers_folders import FILES, load_folder
from gpdit_lightning.errors import InputError, message_line
from gpdit_lightning.path_kinds import does_not_exist

log = logging.getLogger(__name__)

HUB_TIMEOUT = 10.0  # seconds


class AutoencoderCodec(Codec):
    """Base of codecs by a variational autoencoder of diffusers; latents are the means of the posterior.

    A subclass defines `posterior_values` and `decode_frame`.

    Args:
        autoencoder: the network; it is set to evaluation mode and converted to float32.
        source: folder or hub name of the weights.

    Attributes:
        class_name: name of the network's class in diffusers.
        description: what it is, for messages.
    """

    class_name: ClassVar[str]
    description: ClassVar[str]
    has_posterior = True

    def __init__(self, autoencoder: Any, source: str | None = None) -> None:
        self.autoencoder = autoencoder.eval().requires_grad_(False).float()
        self.source = source
        self.fingerprint = fingerprint_of(autoencoder.state_dict())

    @classmethod
    def load(cls, source: str | None = None) -> Self:
        """Load the network from a folder or the hub, or from the subfolder `vae` of either; safetensors only.

        Args:
            source: folder or hub name; None for the default.

        Raises:
            InputError: the source is neither a folder nor available from the hub.
        """
        assert cls.default_source is not None
        source = source or cls.default_source
        return cls(load_autoencoder(cls.class_name, cls.description, source), source)

    def to(self, device: str | torch.device) -> Self:
        """Move the weights; return the codec itself."""
        self.device = torch.device(device)
        self.autoencoder.to(self.device)
        return self

    def encode_values(self, values: Tensor) -> Tensor:
        """Return the mean of the posterior."""
        return self.posterior_values(values)[0]


def load_autoencoder(class_name: str, description: str, source: str) -> Any:
    """Load an autoencoder from a folder or the hub, or from the subfolder `vae` of either; safetensors only.

    Args:
        class_name: name of its class in diffusers.
        description: what it is, for messages: "the WanVAE".
        source: folder or hub name.

    Raises:
        InputError: the source is neither a folder nor available from the hub, or contains another autoencoder.
    """
    folder: Path | None = Path(source).expanduser()
    reason = ""
    if not Path(source).expanduser().is_dir():
        if Path(source).expanduser().is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
            raise InputError(
                f"{description} folder {source} {does_not_exist(source)}: give an existing folder or a hub name."
            )
        folder, reason = _hub_folder(description, source)
    autoencoder = None
    if folder is not None:
        autoencoder, reason = load_folder(class_name, folder)
    if autoencoder is None:
        raise InputError(
            f"{description} {source!r} could not be loaded ({reason}): download it where there is a network and give "
            "its folder as --codec_source, or use the codec that is part of this package, --codec pca."
        )
    return autoencoder


def _hub_folder(description: str, source: str) -> tuple[Path | None, str]:
    """Return the folder of an autoencoder in the local cache of the hub, downloaded if necessary; or None and why not.

    The hub is requested once before the download, because without a network each request of the download is repeated
    for half a minute.
    """
    from huggingface_hub import HfApi, snapshot_download  # takes half a second to import

    with suppress(OSError, ValueError):  # it is not in the local cache
        return Path(snapshot_download(source, allow_patterns=[*FILES], local_files_only=True)), ""
    log.info("loading %s from the hub (%s), since it is not in the local cache", description, source)
    try:
        HfApi().model_info(source, timeout=HUB_TIMEOUT)
        return Path(snapshot_download(source, allow_patterns=[*FILES])), ""
    except Exception as error:  # of the HTTP library that the installed release of huggingface_hub uses
        return None, f"the hub: {message_line(error)}"
