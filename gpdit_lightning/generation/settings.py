"""Settings that follow from options and a trained model: codec, sampler, precision, sizes and batches."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Literal, TypeVar

import torch

from gpdit_lightning.checkpoints.reading import TrainedModel
from gpdit_lightning.codecs import Codec, load_codec_from_spec
from gpdit_lightning.devices import has_bf16
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import Size, parse_size
from gpdit_lightning.options.shared import LoadingOptions, Precision

AUTOCAST_DTYPES = {"32": None, "bf16": torch.bfloat16}

T = TypeVar("T")


def load_codec_of(trained: TrainedModel, options: LoadingOptions, owner: str = "the checkpoint") -> Codec:
    """Load the codec of a model to the model's device.

    Args:
        trained: the model.
        options: the user's codec and its weights, if given.
        owner: name of the model, for messages.

    Raises:
        InputError: the codec's weights are unavailable.
    """
    return load_codec_from_spec(trained.codec, trained.backbone.device, options.codec_source, owner, options.codec)


def selected_precision(precision: Precision, device: torch.device) -> Literal["32", "bf16"]:
    """Return the precision of matrix products: `auto` is bf16 on a CUDA device that has it, else 32.

    Raises:
        InputError: bf16 is requested, and the device does not have it.
    """
    if precision == "bf16" and not has_bf16(device):
        raise InputError(f"--precision is bf16, which the device {device} does not support: use 32 or auto.")
    if precision == "auto":
        return "bf16" if device.type == "cuda" and has_bf16(device) else "32"
    return precision


def trained_sizes(size: str | None, trained: TrainedModel) -> tuple[Size, ...]:
    """Return the sizes of the training clips in pixels, or only the requested one.

    Raises:
        InputError: the model was not trained on the requested size.
    """
    sizes = trained.geometry.sizes
    if size is None:
        return sizes
    requested = parse_size(size)
    if requested not in sizes:
        raise InputError(f"--size is {size}, but the checkpoint was trained on {listed(sizes)}: choose one of these.")
    return (requested,)


def trained_size(size: str | None, trained: TrainedModel, checkpoint: str) -> Size:
    """Return the size in pixels to which all videos are scaled.

    Raises:
        InputError: the model was not trained on the requested size, or on several and none is requested.
    """
    sizes = trained_sizes(size, trained)
    if len(sizes) > 1:
        raise InputError(f"{checkpoint} was trained on {listed(sizes)}: choose one of them by --size.")
    return sizes[0]


def listed(sizes: Sequence[Size]) -> str:
    """Return sizes as text, such as "192x320, 320x192"."""
    return ", ".join(f"{height}x{width}" for height, width in sizes)


def batches_by_shape(items: Sequence[T], batch_size: int, shape_of: Callable[[T], Hashable]) -> list[list[T]]:
    """Divide items into batches of at most `batch_size` items of one shape, otherwise in their order.

    Args:
        items: the items.
        batch_size: maximum number of items of a batch.
        shape_of: returns the shape of an item, or all that must be equal within a batch.
    """
    groups: dict[Hashable, list[T]] = defaultdict(list)
    for item in items:
        groups[shape_of(item)].append(item)
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]
