"""Videos: writing mp4 files one piece at a time (PyAV)."""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import torch
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write


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
