"""Sources of the frames of a context: video files, folders of images, and clips in memory.

Every frame is scaled and cropped to the size that is closest in aspect ratio, with one large frame in memory at a time.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from gpdit_lightning.media.images import Size, closest_size, resize_and_crop
from gpdit_lightning.media.timing import frame_rate
from gpdit_lightning.media.video import count_frames, frame_number_at, iterate_frames, iterate_images, video_info


class TimedFrame(NamedTuple):
    """A frame, uint8 (3, H, W) of one of the sizes, and the time in seconds at which it is shown."""

    time: float
    pixels: Tensor


class FrameSource(ABC):
    """The frames of one video.

    Attributes:
        path: the file or folder, or the words for a clip in memory; for messages.
        name: name of the context.
        fps: average frames per second.
    """

    path: Path | str
    name: str
    fps: Fraction

    @abstractmethod
    def read(self, start: int, stride: int, max_frames: int | None) -> Iterator[TimedFrame]:
        """Yield at most `max_frames` frames, from number `start` on at a stride."""

    @abstractmethod
    def count(self) -> int:
        """Return the number of frames."""

    @abstractmethod
    def number_at(self, time: float) -> int | None:
        """Return the number of the frame whose time is closest; None if the time is after the end."""


class VideoFile(FrameSource):
    """The frames of a video file.

    Args:
        path: the file.
        resampled_fps: frames per second to which the video is resampled in time; None for its stored frames.
        sizes: possible (height, width).

    Raises:
        InputError: the file cannot be read.
    """

    def __init__(self, path: Path, resampled_fps: float | None, sizes: Sequence[Size]) -> None:
        info = video_info(path)
        self.path, self.name, self._resampled_fps = path, path.stem, resampled_fps
        self.fps = info.fps if resampled_fps is None else frame_rate(resampled_fps)
        self._size = closest_size(info.height, info.width, sizes)

    def read(self, start: int, stride: int, max_frames: int | None) -> Iterator[TimedFrame]:
        """Decode frames one by one."""
        frames = iterate_frames(self.path, start, stride, max_frames, self._resampled_fps)
        return (TimedFrame(frame.time, frame.resized(self._size)) for frame in frames)

    def count(self) -> int:
        """Count the frames, after the resampling."""
        return count_frames(self.path, self._resampled_fps)

    def number_at(self, time: float) -> int | None:
        """Return the number of a frame by the time stamps of the file."""
        return frame_number_at(self.path, time, self._resampled_fps)


class ImageSequence(FrameSource):
    """Images that are the frames of a video at a constant rate.

    Args:
        path: their folder, or the words for a clip in memory; for messages.
        name: name of the context.
        count: number of images.
        fps: frames per second.
        sizes: possible (height, width).
        read_images: yields images (3, H, W), called with the arguments of `read`.
    """

    def __init__(
        self,
        path: Path | str,
        name: str,
        count: int,
        fps: Fraction,
        sizes: Sequence[Size],
        read_images: Callable[[int, int, int | None], Iterable[Tensor]],
    ) -> None:
        self.path, self.name, self.fps = path, name, fps
        self._count, self._sizes, self._read_images = count, sizes, read_images

    def read(self, start: int, stride: int, max_frames: int | None) -> Iterator[TimedFrame]:
        """Read images one by one; their times follow from the frame rate."""
        images = resized(self._read_images(start, stride, max_frames), self._sizes)
        return (TimedFrame(float((start + i * stride) / self.fps), image) for i, image in enumerate(images))

    def count(self) -> int:
        """Return the number of images."""
        return self._count

    def number_at(self, time: float) -> int | None:
        """Return the number of an image by the frame rate."""
        number = round(Fraction(time) * self.fps)
        return number if number < self._count else None


def image_folder(path: Path, count: int, fps: Fraction, sizes: Sequence[Size]) -> ImageSequence:
    """Return the images of a folder, in natural order, as the frames of a video."""
    name = os.path.basename(os.path.abspath(path))
    return ImageSequence(path, name, count, fps, sizes, partial(iterate_images, path))


def frames_in_memory(frames: Tensor, fps: Fraction, sizes: Sequence[Size]) -> ImageSequence:
    """Return a clip in memory, uint8 (T, 3, H, W), as the frames of a video."""
    return ImageSequence(
        "the given clip",
        "clip",
        len(frames),
        fps,
        sizes,
        lambda start, stride, max_frames: frames[start::stride][:max_frames],
    )


def resized(frames: Iterable[Tensor], sizes: Sequence[Size]) -> Iterator[Tensor]:
    """Scale and crop frames (3, H, W) one at a time, each to the size that is closest in aspect ratio."""
    for frame in frames:
        height, width = frame.shape[1:]
        yield resize_and_crop(frame[None], closest_size(height, width, sizes))[0]
