"""Videos: reading frame by frame, writing mp4, through PyAV."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import torch
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.files import written_whole

VIDEO_ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".gif")


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
    if start < 0 or stride < 1 or (most is not None and most < 0):
        raise InputError(
            f"start {start}, stride {stride}, most {most} is no range of frames: count from 0, by 1 or more."
        )
    stop = None if most is None else start + most * stride
    with _opened(path, threads) as stream:
        size: tuple[int, int] | None = None
        for frame in islice(stream.container.decode(stream), start, stop, stride):
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


def write_video(path: str | Path, pixels: Tensor, fps: Fraction | float) -> None:
    """Write an mp4 (H.264, 4:2:0, near lossless), whole or not at all.

    Args:
        path: the file; an older one is replaced.
        pixels: uint8 (T, 3, H, W), H and W even, as 4:2:0 stores one colour for 2x2 pixels.
        fps: frames a second.

    Raises:
        InputError: when there are no frames or a side is odd.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3 or len(pixels) == 0:
        raise InputError(
            f"The video for {path} is {pixels.dtype} {tuple(pixels.shape)} where uint8 (T, 3, H, W) with at least one "
            f"frame belongs: convert it."
        )
    height, width = pixels.shape[2:]
    if height % 2 or width % 2:
        raise InputError(f"The video for {path} is {height}x{width} and mp4 needs even sides: crop one row or column.")
    with written_whole(Path(path)) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(65535)
        stream = container.add_stream("libx264", rate, options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # Contiguous, and converted before the encoder sees it: where PyAV 18.1 does either by itself, every second file
        # differs by a few levels from run to run; so, hardly any.
        for image in pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy():
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


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
