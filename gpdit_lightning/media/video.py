"""Videos: files and folders of frames, read one frame at a time as a player shows them (PyAV)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TypeVar

import av
import torch
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.media.containers import VideoStream, is_video, open_video
from gpdit_lightning.media.decoding import DamagedVideoError, decoded_frames
from gpdit_lightning.media.deinterlacing import deinterlaced
from gpdit_lightning.media.display import Display, square_width
from gpdit_lightning.media.finding import search_folder
from gpdit_lightning.media.images import Size, read_image, resize_and_crop
from gpdit_lightning.media.timing import frame_rate, resampled
from gpdit_lightning.path_kinds import IMAGE_EXTENSIONS
from gpdit_lightning.retries import retried, retried_iterator

__all__ = [
    "DamagedVideoError",
    "VideoFrame",
    "VideoInfo",
    "check_intact",
    "count_frames",
    "is_video",
    "iterate_frames",
    "iterate_images",
    "natural_sort_key",
    "video_info",
]

T = TypeVar("T")


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video from its header and first frame.

    Attributes:
        fps: frames per second by the header; the frames' times may be uneven.
        height, width: of the frames as they are displayed, upright and with square pixels.
        frames: number of frames; None if the header lacks it.
        duration: seconds; None if the header lacks it.
    """

    fps: Fraction
    height: int
    width: int
    frames: int | None
    duration: float | None


@dataclass(frozen=True)
class VideoFrame:
    """A frame of a video.

    Attributes:
        number: index in the video, from 0.
        time: seconds after the first frame, by the time stamps of the file.
        stored: uint8 RGB (3, H, W), upright, with pixels that need not be square.
        pixel_aspect: displayed width over displayed height of a stored pixel.
        displayed_size: height and width of the video's first frame as it is displayed.
    """

    number: int
    time: float
    stored: Tensor
    pixel_aspect: Fraction
    displayed_size: Size

    @property
    def pixels(self) -> Tensor:
        """The frame as it is displayed, uint8 RGB (3, *displayed_size)."""
        return self.resized(self.displayed_size)

    def resized(self, size: Size) -> Tensor:
        """Return the frame scaled, once, to cover a size and cropped at the centre: uint8 RGB (3, *size)."""
        return resize_and_crop(self.stored[None], size, float(self.pixel_aspect))[0]


@retried
def video_info(path: str | Path) -> VideoInfo:
    """Read a video's header and first frame.

    Args:
        path: any file that FFmpeg reads as a video.

    Raises:
        InputError: the file is missing, not a video, or without frames or frame rate, or its display is not supported.
        TransientError: three attempts to read it failed for a reason other than its content.
    """
    with open_video(path) as video:
        frame = next(_displayed_frames(video), None)
        if frame is None:
            raise InputError(f"{path} contains no frames: replace or remove it.")
        fps = video.fps
        if not fps:
            raise InputError(f"{path} has no frame rate: convert it to mp4.")
        height, width = frame.displayed_size
        return VideoInfo(Fraction(fps), height, width, _frames_by_header(video), _duration_by_header(video))


@retried_iterator
def iterate_frames(
    path: str | Path, start: int = 0, stride: int = 1, max_frames: int | None = None, fps: float | None = None
) -> Iterator[VideoFrame]:
    """Read the frames of a video as a player shows them, with one of them in memory at a time.

    Args:
        path: any file that FFmpeg reads as a video.
        start: number of the first frame to return, from 0.
        stride: distance between the frames to return (GPDiT: 3, section 5.1).
        max_frames: maximum number of frames to return; None for all.
        fps: frames per second to which the video is resampled in time, before frames are counted; None for the frames
            as they are stored.

    Yields:
        The frames, upright, by their colour tags and over white. Frames are not scaled until `VideoFrame.pixels` or
        `VideoFrame.resized` is called.

    Raises:
        InputError: the file is missing or not a video, or its display is not supported.
        DamagedVideoError: the video is damaged; after the frames before the damage.
        TransientError: three attempts to read it failed for a reason other than its content.
    """
    with open_video(path) as video:
        yield from _displayed_frames(video, start, stride, max_frames, fps)


@retried
def check_intact(path: str | Path) -> None:
    """Decode a video; raises as :func:`iterate_frames`."""
    with open_video(path) as video:
        for _ in decoded_frames(video):
            pass


@retried
def count_frames(path: str | Path, fps: float | None = None, remarks: list[str] | None = None) -> int:
    """Decode a video and return the number of its frames; of a damaged one, those before the damage.

    Args:
        path: any file that FFmpeg reads as a video.
        fps: as for :func:`iterate_frames`.
        remarks: gets a sentence about the damage.

    Raises:
        InputError: the file is missing or not a video.
    """
    count = 0
    try:
        with open_video(path) as video:
            frames = decoded_frames(video)
            for _ in frames if fps is None else resampled(frames, frame_rate(fps)):
                count += 1
    except DamagedVideoError as error:
        if remarks is not None:
            remarks.append(str(error))
    return count


@retried
def frame_number_at(path: str | Path, time: float, fps: float | None = None) -> int | None:
    """Return the number of the frame whose time is closest; None if the time is after the end of the video.

    The last frame is shown as long as the one before.

    Args:
        path: any file that FFmpeg reads as a video.
        time: seconds after the first frame, by the time stamps of the file.
        fps: as for :func:`iterate_frames`.

    Raises:
        InputError: as :func:`iterate_frames`.
    """
    last, number, interval = Fraction(0), None, Fraction(0)
    with open_video(path) as video:
        frames = decoded_frames(video)
        for frame in frames if fps is None else resampled(frames, frame_rate(fps)):
            if frame.time >= time:
                return number if number is not None and time - last < frame.time - time else frame.number
            last, number, interval = frame.time, frame.number, frame.time - last
    return number if time < last + interval / 2 else None


def iterate_images(
    folder: str | Path, start: int = 0, stride: int = 1, max_frames: int | None = None
) -> Iterator[Tensor]:
    """Read the images of a folder, sorted by `natural_sort_key`, as the frames of a video.

    One image is in memory at a time. Hidden files, subfolders and files that are not images are ignored. Arguments as
    for `iterate_frames`.

    Yields:
        uint8 RGB (3, H, W), with EXIF rotation applied.

    Raises:
        InputError: the folder contains no images, or an image is damaged or differs from the first in size.
    """
    paths = [path for path, _ in search_folder(Path(folder), "image", recursive=False).files]
    if not paths:
        raise InputError(f"{folder} contains no images: give a folder with {', '.join(IMAGE_EXTENSIONS)} files.")
    first: tuple[Path, torch.Size] | None = None
    for path in _select(iter(sorted(paths, key=natural_sort_key)), start, stride, max_frames):
        frame = read_image(path)[0]
        first = first or (path, frame.shape)
        if frame.shape != first[1]:
            raise InputError(
                f"{path} has {frame.shape[1]}x{frame.shape[2]} pixels and {first[0]} {first[1][1]}x{first[1][2]}: "
                "scale the frames of a video to one size."
            )
        yield frame


def natural_sort_key(path: Path) -> tuple[list[str | int], str]:
    """Return a key that sorts files by the numbers in their names: frame_2 before frame_10."""
    parts = re.split(r"(\d+)", path.name)  # text and digits alternate, so that text is compared with text
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], path.name


def _select(frames: Iterator[T], start: int, stride: int, max_frames: int | None) -> Iterator[T]:
    """Return the frames in a range; raises `InputError` if the range is invalid."""
    if start < 0 or stride < 1 or (max_frames is not None and max_frames < 0):
        raise InputError(
            f"start {start}, stride {stride}, max_frames {max_frames} is not a range of frames: give a start and "
            "max_frames of at least 0, and a stride of at least 1."
        )
    return islice(frames, start, None if max_frames is None else start + max_frames * stride, stride)


def _displayed_frames(
    video: VideoStream, start: int = 0, stride: int = 1, max_frames: int | None = None, fps: float | None = None
) -> Iterator[VideoFrame]:
    display = Display(video)
    size: Size | None = None
    frames = deinterlaced(decoded_frames(video))
    # Frames are resampled and selected before they are converted, which takes longer.
    frames = frames if fps is None else resampled(frames, frame_rate(fps))
    for decoded in _select(frames, start, stride, max_frames):
        pixels, aspect = display.convert(decoded)
        size = size or (pixels.shape[1], square_width(pixels.shape[2], aspect))
        yield VideoFrame(decoded.number, float(decoded.time), pixels, aspect, size)


def _frames_by_header(video: VideoStream) -> int | None:
    """Return the number of frames that the header states, without those that an edit list leaves out."""
    frames = video.stream.frames
    if frames and "mp4" in video.container.format.name:
        frames = min(frames, sum(not entry.is_discard for entry in video.stream.index_entries))
    return frames or None


def _duration_by_header(video: VideoStream) -> float | None:
    """Return the duration in seconds that the header states for the video, or for the file."""
    if video.stream.duration is not None and video.stream.time_base:
        return float(video.stream.duration * video.stream.time_base)
    return video.container.duration / av.time_base if video.container.duration else None
