"""Videos: reading files and folders of frames one frame at a time (PyAV)."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TypeVar

import av
import torch
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import IMAGE_EXTENSIONS, read_image
from gpdit_lightning.retries import retried, retried_iterator, transient_error

VIDEO_EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".gif")

T = TypeVar("T")


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video from its header and first frame.

    Attributes:
        fps: frames per second.
        height, width: of the frames after rotation.
        frames: number of frames; None if the header lacks it.
    """

    fps: Fraction
    height: int
    width: int
    frames: int | None


@retried
def video_info(path: str | Path, threads: int = 0) -> VideoInfo:
    """Read a video's header and first frame.

    Args:
        path: any video that FFmpeg reads, or a GIF.
        threads: decoder threads; 0 lets FFmpeg choose.

    Raises:
        InputError: the file is missing, not a video, or without frames or frame rate.
        TransientError: three attempts to read it failed for a reason other than its content.
    """
    with _open_video_stream(path, threads) as stream:
        frame = next(stream.container.decode(stream), None)
        if frame is None:
            raise InputError(f"{path} contains no frames: replace or remove it.")
        fps = stream.average_rate or stream.guessed_rate
        if not fps:
            raise InputError(f"{path} has no frame rate: convert it to mp4.")
        height, width = _rgb_pixels(frame, frame.width, frame.height).shape[1:]
        return VideoInfo(Fraction(fps), height, width, stream.frames or None)


@retried_iterator
def iterate_frames(
    path: str | Path, start: int = 0, stride: int = 1, max_frames: int | None = None, threads: int = 0
) -> Iterator[Tensor]:
    """Read the frames of a video, with one of them in memory at a time.

    Args:
        path: any video that FFmpeg reads, or a GIF.
        start: number of the first frame to return, from 0.
        stride: distance between the frames to return (GPDiT: 3, section 5.1).
        max_frames: maximum number of frames to return; None for all.
        threads: decoder threads; 0 lets FFmpeg choose. The frames that can be read from a damaged video may depend on
            it.

    Yields:
        uint8 RGB (3, H, W), with the video's rotation applied. Frames of another size are scaled to that of the first.

    Raises:
        InputError: the file is missing or not a video, or it is damaged; then after the frames before the damage.
        TransientError: three attempts to read it failed for a reason other than its content.
    """
    with _open_video_stream(path, threads) as stream:
        size: tuple[int, int] | None = None
        for frame in _select(stream.container.decode(stream), start, stride, max_frames):
            size = size or (frame.width, frame.height)
            yield _rgb_pixels(frame, *size)


def iterate_images(
    folder: str | Path, start: int = 0, stride: int = 1, max_frames: int | None = None
) -> Iterator[Tensor]:
    """Read the images of a folder, sorted by `natural_sort_key`, as the frames of a video.

    One image is in memory at a time. Hidden files and files that are not images are ignored. Arguments as for
    `iterate_frames`.

    Yields:
        uint8 RGB (3, H, W), with EXIF rotation applied.

    Raises:
        InputError: the folder contains no images, or an image is damaged or differs from the first in size.
    """
    paths = [path for path in Path(folder).glob("[!.]*") if path.suffix.lower() in IMAGE_EXTENSIONS]
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


@contextmanager
def _open_video_stream(path: str | Path, threads: int) -> Iterator["av.VideoStream"]:
    """Open the first video stream of a file; FFmpeg's errors inside the block become `InputError`."""
    try:
        if not Path(path).is_file():
            raise InputError(f"{path} does not exist: give the path of a video.")
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise InputError(f"{path} contains no video: replace or remove it.")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            if stream.codec_context is not None:  # None for a truncated mp4
                stream.codec_context.thread_count = threads
            yield stream
    except Exception as error:
        if transient := transient_error(error, path):
            raise transient from None
        if not isinstance(error, (av.FFmpegError, OSError)):
            raise
        raise InputError(f"{path} is not a readable video ({error.strerror or error}): replace or remove it.") from None


def _rgb_pixels(frame: "av.VideoFrame", width: int, height: int) -> Tensor:
    """Scale a decoded frame, then apply its rotation: uint8 RGB (3, H, W)."""
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24", width=width, height=height)).permute(2, 0, 1)
    return pixels.rot90(round(frame.rotation / 90), (1, 2)).contiguous()
