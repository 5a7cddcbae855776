"""Videos: writing mp4 files one piece at a time (PyAV)."""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import torch
from av.filter import Graph
from av.video.reformatter import ColorPrimaries, ColorRange, ColorTrc
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write
from gpdit_lightning.media.display import HD_LINES
from gpdit_lightning.media.timing import frame_rate

# Codes of ITU-T H.273, by the names of FFmpeg's scale filter.
MATRICES = {"bt709": 1, "smpte170m": 6}
# crf 12 is nearly lossless. x264's macroblock tree is off, since its AVX-512 code reads memory that was never written,
# and without assembler it depends on the timing of threads: the same frames then give different files.
X264_OPTIONS = {"crf": "12", "mbtree": "0"}


class VideoWriter:
    """Context manager that writes frames to an mp4 file (H.264, 4:2:0, nearly lossless) in nearly constant memory.

        with VideoWriter("long.mp4", fps=8) as video:
            for pixels in pieces:
                video.write(pixels)

    The file appears, or replaces an existing one, when the block ends without an exception. The same frames give the
    same bytes on one machine. The colours are tagged as they are encoded: sRGB's primaries and transfer function,
    limited range, and the matrix of BT.709 from `HD_LINES` lines on, of BT.601 below.

    Memory grows by 70 bytes per frame: FFmpeg keeps the index that an mp4 has at its end. (A fragmented mp4 has none,
    but not every player can seek in it.)

    Args:
        path: the file; any name that the file system allows.
        fps: frames per second.

    Raises:
        InputError: at the end of the block, if no frames were written.
    """

    def __init__(self, path: str | Path, fps: Fraction | float) -> None:
        self._path = Path(path)
        self._rate = frame_rate(fps)
        self._stream: av.VideoStream | None = None
        self._frames = 0

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
            self._stream = self._add_stream(height, width)
        if (self._stream.height, self._stream.width) != (height, width):
            raise InputError(
                f"the frames for {self._path} are {self._stream.height}x{self._stream.width} and later ones "
                f"{height}x{width}: give all of them one size."
            )
        for image in pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy():
            self._conversion.vpush(av.VideoFrame.from_ndarray(image, format="rgb24"))
            frame = self._conversion.vpull()
            frame.pts, frame.time_base = self._frames, 1 / self._rate
            self._container.mux(self._stream.encode(frame))
            self._frames += 1

    def _add_stream(self, height: int, width: int) -> "av.VideoStream":
        """Add the video stream to the file, and build the conversion of its frames from RGB."""
        matrix = "bt709" if height >= HD_LINES else "smpte170m"
        self._conversion = _conversion_from_rgb(height, width, matrix)
        stream = self._container.add_stream("libx264", self._rate, options=X264_OPTIONS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.colorspace = MATRICES[matrix]
        stream.codec_context.color_primaries = ColorPrimaries.BT709  # which are sRGB's
        stream.codec_context.color_trc = ColorTrc.IEC61966_2_1  # sRGB
        stream.codec_context.color_range = ColorRange.MPEG
        return stream

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Open the file for the block, and write the encoder's remaining frames at its end."""
        # The prefix keeps FFmpeg from taking a name's beginning for a protocol, as in "clip:1.mp4".
        with (
            atomic_write(self._path) as temporary,
            av.open(f"file:{temporary}", "w", format="mp4") as self._container,
        ):
            yield
            if self._stream is None:
                raise InputError(f"there are no frames for {self._path}: write at least one.")
            self._container.mux(self._stream.encode())


def write_video(path: str | Path, pixels: Tensor, fps: Fraction | float) -> None:
    """Write frames (T, 3, H, W) to an mp4 file; arguments and errors as for `VideoWriter`."""
    with VideoWriter(path, fps) as video:
        video.write(pixels)


def _conversion_from_rgb(height: int, width: int, matrix: str) -> Graph:
    """Return an FFmpeg filter graph that converts RGB frames to limited-range 4:2:0 with a colour matrix."""
    # Without out_color_matrix swscale uses BT.601 for every size. H.264's chroma samples are at the left.
    scaling = {
        "out_color_matrix": matrix,
        "out_range": "limited",
        "out_chroma_loc": "left",
        "flags": "area+accurate_rnd+full_chroma_inp+bitexact",
    }
    graph = Graph()
    graph.link_nodes(
        graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=Fraction(1)),
        graph.add("scale", **scaling),
        graph.add("format", "yuv420p"),
        graph.add("buffersink"),
    ).configure()
    return graph
