"""Codecs by autoencoders of diffusers, which are loaded from a folder or the hub: safetensors, nothing pickled."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from gpdit_lightning.codecs.base import Codec, fingerprint_of
from gpdit_lightning.errors import InputError

HUB_TIMEOUT = 10.0  # seconds
SUBFOLDER = "vae"  # of the autoencoder in the folder of a diffusers pipeline


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
    folder = Path(source).expanduser()
    if folder.is_dir():
        has_subfolder = (folder / SUBFOLDER / "config.json").is_file()
        autoencoder, reason = _from_pretrained(class_name, str(folder), (SUBFOLDER if has_subfolder else None,))
    elif folder.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise InputError(f"{description} folder {source} does not exist: give an existing folder or a hub name.")
    else:
        autoencoder, reason = _from_hub(class_name, source)
    if autoencoder is None:
        raise InputError(
            f"{description} {source!r} could not be loaded ({reason}): download it where there is a network and give "
            "its folder as --codec_source, or use the codec that is part of this package, --codec pca."
        )
    return autoencoder


def _from_hub(class_name: str, source: str) -> tuple[Any, str]:
    """Load the network from the local cache of the hub, else from the hub; return it, or None and the reason.

    The hub is requested once before the download, because without a network each request of the download is repeated
    for half a minute.
    """
    from huggingface_hub import HfApi  # takes half a second to import

    autoencoder, _ = _from_pretrained(class_name, source, (SUBFOLDER, None), local_files_only=True)
    if autoencoder is not None:
        return autoencoder, ""
    try:
        HfApi().model_info(source, timeout=HUB_TIMEOUT)
    except Exception as error:  # of the HTTP library that the installed release of huggingface_hub uses
        return None, f"the hub: {_lines_of(error)[0]}"
    return _from_pretrained(class_name, source, (SUBFOLDER, None))


def _from_pretrained(
    class_name: str, location: str, subfolders: Sequence[str | None], **settings: Any
) -> tuple[Any, str]:
    """Load the network from the first of the subfolders that has it; return it, or None and the reason."""
    with _errors_only("xformers"):  # diffusers imports it, which prints what it lacks
        import diffusers  # slow to import

        network_class = getattr(diffusers, class_name)
    reason = ""
    for subfolder in subfolders:
        try:
            # Messages on packages that would save host memory, and on arguments with which diffusers calls the hub.
            with _errors_only("diffusers"), warnings.catch_warnings(action="ignore"):
                autoencoder, loading = network_class.from_pretrained(
                    location, subfolder=subfolder, use_safetensors=True, output_loading_info=True, **settings
                )
        except RuntimeError as error:  # shapes that differ from those of the configuration
            reason = f"its weights are not those of {class_name}: {_first_difference(error)}"
        except (OSError, ValueError) as error:
            reason = _lines_of(error)[0]
        else:
            missing = sorted(loading["missing_keys"])
            if not missing:  # diffusers initializes missing weights at random
                return autoencoder, ""
            reason = f"its file lacks {len(missing)} weights, such as {missing[0]}"
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


def _lines_of(error: Exception) -> list[str]:
    """Return the lines of an error's message; its class if it has none."""
    return str(error).strip().splitlines() or [type(error).__name__]


def _first_difference(error: RuntimeError) -> str:
    """Return the first difference in torch's error on a state dict that does not fit, which follows its first line."""
    first, *differences = _lines_of(error)
    return (differences or [first])[0].strip().rstrip(".")
