"""Loading of autoencoders of diffusers from a folder or the hub: configuration and safetensors, nothing pickled."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpdit_lightning.errors import InputError

HUB_TIMEOUT = 10.0  # seconds
SUBFOLDER = "vae"  # of the autoencoder in the folder of a diffusers pipeline


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
