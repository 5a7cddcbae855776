"""What a user wants continued: videos, pictures, folders of them and samples of shards, read as a model was trained."""

import math
import os
import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gpdit_lightning.codecs import Codec
from gpdit_lightning.data.manifest import FILE_NAME, Manifest
from gpdit_lightning.data.shards import ShardReader
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import IMAGE_EXTENSIONS, Size, closest_size, read_image, resize_and_crop
from gpdit_lightning.media.video import VIDEO_EXTENSIONS, iterate_frames, iterate_images, natural_sort_key, video_info

T = TypeVar("T")

USUAL_RATE = 24  # frames a second that pictures are taken to have
SHARD_ENDING = ".tar"
LEVELS = 3  # where a shard's manifest is looked for: the shard's folder and two above
LONGEST_NAME = 56  # letters: of up to four bytes each, they leave a file name room for its ending


@dataclass(frozen=True)
class ContextSettings:
    """How contexts are read: as a checkpoint's training clips were, and as the user asks.

    Attributes:
        frames: pixel frames of a context, T = 1 + 4k.
        stride: every stride-th frame of a video is one.
        sizes: (height, width) choices; the closest in aspect is taken.
        ground_truth_frames: how many later frames to read as truth.
        start: second at which the context begins; None: the last frames at multiples of the stride, and no truth.
        fps: frames a second of pictures, which do not say; None for 24.

    Raises:
        InputError: a start before the beginning, or a rate that is not above 0.
    """

    frames: int
    stride: int
    sizes: tuple[Size, ...]
    ground_truth_frames: int = 0
    start: float | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.start is not None and not 0 <= self.start < math.inf:
            raise InputError(f"--start is {self.start}: give a second of the video, from 0 on.")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise InputError(f"--fps is {self.fps}: give frames a second, above 0.")

    def fps_or(self, said: float | None) -> Fraction:
        """Frames a second, before the stride, of what says so itself or else does not."""
        # The exact fraction behind a rounded one: 30000/1001, not 29.97002997002997.
        return Fraction(said or self.fps or USUAL_RATE).limit_denominator(65535)


@dataclass(frozen=True)
class VideoContext:
    """One clip to continue.

    Attributes:
        name: short and fit for a file name; no two of a list are alike.
        pixels: (T, 3, H, W) uint8; T = 0 where a clip is generated from nothing.
        ground_truth: (at most `ContextSettings.ground_truth_frames`, 3, H, W) uint8: the frames that really come next.
        fps: frames a second at the stride, at which the result plays.
        latents: (k, C, h, w) float32, raw, of what a shard holds; `pixels` are decoded from them.
        label: what a shard notes as its sample's label.
    """

    name: str
    pixels: Tensor
    ground_truth: Tensor
    fps: Fraction
    latents: Tensor | None = None
    label: str | None = None


def read_contexts(places: Sequence[str], reading: ContextSettings, codec: Codec) -> list[VideoContext]:
    """Everything to continue, in the order in which it is named.

    Args:
        places: each a video or GIF, a picture (one frame, whatever `reading.frames` says), a folder of frames or of
            videos (in natural order, not in depth), a sample of a shard as PATH.tar#NUMBER (from 0) or PATH.tar#KEY, or
            all samples of a shard as PATH.tar. The context of a sample is its beginning.
        reading: how.
        codec: the model's, which must have made the shards.

    Returns:
        One context or more for each place. All are in memory: of a large shard, name single samples.

    Raises:
        InputError: for what is missing, unreadable, damaged, too short, or unlike the training clips.
    """
    codec.latent_frames(reading.frames)
    open_shard = cache(partial(_open_shard, reading=reading, codec=codec))
    contexts: dict[str, VideoContext] = {}
    for place in places:
        for context in _contexts_at(place, reading, codec, open_shard):
            name, number = context.name, 1
            while name in contexts:
                number += 1
                name = f"{context.name}-{number}"
            contexts[name] = replace(context, name=name)
    return list(contexts.values())


def batches_of_one_shape(items: Sequence[T], batch_size: int, context_of: Callable[[T], VideoContext]) -> list[list[T]]:
    """Batches of at most `batch_size` whose contexts are alike in size and number of frames, otherwise in their order.

    Raises:
        InputError: no room in a batch.
    """
    if batch_size < 1:
        raise InputError(f"--batch_size is {batch_size}: give at least 1.")
    alike: dict[torch.Size, list[T]] = defaultdict(list)
    for item in items:
        alike[context_of(item).pixels.shape].append(item)
    return [group[first : first + batch_size] for group in alike.values() for first in range(0, len(group), batch_size)]


def _contexts_at(
    place: str, reading: ContextSettings, codec: Codec, open_shard: Callable[[Path], ShardReader]
) -> Iterator[VideoContext]:
    path = Path(place)
    tar, _, sample = place.rpartition("#")
    if tar.endswith(SHARD_ENDING):
        reader = open_shard(Path(tar))
        yield _of_sample(reader, _number_of(sample, reader), reading, codec)
    elif not os.path.exists(path):
        raise InputError(
            f"{place} does not exist on this machine: give a video, a picture, a folder of either, or a shard."
        )
    elif path.suffix == SHARD_ENDING:
        reader = open_shard(path)
        for number in range(len(reader)):
            yield _of_sample(reader, number, reading, codec)
    elif path.is_dir():
        yield from _of_folder(path, reading)
    elif path.suffix.lower() in IMAGE_EXTENSIONS:
        yield _of_picture(path, reading)
    else:
        yield _of_video(path, reading)


def _of_folder(folder: Path, reading: ContextSettings) -> Iterator[VideoContext]:
    files = sorted(folder.glob("[!.]*"), key=natural_sort_key)
    videos = [path for path in files if path.suffix.lower() in VIDEO_EXTENSIONS]
    pictures = [path for path in files if path.suffix.lower() in IMAGE_EXTENSIONS]
    if videos and pictures:
        raise InputError(
            f"{folder} holds both videos ({videos[0].name}) and pictures ({pictures[0].name}): give a folder of "
            "videos, or of the frames of one."
        )
    if not videos and not pictures:
        raise InputError(f"{folder} holds no videos and no pictures: give another folder, or a shard as PATH.tar.")
    if pictures:
        yield _clip(folder, partial(iterate_images, folder), reading.fps_or(None), reading, len(pictures))
    for path in videos:
        yield _of_video(path, reading)


def _of_video(path: Path, reading: ContextSettings) -> VideoContext:
    return _clip(path, partial(iterate_frames, path), video_info(path).fps, reading)


def _clip(
    path: Path,
    read: Callable[[int, int, int | None], Iterable[Tensor]],
    fps: Fraction,
    reading: ContextSettings,
    count: int = 0,
) -> VideoContext:
    """The context in a video.

    Args:
        path: of the file or folder.
        read: gives its frames from a number on, every stride-th, at most so many.
        fps: before the stride.
        reading: how.
        count: its frames, where that is known, so that none is read in vain.
    """
    wanted, stride = reading.frames, reading.stride
    if reading.start is None:
        first = max(0, math.ceil(count / stride) - wanted) * stride
        frames = deque(_resized(read(first, stride, None), reading.sizes), maxlen=wanted)
    else:
        found = read(round(reading.start * fps), stride, wanted + reading.ground_truth_frames)
        frames = deque(_resized(found, reading.sizes))
        if not frames:
            raise InputError(f"--start {reading.start:g} is behind the end of {path}: give an earlier second.")
    if len(frames) < wanted:
        raise _too_short(path, len(frames), reading)
    pixels = torch.stack(list(frames))
    name = os.path.basename(os.path.abspath(path)) if path.is_dir() else path.stem
    return VideoContext(_file_name(name), pixels[:wanted], pixels[wanted:], fps / stride)


def _of_picture(path: Path, reading: ContextSettings) -> VideoContext:
    _refuse_start(path, reading)
    pixels = torch.stack(list(_resized(read_image(path), reading.sizes)))
    return VideoContext(_file_name(path.stem), pixels, pixels[:0], reading.fps_or(None) / reading.stride)


def _resized(frames: Iterable[Tensor], sizes: Sequence[Size]) -> Iterator[Tensor]:
    """Frames (3, H, W) as the model takes them, each as it comes: a video may be long and its frames large."""
    for frame in frames:
        height, width = frame.shape[1:]
        yield resize_and_crop(frame[None], closest_size(height, width, sizes))[0]


def _open_shard(tar: Path, reading: ContextSettings, codec: Codec) -> ShardReader:
    """A shard whose samples the model can continue."""
    if not tar.is_file():
        raise InputError(f"{tar} does not exist: give the path of a shard of latents.")
    manifest, reader = _listed(tar)
    manifest.codec.check_same(
        codec.spec(),
        f"The latents to continue, of {manifest.path},",
        f"those that the checkpoint knows, of a codec from {codec.source or 'the package'},",
    )
    frames, _, *sides = reader.entry.shape
    height, width = (side * codec.spatial_factor for side in sides)
    if reader.entry.kind == "sequence":
        raise InputError(f"{tar} holds sequences of pictures, which are no videos: give a shard of videos or images.")
    if (height, width) not in reading.sizes:
        known = ", ".join(f"{height}x{width}" for height, width in reading.sizes)
        raise InputError(
            f"{tar} has samples of {height}x{width} pixels where the checkpoint was trained on {known}: give others."
        )
    if reader.entry.kind == "video" and codec.pixel_frames(frames) < reading.frames:
        raise _too_short(tar, codec.pixel_frames(frames), reading)
    _refuse_start(tar, reading)
    return reader


def _listed(tar: Path) -> tuple[Manifest, ShardReader]:
    """The manifest that lists a shard, and the shard."""
    for folder in tar.absolute().parents[:LEVELS]:
        if (folder / FILE_NAME).is_file():
            manifest = Manifest.load(folder, check_files=False)  # the other shards may lie elsewhere
            for entry in manifest.shards:
                if folder / entry.path == tar.absolute():
                    return manifest, ShardReader(folder, entry)
    raise InputError(f"No {FILE_NAME} in the folder of {tar} or the two above lists it: copy the one it was made with.")


def _number_of(sample: str, reader: ShardReader) -> int:
    """The sample that a number or key names; the key of sample N is the shard's name, a dash and N in six digits."""
    number = sample.removeprefix(f"{reader.path.stem}-")
    if not number.isdecimal() or int(number) >= len(reader):
        last = len(reader) - 1
        raise InputError(
            f"{reader.path} has no sample {sample!r}: give 0 to {last}, or {reader.path.stem}-000000 to -{last:06d}."
        )
    return int(number)


def _of_sample(reader: ShardReader, number: int, reading: ContextSettings, codec: Codec) -> VideoContext:
    is_video = reader.entry.kind == "video"
    known = codec.latent_frames(reading.frames) if is_video else 1
    later = math.ceil(reading.ground_truth_frames / codec.temporal_factor)
    values, metadata = reader.read(number, min(known + later, reader.entry.shape[0]))
    if is_video and (stride := metadata.get("stride", 1)) != reading.stride:
        raise InputError(
            f"Sample {number} of {reader.path} has stride {stride} where the checkpoint was trained at stride "
            f"{reading.stride}: give samples of that stride."
        )
    latents = torch.from_numpy(values.astype(np.float32))
    pixels = codec.decode(latents[None])[0].cpu()
    frames = codec.pixel_frames(known)
    return VideoContext(
        name=_file_name(metadata["key"]),
        pixels=pixels[:frames],
        ground_truth=pixels[frames : frames + reading.ground_truth_frames],
        fps=reading.fps_or(metadata.get("fps")) / reading.stride,
        latents=latents[:known],
        label=metadata.get("label"),
    )


def _too_short(path: Path, frames: int, reading: ContextSettings) -> InputError:
    earlier = ", an earlier --start" if reading.start else ""
    return InputError(
        f"{path} gives {frames} frames at stride {reading.stride}, but the context needs {reading.frames}: take a "
        f"longer video{earlier} or fewer --context_frames (1 + 4k)."
    )


def _refuse_start(path: Path, reading: ContextSettings) -> None:
    if reading.start:
        raise InputError(f"{path} has no second {reading.start:g}: give --start for videos alone.")


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text)[:LONGEST_NAME].strip("-.") or "context"
