"""Reading of contexts: video and image files, folders of them, samples of shards, and clips in memory.

They are read as the training clips of the model were, with the same stride and sizes.
"""

import logging
import math
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from gpdit_lightning.codecs import Codec
from gpdit_lightning.data.shards import ShardReader
from gpdit_lightning.errors import InputError, ResourceError
from gpdit_lightning.generation.contexts import ContextSettings, VideoContext, name_for_files, unique_names
from gpdit_lightning.generation.frame_sources import (
    FrameSource,
    VideoFile,
    frames_in_memory,
    image_folder,
    resized,
)
from gpdit_lightning.generation.shard_contexts import SHARD_EXTENSION, open_shard, read_sample, sample_number
from gpdit_lightning.media.finding import is_of_other_kind, medium_of, search_folder, without_repeated
from gpdit_lightning.media.images import read_image
from gpdit_lightning.media.timing import fps_of_clip, uneven_intervals
from gpdit_lightning.media.video import natural_sort_key
from gpdit_lightning.model.layout import NO_CONTEXT
from gpdit_lightning.names import counted
from gpdit_lightning.path_kinds import does_not_exist, reason_and_cure

log = logging.getLogger(__name__)


def read_contexts(
    sources: Sequence[str | Tensor | VideoContext],
    settings: ContextSettings,
    codec: Codec,
    *,
    skip_unusable: bool = True,
) -> list[VideoContext]:
    """Read one or more contexts from each source, in the order of the sources.

    All contexts are held in memory: name single samples of large shards.

    Args:
        sources: each is one of

            - a video or GIF,
            - an image, which is one context frame regardless of `settings.frames`,
            - a folder of images, which are the frames of a video, in natural order,
            - a folder of videos, in natural order, without its subfolders,
            - a sample of a shard, as PATH.tar#NUMBER (from 0) or PATH.tar#KEY; its beginning is the context,
            - a shard, PATH.tar, with all its samples,
            - the frames of a clip in memory, uint8 (T, 3, H, W), which are read as a folder of images is; a single
              frame is read as an image,
            - a context that was read before.
        settings: frames, stride, sizes and other choices.
        codec: the model's codec, with which shards must have been made.
        skip_unusable: whether, of several contexts, those that are unreadable, damaged or too short are skipped with a
            warning that names each, instead of raising an error.

    Raises:
        InputError: a source is missing or does not match the training clips, a context cannot be used and is not
            skipped, or none can be used.
    """
    if not settings.frames:
        raise InputError(NO_CONTEXT)
    codec.latent_frames(settings.frames, "--context_frames")  # raises if the codec cannot encode so many
    open_once = cache(partial(open_shard, settings=settings, codec=codec))
    readers = [reader for source in sources for reader in _readers_of(source, settings, codec, open_once)]
    contexts = []
    for reader in readers:
        try:
            contexts.append(reader())
        except ResourceError:  # others would fail too
            raise
        except InputError as error:
            if len(readers) == 1 or not skip_unusable:
                raise
            log.warning("skipped: %s", error)
    if not contexts:
        raise InputError(f"none of the {len(readers)} contexts can be used, for the reasons above: give others.")
    return unique_names(contexts)


_Reader = Callable[[], VideoContext]
"""Reads one context; raises `InputError` if it cannot be used."""


def _readers_of(
    source: str | Tensor | VideoContext,
    settings: ContextSettings,
    codec: Codec,
    open_once: Callable[[Path], ShardReader],
) -> list[_Reader]:
    if isinstance(source, VideoContext):
        return [lambda: source]
    if isinstance(source, Tensor):
        return [partial(_read_frames, source, settings, codec)]
    path = Path(source)
    shard, _, sample = source.rpartition("#")
    if shard.endswith(SHARD_EXTENSION) and not os.path.exists(path):
        reader = open_once(Path(shard))
        return [partial(read_sample, reader, sample_number(sample, reader), settings, codec)]
    if not os.path.exists(path):  # unlike `Path.exists`, False for a name that is too long
        raise InputError(f"{source} {does_not_exist(source)}: give a video, an image, a folder of either, or a shard.")
    if path.suffix == SHARD_EXTENSION:
        reader = open_once(path)
        return [partial(read_sample, reader, number, settings, codec) for number in range(len(reader))]
    if path.is_dir():
        return _readers_of_folder(path, settings, codec)
    if is_of_other_kind(path):
        raise InputError(f"{path} is no video, {reason_and_cure(path, 'media', 'give a video or an image')}.")
    if medium_of(path) == "image":
        return [partial(_read_still_image, path, settings, codec)]
    return [partial(_read_video, path, settings, codec)]


def _readers_of_folder(folder: Path, settings: ContextSettings, codec: Codec) -> list[_Reader]:
    of_videos, of_images = (search_folder(folder, medium, recursive=False) for medium in ("video", "image"))
    distinct, repeated = without_repeated(of_videos.files)
    videos = sorted((path for path, _ in distinct), key=natural_sort_key)
    images = [path for path, _ in of_images.files]
    if videos and images:
        raise InputError(
            f"{folder} contains both videos ({videos[0].name}) and images ({images[0].name}): give a folder of "
            "videos, or of the frames of one video."
        )
    left_out = (of_images if images else of_videos).describe_left_out()
    if not videos and not images:
        reasons = "".join(f"; {sentence}" for sentence in left_out)
        cure = "give another folder, or a shard as PATH.tar"
        why = f", {reason_and_cure(folder, 'media', cure)}" if is_of_other_kind(folder) else f": {cure}"
        raise InputError(f"{folder} contains no videos and no images{why}{reasons}.")
    for sentence in (*left_out, *(f"{name} {reason}" for name, reason, _ in repeated)):
        log.info("%s: %s", folder, sentence)
    if images:
        log.info(
            "%s: its %s are the frames of one video (name images, as %s/*, for a video each)",
            folder,
            counted(len(images), "image"),
            folder,
        )
        frames = image_folder(folder, len(images), settings.source_fps(), settings.sizes)
        return [partial(_read_clip, frames, settings, codec)]
    return [partial(_read_video, path, settings, codec) for path in videos]


def _read_video(path: Path, settings: ContextSettings, codec: Codec) -> VideoContext:
    return _read_clip(VideoFile(path, settings.video_fps, settings.sizes), settings, codec)


def _read_clip(source: FrameSource, settings: ContextSettings, codec: Codec) -> VideoContext:
    """Read the context from the frames of a video: from `settings.start`, or up to the last frame."""
    stride = settings.stride
    if settings.start is None:
        count = source.count()
        needed = settings.context_frames(math.ceil(count / stride), source.path, codec)
        frames = list(source.read(count - 1 - (needed - 1) * stride, stride, None))
    else:
        number = source.number_at(settings.start)
        if number is None:
            raise InputError(f"--start {settings.start:g} is after the end of {source.path}: give an earlier time.")
        frames = list(source.read(number, stride, settings.frames + settings.ground_truth_frames))
        needed = settings.context_frames(len(frames), source.path, codec)
    if len(frames) < needed:
        raise settings.too_short_error(source.path, len(frames), codec)
    times = [frame.time for frame in frames[:needed]]
    if uneven := uneven_intervals(times):
        log.warning(
            "warning: the intervals between the frames of the context of %s are uneven (%.3g to %.3g s)",
            source.path,
            *uneven,
        )
    pixels = torch.stack([frame.pixels for frame in frames])
    fps = fps_of_clip(times, stride, source.fps) / stride
    return VideoContext(name_for_files(source.name), pixels[:needed], pixels[needed:], fps)


def _read_still_image(path: Path, settings: ContextSettings, codec: Codec) -> VideoContext:
    settings.check_no_start(path)
    settings.check_one_frame(path, codec)
    return _still_image(name_for_files(path.stem), read_image(path), settings)


def _read_frames(frames: Tensor, settings: ContextSettings, codec: Codec) -> VideoContext:
    """Read the context from a clip in memory, uint8 (T, 3, H, W)."""
    if len(frames) > 1:
        return _read_clip(frames_in_memory(frames, settings.source_fps(), settings.sizes), settings, codec)
    settings.check_no_start("the given image")
    settings.check_one_frame("the given image", codec)
    return _still_image("image", frames, settings)


def _still_image(name: str, image: Tensor, settings: ContextSettings) -> VideoContext:
    """Return the context of one frame that an image (1, 3, H, W) is."""
    pixels = torch.stack(list(resized(image, settings.sizes)))
    return VideoContext(name, pixels, pixels[:0], settings.frame_rate())
