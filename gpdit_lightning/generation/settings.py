"""What options and a trained model determine together: codec, precision, sizes and batches."""

import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar

import torch

from gpdit_lightning.checkpoints.reading import TrainedModel
from gpdit_lightning.codecs import Codec, load_codec_from_spec
from gpdit_lightning.devices import has_bf16
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation.video import num_latent_frames
from gpdit_lightning.media.images import Size, closest_size, parse_size, read_image
from gpdit_lightning.media.video import video_info
from gpdit_lightning.model.layout import NO_CONTEXT, BlockLayout
from gpdit_lightning.options.shared import Precision
from gpdit_lightning.path_kinds import Medium

AUTOCAST_DTYPES = {"32": None, "bf16": torch.bfloat16}

MAX_HEADERS = 32  # number of videos whose sizes are read to choose one of the sizes of training

T = TypeVar("T")

log = logging.getLogger(__name__)


def load_codec_of(
    trained: TrainedModel, codec: str | None = None, source: str | None = None, owner: str = "the checkpoint"
) -> Codec:
    """Load the codec of a model to the model's device.

    Args:
        trained: the model.
        codec: import path of a custom codec's class, if the user gives it.
        source: folder, file or hub name of the codec's weights; None for those of an exported folder, or the default.
        owner: name of the model, for messages.

    Raises:
        InputError: the codec's weights are unavailable, or the model records others than the default.
    """
    return load_codec_from_spec(
        trained.codec,
        trained.backbone.device,
        source or trained.exported_codec,
        owner,
        codec,
    )


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


def layout_of(trained: TrainedModel, codec: Codec) -> BlockLayout:
    """Return the blocks of the training clips; their frames are those of clips of any size."""
    height, width = (side // codec.spatial_factor for side in trained.geometry.sizes[0])
    return trained.backbone.layout(height, width)


def warn_of_short_context(frames: int, trained: TrainedModel, codec: Codec) -> None:
    """Log a warning if videos begin with latent frames that had no loss in the last training of the model.

    Args:
        frames: pixel frames of the shortest context.
        trained: the model.
        codec: its codec.
    """
    given = num_latent_frames(codec, 0, frames)
    if given < trained.frames_without_loss:
        log.warning(
            "warning: %d latent frames are given, but the first %d of each video had no loss in training "
            "(data.videos.frames_without_loss): give a context of at least %d frames, or the result may be worse",
            given,
            trained.frames_without_loss,
            codec.pixel_frames(trained.frames_without_loss),
        )


def check_context_frames(frames: int, layout: BlockLayout, codec: Codec) -> None:
    """Check the option --context_frames, a number of pixel frames.

    Raises:
        InputError: there are none, the codec cannot encode so many, or they are not whole blocks of the model.
    """
    if frames < 1:
        raise InputError(f"--context_frames is {frames}: give at least 1, or leave out the context.")
    latents = codec.latent_frames(frames, "--context_frames")
    if layout.context_length(latents) == latents:
        return
    if not layout.first_frames:
        raise InputError(NO_CONTEXT)
    lengths = " or ".join(str(codec.pixel_frames(length)) for length in layout.contexts_near(latents))
    raise InputError(
        f"--context_frames is {frames}, and its {latents} latent frames are not whole blocks of the model: give "
        f"{lengths}."
    )


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


def trained_size(size: str | None, trained: TrainedModel, files: Sequence[Path], medium: Medium = "video") -> Size:
    """Return the size in pixels to which all videos or images are scaled.

    It is the requested size, or the size of training that is closest in aspect to most of the first files; the first
    one without files.

    Raises:
        InputError: the model was not trained on the requested size.
    """
    sizes = trained_sizes(size, trained)
    if len(sizes) == 1:
        return sizes[0]
    counts = dict.fromkeys(sizes, 0)
    for path in files[:MAX_HEADERS]:
        with suppress(InputError):  # reported where the file is read
            counts[closest_size(*_frame_size(path, medium), sizes)] += 1
    chosen = max(sizes, key=counts.__getitem__)  # the first of equal ones
    log.info("frames are scaled to %s; --size selects another size of training: %s", listed([chosen]), listed(sizes))
    return chosen


def _frame_size(path: Path, medium: Medium) -> Size:
    """Return the height and width of an image, or of the frames of a video."""
    if medium == "image":
        height, width = read_image(path).shape[-2:]
        return height, width
    info = video_info(path)
    return info.height, info.width


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
