"""Contexts of generated videos: video and image files, folders of them, samples of shards, and clips in memory.

They are read as the training clips of the model were, with the same stride and sizes.
"""

import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpdit_lightning.codecs import Codec
from gpdit_lightning.data.manifest import FILE_NAME, Manifest
from gpdit_lightning.data.shards import ShardReader
from gpdit_lightning.errors import InputError, ResourceError
from gpdit_lightning.generation.frame_sources import (
    FrameSource,
    VideoFile,
    frames_in_memory,
    image_folder,
    resized,
)
from gpdit_lightning.media.finding import medium_of, search_folder, without_repeated
from gpdit_lightning.media.images import Size, read_image
from gpdit_lightning.media.timing import fps_of_clip, frame_rate, uneven_intervals
from gpdit_lightning.media.video import natural_sort_key
from gpdit_lightning.model.layout import NO_CONTEXT, BlockLayout
from gpdit_lightning.names import counted

log = logging.getLogger(__name__)

DEFAULT_FPS = 24  # of images, which have no frame rate
SHARD_EXTENSION = ".tar"
MANIFEST_SEARCH_DEPTH = 3  # a shard's manifest is searched for in its folder and the two above
MAX_NAME_LENGTH = 56  # characters, of up to four bytes each, which leaves room for an extension in a file name
MAX_LABEL_LENGTH = 200  # bytes of a class name in the name of a file, with room for a number and an extension


@dataclass(frozen=True)
class ContextSettings:
    """How contexts are read: stride and sizes of the model's training clips, and the user's choices.

    Attributes:
        frames: pixel frames of a context, T = 1 + temporal_factor k; 0 if the model takes no context.
        may_be_shorter: whether a video with fewer frames gives a shorter context; otherwise it is refused.
        stride: distance between the frames of a video that are used.
        sizes: possible (height, width); each context takes the one closest in aspect ratio.
        ground_truth_frames: maximum number of frames after the context to read as ground truth.
        start: time in seconds, by the time stamps of the video, at which the context begins. None: the context ends at
            the last frame of the video, and there is no ground truth.
        fps: frames per second of images; None for `DEFAULT_FPS`.
        video_fps: frames per second to which videos are resampled in time before the stride counts, as the training
            clips were; None to count the frames as they are stored.
        layout: the blocks of the model, of which a context consists; None: frames.

    Raises:
        InputError: `start` is negative or not finite, or `fps` is not positive and finite.
    """

    frames: int
    stride: int
    sizes: tuple[Size, ...]
    ground_truth_frames: int = 0
    start: float | None = None
    fps: float | None = None
    video_fps: float | None = None
    may_be_shorter: bool = False
    layout: BlockLayout | None = None

    def __post_init__(self) -> None:
        if self.start is not None and not 0 <= self.start < math.inf:
            raise InputError(f"--start is {self.start}: give a time in seconds, at least 0.")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise InputError(f"--fps is {self.fps}: give frames per second, above 0.")

    def encodable_frames(self, available: int, codec: Codec) -> int:
        """Return the largest number of pixel frames, at most `available`, that a context can have; 0 if there is none.

        They are those of whole blocks of the model.
        """
        latents = codec.latent_frames(codec.encodable_frames(available)) if available else 0
        if self.layout is not None:
            latents = self.layout.context_length(latents)
        return codec.pixel_frames(latents) if latents else 0

    def source_fps(self, recorded: float | None = None) -> Fraction:
        """Return the frames per second of a source before the stride: the recorded rate if there is one, else `fps`."""
        return frame_rate(recorded or self.fps or DEFAULT_FPS)

    def frame_rate(self) -> Fraction:
        """Return the frames per second of a result whose context has no recorded rate."""
        return self.source_fps() / self.stride


@dataclass(frozen=True)
class VideoContext:
    """The beginning of one video to generate.

    Attributes:
        name: short name that can be used in a file name, unique among the contexts read together.
        pixels: (T, 3, H, W) uint8; T = 0 for a video that is generated from noise alone.
        ground_truth: (at most `ContextSettings.ground_truth_frames`, 3, H, W) uint8, the frames of the source after
            `pixels`.
        fps: frames per second of the result, with the stride taken into account.
        latents: (k, C, h, w) float32, raw, if the source is a shard; `pixels` are decoded from them.
        label: the label that a shard records for its sample.
    """

    name: str
    pixels: Tensor
    ground_truth: Tensor
    fps: Fraction
    latents: Tensor | None = None
    label: str | None = None


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
    open_shard = cache(partial(_open_shard, settings=settings, codec=codec))
    readers = [reader for source in sources for reader in _readers_of(source, settings, codec, open_shard)]
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


def unique_names(contexts: Sequence[VideoContext]) -> list[VideoContext]:
    """Return contexts with unique names: a repeated name gets a number."""
    named: dict[str, VideoContext] = {}
    for context in contexts:
        name, number = context.name, 1
        while name in named:
            number += 1
            name = f"{context.name}-{number}"
        named[name] = replace(context, name=name)
    return list(named.values())


_Reader = Callable[[], VideoContext]
"""Reads one context; raises `InputError` if it cannot be used."""


def _readers_of(
    source: str | Tensor | VideoContext,
    settings: ContextSettings,
    codec: Codec,
    open_shard: Callable[[Path], ShardReader],
) -> list[_Reader]:
    if isinstance(source, VideoContext):
        return [lambda: source]
    if isinstance(source, Tensor):
        return [partial(_read_frames, source, settings, codec)]
    path = Path(source)
    shard, _, sample = source.rpartition("#")
    if shard.endswith(SHARD_EXTENSION) and not path.exists():
        reader = open_shard(Path(shard))
        return [partial(_read_sample, reader, _sample_number(sample, reader), settings, codec)]
    if not os.path.exists(path):
        raise InputError(f"{source} does not exist: give a video, an image, a folder of either, or a shard.")
    if path.suffix == SHARD_EXTENSION:
        reader = open_shard(path)
        return [partial(_read_sample, reader, number, settings, codec) for number in range(len(reader))]
    if path.is_dir():
        return _readers_of_folder(path, settings, codec)
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
        raise InputError(
            f"{folder} contains no videos and no images: give another folder, or a shard as PATH.tar{reasons}."
        )
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
        needed = _context_frames(math.ceil(count / stride), source.path, settings, codec)
        frames = list(source.read(count - 1 - (needed - 1) * stride, stride, None))
    else:
        number = source.number_at(settings.start)
        if number is None:
            raise InputError(f"--start {settings.start:g} is after the end of {source.path}: give an earlier time.")
        frames = list(source.read(number, stride, settings.frames + settings.ground_truth_frames))
        needed = _context_frames(len(frames), source.path, settings, codec)
    if len(frames) < needed:
        raise _too_short_error(source.path, len(frames), settings, codec)
    times = [frame.time for frame in frames[:needed]]
    if uneven := uneven_intervals(times):
        log.warning(
            "warning: the intervals between the frames of the context of %s are uneven (%.3g to %.3g s)",
            source.path,
            *uneven,
        )
    pixels = torch.stack([frame.pixels for frame in frames])
    fps = fps_of_clip(times, stride, source.fps) / stride
    return VideoContext(_name_for_files(source.name), pixels[:needed], pixels[needed:], fps)


def _context_frames(available: int, path: Path | str, settings: ContextSettings, codec: Codec) -> int:
    """Return the number of pixel frames of the context of a video that has `available` frames at the stride.

    Raises:
        InputError: the video is too short.
    """
    if available >= settings.frames:
        return settings.frames
    frames = settings.encodable_frames(available, codec)
    if not settings.may_be_shorter or not frames:
        raise _too_short_error(path, available, settings, codec)
    log.info(
        "%s has %s at stride %d: its context has %s instead of %d",
        path,
        counted(available, "frame"),
        settings.stride,
        counted(frames, "frame"),
        settings.frames,
    )
    return frames


def _read_still_image(path: Path, settings: ContextSettings, codec: Codec) -> VideoContext:
    _check_no_start(path, settings)
    _check_one_frame(path, settings, codec)
    return _still_image(_name_for_files(path.stem), read_image(path), settings)


def _read_frames(frames: Tensor, settings: ContextSettings, codec: Codec) -> VideoContext:
    """Read the context from a clip in memory, uint8 (T, 3, H, W)."""
    if len(frames) > 1:
        return _read_clip(frames_in_memory(frames, settings.source_fps(), settings.sizes), settings, codec)
    _check_no_start("the given image", settings)
    _check_one_frame("the given image", settings, codec)
    return _still_image("image", frames, settings)


def _still_image(name: str, image: Tensor, settings: ContextSettings) -> VideoContext:
    """Return the context of one frame that an image (1, 3, H, W) is."""
    pixels = torch.stack(list(resized(image, settings.sizes)))
    return VideoContext(name, pixels, pixels[:0], settings.frame_rate())


def _open_shard(path: Path, settings: ContextSettings, codec: Codec) -> ShardReader:
    """Open a shard, and check that its samples match the codec and the training clips."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: give the path of a shard of latents.")
    manifest, reader = _find_in_manifest(path)
    manifest.codec.check_same(
        codec.spec(), f"the latents of {manifest.path}", f"the checkpoint's codec from {codec.source or 'the package'}"
    )
    frames, _, *sides = reader.entry.shape
    height, width = (side * codec.spatial_factor for side in sides)
    if reader.entry.kind == "sequence":
        raise InputError(f"{path} contains sequences of image pairs: give a shard of videos or images.")
    if (height, width) not in settings.sizes:
        sizes = ", ".join(f"{height}x{width}" for height, width in settings.sizes)
        raise InputError(
            f"{path} has samples of {height}x{width} pixels, but the checkpoint was trained on {sizes}: give others."
        )
    if reader.entry.kind == "video":
        _context_frames(codec.pixel_frames(frames), path, settings, codec)
    _check_no_start(path, settings)
    return reader


def _find_in_manifest(path: Path) -> tuple[Manifest, ShardReader]:
    """Find the manifest that lists a shard, and open the shard."""
    for folder in path.absolute().parents[:MANIFEST_SEARCH_DEPTH]:
        if (folder / FILE_NAME).is_file():
            manifest = Manifest.load(folder, check_files=False)  # other shards may be missing
            for entry in manifest.shards:
                if folder / entry.path == path.absolute():
                    return manifest, ShardReader(folder, entry)
    raise InputError(
        f"no {FILE_NAME} in the folder of {path} or the two above lists this shard: copy the one it was made with."
    )


def _sample_number(sample: str, reader: ShardReader) -> int:
    """Parse the number or key of a sample. A key is the shard's name, a dash, and the number in six digits."""
    number = sample.removeprefix(f"{reader.path.stem}-")
    if not number.isdecimal() or int(number) >= len(reader):
        last = len(reader) - 1
        raise InputError(
            f"{reader.path} has no sample {sample!r}: give 0 to {last}, or {reader.path.stem}-000000 to -{last:06d}."
        )
    return int(number)


def _read_sample(reader: ShardReader, number: int, settings: ContextSettings, codec: Codec) -> VideoContext:
    is_video = reader.entry.kind == "video"
    context_frames = 1
    if is_video:
        pixel_frames = min(settings.frames, codec.pixel_frames(reader.entry.shape[0]))
        context_frames = codec.latent_frames(settings.encodable_frames(pixel_frames, codec))
    else:
        _check_one_frame(f"a sample of {reader.path}", settings, codec)
    later_frames = math.ceil(settings.ground_truth_frames / codec.temporal_factor)
    values, metadata = reader.read(number, min(context_frames + later_frames, reader.entry.shape[0]))
    if is_video and (stride := metadata.get("stride", 1)) != settings.stride:
        raise InputError(
            f"sample {number} of {reader.path} has stride {stride}, but the context is read at stride "
            f"{settings.stride}, by default that of training: give samples of that stride."
        )
    latents = torch.from_numpy(values.astype(np.float32))
    pixels = codec.decode(latents[None])[0].cpu()
    frames = codec.pixel_frames(context_frames)
    return VideoContext(
        name=_name_for_files(metadata["key"]),
        pixels=pixels[:frames],
        ground_truth=pixels[frames : frames + settings.ground_truth_frames],
        fps=settings.source_fps(metadata.get("fps")) / settings.stride,
        latents=latents[:context_frames],
        label=metadata.get("label"),
    )


def _too_short_error(path: Path | str, frames: int, settings: ContextSettings, codec: Codec) -> InputError:
    earlier = ", an earlier --start" if settings.start else ""
    most = settings.encodable_frames(frames, codec)
    fewer = f" or at most {most} --context_frames" if most else ""
    return InputError(
        f"{path} has {counted(frames, 'frame')} at stride {settings.stride}, but the context needs "
        f"{settings.frames}: give a longer video{earlier}{fewer}."
    )


def _check_one_frame(path: Path | str, settings: ContextSettings, codec: Codec) -> None:
    """Raise InputError if an image, which is one frame, is no whole block of the model."""
    if not settings.encodable_frames(1, codec):
        assert settings.layout is not None
        raise InputError(
            f"{path} is one frame, but the first block of the model has {settings.layout.first_frames} latent frames "
            f"({codec.pixel_frames(settings.layout.first_frames)} frames of a video): give a video, or no context."
        )


def _check_no_start(path: Path | str, settings: ContextSettings) -> None:
    if settings.start:
        raise InputError(f"{path} has no frame at {settings.start:g} s: give --start for videos only.")


def folder_name(label: str) -> str:
    """Return the name of the folder of a class: its label, unless it cannot be the name of a folder and of files."""
    is_name = label.isprintable() and "/" not in label and not label.startswith(".")
    return label if is_name and len(os.fsencode(label)) <= MAX_LABEL_LENGTH else _name_for_files(label)


def _name_for_files(text: str) -> str:
    """Replace characters that do not belong in a file name by dashes, and shorten the result."""
    return re.sub(r"[^\w.-]+", "-", text)[:MAX_NAME_LENGTH].strip("-.") or "context"
