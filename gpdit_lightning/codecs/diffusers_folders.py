"""Folders with an autoencoder of diffusers, which may come from a stranger.

diffusers acts on more of a folder than its architecture and weights: a quantization imports packages, an index names
files anywhere, and any width is allocated before the weights are read. So `config.json` is parsed and checked here, its
architecture is compared with the size of the weights, and diffusers reads a temporary folder which has the checked
configuration and links to the files of weights, and nothing else.
"""

import inspect
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gpdit_lightning.errors import InputError, message_line
from gpdit_lightning.regular_files import read_bounded
from gpdit_lightning.retries import memory_error, transient_error
from gpdit_lightning.schema import OBJECT, TEXT, check, parse_json, shown
from gpdit_lightning.tensor_files import check_finite, safetensors_header, size_text

SUBFOLDER = "vae"  # of the autoencoder in the folder of a diffusers pipeline
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # of weights in several files
# The files that are read, in the folder of an autoencoder or of a pipeline.
FILES = tuple(
    f"{prefix}{name}"
    for prefix in (f"{SUBFOLDER}/", "")
    for name in (CONFIG, WEIGHTS, INDEX, "diffusion_pytorch_model-*.safetensors")
)
CURE = "download the folder again"
MAX_JSON_BYTES = 2**24
MAX_NUMBER, MAX_LAYERS, MAX_LENGTH = 2**16, 64, 4096
LISTS = ("latents_mean", "latents_std")  # or None
LAYERS = ("layers_per_block", "num_res_blocks")


def load_folder(class_name: str, folder: Path) -> tuple[Any, str]:
    """Load an autoencoder from its folder, or from the subfolder `vae` of a pipeline; safetensors only.

    Args:
        class_name: name of its class in diffusers.
        folder: an existing folder.

    Returns:
        the autoencoder and an empty text, or None and the reason why it could not be loaded.

    Raises:
        InputError: a file is damaged, or its values are not those of such an autoencoder.
    """
    if (folder / SUBFOLDER / CONFIG).is_file():
        folder /= SUBFOLDER
    files = _files_of_weights(folder)
    if not files or not (folder / CONFIG).exists():
        return None, f"{folder} has no {WEIGHTS}" if not files else f"{folder} has no {CONFIG}"
    with errors_only("xformers"):  # diffusers imports it, which prints what it lacks
        import diffusers  # slow to import

        network_class = getattr(diffusers, class_name)
    config = _checked_config(network_class, folder / CONFIG)
    numbers = sum(
        math.prod(tensor.shape) for file in files for tensor in safetensors_header(folder / file, CURE)[0].values()
    )
    try:
        reason = _difference_in_size(network_class, config, numbers)
        if reason:
            return None, reason
        return _from_pretrained(network_class, config, folder, files)
    except MemoryError as error:
        raise memory_error(error) or error from None


def _files_of_weights(folder: Path) -> list[str]:
    """Return the names of the files of weights in a folder: one, or those that an index names; empty without any.

    Raises:
        InputError: the index is damaged, or names a file outside of the folder.
    """
    if not (folder / INDEX).exists():
        return [WEIGHTS] if (folder / WEIGHTS).exists() else []
    index = _read_json(folder / INDEX)
    names = check(index, {"weight_map": OBJECT}, "", str(folder / INDEX), CURE)["weight_map"].values()
    for name in names:
        check(name, TEXT, "weight_map", str(folder / INDEX), CURE)
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{folder / INDEX} names the file {shown(name)}, which is not in its folder: {CURE}.")
    return sorted(set(names))


def _read_json(path: Path) -> Any:
    try:
        return parse_json(read_bounded(path, MAX_JSON_BYTES), str(path), CURE)
    except OSError as error:
        unreadable = InputError(f"{path} cannot be read ({error.strerror}): {CURE}.")
        raise transient_error(error, path) or unreadable from None


def _checked_config(network_class: type[Any], path: Path) -> dict[str, Any]:
    """Return the arguments of an autoencoder's constructor from its configuration; other fields are left out.

    Raises:
        InputError: the file is damaged, of another class, or a value is of another type than the argument's default, or
            far beyond any autoencoder.
    """
    content = check(_read_json(path), OBJECT, "", str(path), CURE)
    owner = content.get("_class_name", network_class.__name__)
    if owner != network_class.__name__:
        raise InputError(f"{path} is of a {shown(owner)}, not of a {network_class.__name__}: {CURE}.")
    parameters = inspect.signature(network_class.__init__).parameters
    config = {name: value for name, value in content.items() if name in parameters and name != "self"}
    for name, value in config.items():
        most = MAX_LAYERS if name in LAYERS else MAX_NUMBER
        default = [0.0] if name in LISTS and value is not None else parameters[name].default
        if not _is_plain(value, default, most):
            raise InputError(f"{path} has {name} = {shown(value)}, which no such autoencoder has: {CURE}.")
    return config


def _is_plain(value: Any, default: Any, most: int) -> bool:
    """Return whether a value is of the type of an argument's default, and no number in it is above `most`."""
    if isinstance(default, list | tuple):
        inner = default[0] if default else 0.0
        return (
            isinstance(value, list) and len(value) <= MAX_LENGTH and all(_is_plain(one, inner, most) for one in value)
        )
    if isinstance(default, bool):
        return type(value) is bool
    if isinstance(default, int):
        return type(value) is int and 0 <= value <= most
    if isinstance(default, float):
        return type(value) in (int, float) and abs(value) <= most
    if isinstance(default, str):
        return isinstance(value, str)
    return value is None or _is_plain(value, 0.0, most)  # the default is None, as that of shift_factor


def _difference_in_size(network_class: type[Any], config: Mapping[str, Any], numbers: int) -> str:
    """Build the architecture without memory; return a reason if it is much larger than its file, else nothing."""
    try:
        with torch.device("meta"), _quiet():
            described = sum(tensor.numel() for tensor in network_class(**config).state_dict().values())
    except Exception as error:  # diffusers raises many kinds of errors for arguments that contradict each other
        return f"its {CONFIG} is not that of an {network_class.__name__}: {message_line(error).rstrip('.')}"
    if described > 2 * numbers + 2**20:  # diffusers names the weights that are missing
        return f"its {CONFIG} describes {described:,} weights, and its files have {numbers:,}"
    return ""


def _from_pretrained(
    network_class: type[Any], config: Mapping[str, Any], folder: Path, files: list[str]
) -> tuple[Any, str]:
    """Load an autoencoder with a checked configuration; return it, or None and the reason."""
    with tempfile.TemporaryDirectory() as name:
        checked = Path(name)
        (checked / CONFIG).write_text(json.dumps({"_class_name": network_class.__name__, **config}), encoding="utf-8")
        for file in (*files, *([INDEX] if (folder / INDEX).exists() else [])):
            (checked / file).symlink_to((folder / file).absolute())
        try:
            with _quiet():
                autoencoder, loading = network_class.from_pretrained(
                    checked, use_safetensors=True, local_files_only=True, disable_mmap=True, output_loading_info=True
                )
        except RuntimeError as error:  # shapes that differ from those of the configuration
            known = transient_error(error, f"{folder} ({size_text(folder / files[0])})")
            if known is not None:
                raise known from None
            return None, f"its weights are not those of {network_class.__name__}: {_first_difference(error)}"
        except (OSError, ValueError) as error:
            return None, message_line(error)
    missing = sorted(loading["missing_keys"])
    if missing:  # diffusers initializes missing weights at random
        return None, f"its file lacks {len(missing)} weights, such as {missing[0]}"
    check_finite(autoencoder.state_dict(), str(folder / files[0]), CURE)
    return autoencoder, ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide messages on packages that would save host memory, and on arguments with which diffusers calls itself."""
    with errors_only("diffusers"), warnings.catch_warnings(action="ignore"):
        yield


@contextmanager
def errors_only(library: str) -> Iterator[None]:
    """Let the logger of a library log errors only."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _first_difference(error: RuntimeError) -> str:
    """Return the first difference in torch's error on a state dict that does not fit, which follows its first line."""
    _, *differences = str(error).strip().splitlines() or [""]
    return (differences or [message_line(error)])[0].strip().rstrip(".")
