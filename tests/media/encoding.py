"""Video files for tests, encoded with properties that `VideoWriter` does not write."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.frame import VideoFrame
from torch import Tensor

FULL, LIMITED = 2, 1  # FFmpeg's codes of the range
FPS = 24


def encode(
    path: Path,
    frames: Sequence[VideoFrame],
    codec: str = "libx264",
    options: Mapping[str, str] | None = None,
    aspect: Fraction | None = None,
    matrix: Sequence[int] | None = None,
    tags: Sequence[int] = (),
    filters: Sequence[str] = (),
    times: Sequence[int] | None = None,
    container_options: Mapping[str, str] | None = None,
) -> None:
    """Encode frames of one format and size.

    Args:
        path: the file, whose extension determines the container.
        frames: in order.
        codec: FFmpeg's name of the encoder.
        options: of the encoder.
        aspect: width over height of a pixel.
        matrix: display matrix a, b, c, d of ISO 14496-12, as integers.
        tags: colour matrix, range, transfer and primaries, by FFmpeg's codes; any number of them.
        filters: a bitstream filter with its options, or nothing.
        times: time stamps in units of 1 / FPS; by default 0, 1, 2, ...
        container_options: of the format.
    """
    names = ("colorspace", "color_range", "color_trc", "color_primaries")
    with av.open(str(path), "w", options=dict(container_options or {})) as container:
        stream = container.add_stream(
            codec, FPS, options={**({"level": "3"} if codec == "ffv1" else {}), **(options or {})}
        )
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, frames[0].format.name
        stream.codec_context.sample_aspect_ratio = aspect or Fraction(1)
        stream.codec_context.thread_count = 1
        for name, tag in zip(names, tags, strict=False):
            setattr(stream.codec_context, name, tag)
        if matrix:
            a, b, c, d = (value << 16 for value in matrix)
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        packet_filter = None
        for number, frame in enumerate([*frames, None]):
            if frame is not None:
                frame.pts, frame.time_base = times[number] if times else number, Fraction(1, FPS)
                for name, tag in zip(names, tags, strict=False):
                    setattr(frame, name, tag)
            for packet in stream.encode(frame):
                if filters:
                    packet_filter = packet_filter or av.BitStreamFilterContext(filters[0], stream)
                    container.mux(packet_filter.filter(packet))
                else:
                    container.mux(packet)


def rgb_frame(pixels: Tensor, pixel_format: str = "yuv420p") -> VideoFrame:
    """Convert an image (3, H, W) or (4, H, W), uint8, to a frame."""
    array = pixels.permute(1, 2, 0).contiguous().numpy()
    return VideoFrame.from_ndarray(array, format="rgba" if len(pixels) == 4 else "rgb24").reformat(format=pixel_format)


def plane_frame(pixel_format: str, planes: Sequence[np.ndarray]) -> VideoFrame:
    """Make a frame of planes, each (height, width) in the size of the first and thinned out as the format requires."""
    height, width = planes[0].shape
    frame = VideoFrame(width, height, pixel_format)
    for plane, values in zip(frame.planes, planes, strict=True):
        rows, columns = np.arange(plane.height) * height // plane.height, np.arange(plane.width) * width // plane.width
        data = np.zeros((plane.height, plane.line_size), np.uint8)
        stored = np.ascontiguousarray(values[rows][:, columns].astype("<u2" if values.max() > 255 else np.uint8))
        stored = stored.view(np.uint8).reshape(plane.height, -1)
        data[:, : stored.shape[1]] = stored
        plane.update(data.tobytes())
    return frame


def moving_texture(frames: int, height: int = 64, width: int = 96, speed: int = 2) -> Tensor:
    """Return a smooth gray image that moves to the left, uint8 (frames, 3, height, width)."""
    length = width + speed * frames
    coarse = torch.rand(1, 1, height // 8, length // 8, generator=torch.Generator().manual_seed(0)) * 200 + 28
    image = F.interpolate(coarse, (height, length), mode="bilinear").to(torch.uint8)[0].expand(3, -1, -1)
    return torch.stack([image[..., speed * number : speed * number + width] for number in range(frames)])
