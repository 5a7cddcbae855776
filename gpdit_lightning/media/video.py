"""Videos: reading files and folders of frames one frame at a time, and writing mp4 files (PyAV)."""

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


def video_info(path: str | Path, threads: int = 0) -> VideoInfo:
    """Read a video's header and first frame.

    Args:
        path: any video that FFmpeg reads, or a GIF.
        threads: decoder threads; 0 lets FFmpeg choose.

    Raises:
        InputError: the file is missing, not a video, or without frames or frame rate.
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


class VideoWriter:
    """Context manager that writes frames to an mp4 file (H.264, 4:2:0, nearly lossless) in constant memory.

        with VideoWriter("long.mp4", fps=8) as video:
            for pixels in pieces:
                video.write(pixels)

    The file appears, or replaces an existing one, when the block ends without an exception.

    Args:
        path: the file.
        fps: frames per second.

    Raises:
        InputError: at the end of the block, if no frames were written.
    """

    def __init__(self, path: str | Path, fps: Fraction | float) -> None:
        self._path = Path(path)
        self._rate = Fraction(fps).limit_denominator(65535)
        self._stream: av.VideoStream | None = None

    def __enter__(self) -> Self:
        self._file = self._writing()
        self._file.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self._file.__exit__(kind, error, traceback)

    def write(self, pixels: Tensor) -> None:
        """Append frames.

        Args:
            pixels: uint8 (T, 3, H, W), T >= 0. H and W are the same in all calls, and even, since 4:2:0 stores one
                colour per 2x2 pixels.

        Raises:
            InputError: another data type or shape.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise InputError(
                f"the frames for {self._path} are {pixels.dtype} {tuple(pixels.shape)}, not uint8 (T, 3, H, W): "
                "convert them."
            )
        if len(pixels) == 0:
            return
        height, width = pixels.shape[2:]
        if height % 2 or width % 2:
            raise InputError(
                f"the frames for {self._path} are {height}x{width} and mp4 needs even sides: crop one row or column."
            )
        if self._stream is None:
            self._stream = self._container.add_stream("libx264", self._rate, options={"crf": "12"})
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        if (self._stream.height, self._stream.width) != (height, width):
            raise InputError(
                f"the frames for {self._path} are {self._stream.height}x{self._stream.width} and later ones "
                f"{height}x{width}: give all of them one size."
            )
        # PyAV 18.1 would make frames contiguous and convert them itself, but then every second file differs by a few
        # levels from run to run. With both done here, hardly any does.
        for image in pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy():
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            self._container.mux(self._stream.encode(frame))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Open the file for the block, and write the encoder's remaining frames at its end."""
        with atomic_write(self._path) as temporary, av.open(str(temporary), "w", format="mp4") as self._container:
            yield
            if self._stream is None:
                raise InputError(f"there are no frames for {self._path}: write at least one.")
            self._container.mux(self._stream.encode())


def write_video(path: str | Path, pixels: Tensor, fps: Fraction | float) -> None:
    """Write frames (T, 3, H, W) to an mp4 file; arguments and errors as for `VideoWriter`."""
    with VideoWriter(path, fps) as video:
        video.write(pixels)


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
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist: give the path of a video.")
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise InputError(f"{path} contains no video: replace or remove it.")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            if stream.codec_context is not None:  # None for a truncated mp4
                stream.codec_context.thread_count = threads
            yield stream
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{path} is not a readable video ({error.strerror or error}): replace or remove it.") from None


def _rgb_pixels(frame: "av.VideoFrame", width: int, height: int) -> Tensor:
    """Scale a decoded frame, then apply its rotation: uint8 RGB (3, H, W)."""
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24", width=width, height=height)).permute(2, 0, 1)
    return pixels.rot90(round(frame.rotation / 90), (1, 2)).contiguous()
