"""Videos: reading frame by frame, writing mp4 frame by frame, through PyAV; folders of frames."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import av
import torch
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write
from gpdit_lightning.media.images import IMAGE_EXTENSIONS, read_image

VIDEO_EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".gif")

T = TypeVar("T")


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video before it is read."""

    fps: Fraction
    """Frames a second."""
    height: int
    width: int
    frames: int | None
    """None where the file's header does not say."""


def video_info(path: str | Path, threads: int = 0) -> VideoInfo:
    """Read a video's header and first frame; the size is of upright frames.

    Args:
        path: any video that FFmpeg reads, or a GIF.
        threads: of the decoder; 0 leaves it to FFmpeg.

    Raises:
        InputError: when the file is missing, no video, or empty.
    """
    with _opened(path, threads) as stream:
        frame = next(stream.container.decode(stream), None)
        if frame is None:
            raise InputError(f"{path} holds no frames: replace or remove it.")
        fps = stream.average_rate or stream.guessed_rate
        if not fps:
            raise InputError(f"{path} does not say how many frames it has a second: convert it to mp4.")
        height, width = _upright(frame, frame.width, frame.height).shape[1:]
        return VideoInfo(Fraction(fps), height, width, stream.frames or None)


def iterate_frames(
    path: str | Path, start: int = 0, stride: int = 1, most: int | None = None, threads: int = 0
) -> Iterator[Tensor]:
    """The frames of a video, one in memory at a time.

    Args:
        path: any video that FFmpeg reads, or a GIF.
        start: number of the first frame wanted.
        stride: every stride-th frame from there on (GPDiT takes every third, section 5.1).
        most: stop after this many; None for all.
        threads: of the decoder; 0 leaves it to FFmpeg. What is left of a damaged video may depend on it.

    Yields:
        uint8 RGB (3, H, W), upright. Frames that change size midway are scaled to the first one's.

    Raises:
        InputError: when the file is missing or no video; where it is broken midway, after the frames before that.
    """
    with _opened(path, threads) as stream:
        size: tuple[int, int] | None = None
        for frame in _chosen(stream.container.decode(stream), start, stride, most):
            size = size or (frame.width, frame.height)
            yield _upright(frame, *size)


def read_video(path: str | Path, start: int = 0, stride: int = 1, most: int | None = None) -> Tensor:
    """Frames as one tensor, uint8 (T, 3, H, W); arguments and errors as for `iterate_frames`.

    Raises:
        InputError: also when the range holds no frame.
    """
    frames = list(iterate_frames(path, start, stride, most))
    if not frames:
        raise InputError(f"{path} has no frame from number {start} on: start earlier.")
    return torch.stack(frames)


def iterate_images(folder: str | Path, start: int = 0, stride: int = 1, most: int | None = None) -> Iterator[Tensor]:
    """The pictures in a folder as the frames of a video, one in memory at a time; arguments as for `iterate_frames`.

    They come in `natural_sort_key`; hidden files and other files are ignored.

    Yields:
        uint8 RGB (3, H, W), upright.

    Raises:
        InputError: when the folder holds no pictures, or where one is broken or of another size than the first.
    """
    paths = [path for path in Path(folder).glob("[!.]*") if path.suffix.lower() in IMAGE_EXTENSIONS]
    if not paths:
        raise InputError(f"{folder} holds no images: give a folder with {', '.join(IMAGE_EXTENSIONS)} files.")
    first: tuple[Path, torch.Size] | None = None
    for path in _chosen(iter(sorted(paths, key=natural_sort_key)), start, stride, most):
        frame = read_image(path)[0]
        first = first or (path, frame.shape)
        if frame.shape != first[1]:
            raise InputError(
                f"{path} has {frame.shape[1]}x{frame.shape[2]} pixels and {first[0]} {first[1][1]}x{first[1][2]}: "
                f"scale the frames of a video to one size."
            )
        yield frame


def natural_sort_key(path: Path) -> tuple[list[str | int], str]:
    """The key that sorts files by the numbers in their names: frame_2 before frame_10."""
    parts = re.split(r"(\d+)", path.name)  # text and digits by turns, so that like meets like
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], path.name


class VideoWriter:
    """Writes an mp4 (H.264, 4:2:0, near lossless) as its frames come, whole or not at all.

        with VideoWriter("long.mp4", fps=8) as video:
            for pixels in pieces:
                video.write(pixels)

    The file is there when the block has ended well; where the block raises, an older one stays. Memory does not grow.

    Args:
        path: the file; an older one is replaced.
        fps: frames a second.

    Raises:
        InputError: at the end of the block, when no frame was written.
    """

    def __init__(self, path: str | Path, fps: Fraction | float) -> None:
        self._path = Path(path)
        self._rate = Fraction(fps).limit_denominator(65535)
        self._stream: av.VideoStream | None = None

    def __enter__(self) -> Self:
        self._file = self._written()
        self._file.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self._file.__exit__(kind, error, traceback)

    def write(self, pixels: Tensor) -> None:
        """Add frames.

        Args:
            pixels: uint8 (T, 3, H, W), T >= 0; H and W even, as 4:2:0 stores one colour for 2x2 pixels, and the same
                in all calls.

        Raises:
            InputError: for anything else.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise InputError(
                f"The video for {self._path} is {pixels.dtype} {tuple(pixels.shape)} where uint8 (T, 3, H, W) belongs: "
                f"convert it."
            )
        if len(pixels) == 0:
            return
        height, width = pixels.shape[2:]
        if height % 2 or width % 2:
            raise InputError(
                f"The video for {self._path} is {height}x{width} and mp4 needs even sides: crop one row or column."
            )
        if self._stream is None:
            self._stream = self._container.add_stream("libx264", self._rate, options={"crf": "12"})
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        if (self._stream.height, self._stream.width) != (height, width):
            raise InputError(
                f"The video for {self._path} is {self._stream.height}x{self._stream.width} and goes on with "
                f"{height}x{width}: give all its frames one size."
            )
        # Contiguous, and converted before the encoder sees it: where PyAV 18.1 does either by itself, every second file
        # differs by a few levels from run to run; so, hardly any.
        for image in pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy():
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            self._container.mux(self._stream.encode(frame))

    @contextmanager
    def _written(self) -> Iterator[None]:
        """The file during the block, and what the encoder still holds at its end."""
        with atomic_write(self._path) as temporary, av.open(str(temporary), "w", format="mp4") as self._container:
            yield
            if self._stream is None:
                raise InputError(f"The video for {self._path} has no frames: give it at least one frame.")
            self._container.mux(self._stream.encode())


def write_video(path: str | Path, pixels: Tensor, fps: Fraction | float) -> None:
    """Write frames (T, 3, H, W) that are all there; arguments and errors as for `VideoWriter`."""
    with VideoWriter(path, fps) as video:
        video.write(pixels)


def _chosen(frames: Iterator[T], start: int, stride: int, most: int | None) -> Iterator[T]:
    """The frames that `start`, `stride` and `most` name; `InputError` where they name none."""
    if start < 0 or stride < 1 or (most is not None and most < 0):
        raise InputError(
            f"start {start}, stride {stride}, most {most} is no range of frames: count from 0, by 1 or more."
        )
    return islice(frames, start, None if most is None else start + most * stride, stride)


@contextmanager
def _opened(path: str | Path, threads: int) -> Iterator["av.VideoStream"]:
    """The first video stream of a file; whatever FFmpeg finds wrong, while open, becomes an `InputError`."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist: give the path of a video.")
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise InputError(f"{path} holds no video: replace or remove it.")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            if stream.codec_context is not None:  # as of an mp4 that was cut off
                stream.codec_context.thread_count = threads
            yield stream
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{path} is no readable video ({error.strerror or error}): replace or remove it.") from None


def _upright(frame: "av.VideoFrame", width: int, height: int) -> Tensor:
    """A decoded frame, scaled to width and height, then turned as its rotation says: uint8 (3, H, W)."""
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24", width=width, height=height)).permute(2, 0, 1)
    return pixels.rot90(round(frame.rotation / 90), (1, 2)).contiguous()
