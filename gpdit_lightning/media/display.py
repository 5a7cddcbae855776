"""Decoded frames as they are displayed: colours, transparency, orientation, pixel aspect."""

import math
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from PIL import Image
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.media.containers import VideoStream
from gpdit_lightning.media.decoding import DecodedFrame, read_side_data
from gpdit_lightning.media.hdr import TRANSFER_HLG, TRANSFER_PQ, tone_mapped
from gpdit_lightning.media.images import on_white

# Codes of ITU-T H.273, which FFmpeg uses too.
COLOUR_TAGS = ("colorspace", "color_trc", "color_primaries")
UNSPECIFIED = 2
MATRIX_RGB, MATRIX_RESERVED = 0, 3
CONVERTIBLE_MATRICES = (1, 4, 5, 6, 7, 9)  # BT.709, FCC, BT.601 (625 and 525 lines), SMPTE 240M, BT.2020
HD_LINES = 720  # players take untagged video for BT.709 from this number of lines on, else for BT.601
# Levels of limited range (16 to 235) in full range, for gray video, which FFmpeg converts as if it had full range.
FULL_RANGE = ((np.arange(256) - 16) * (255 / 219)).round().clip(0, 255).astype(np.uint8)

ROTATION_TOLERANCE = 1.0  # degrees, as in ffplay
MAX_SIDE = 32767  # pixels of a displayed frame; more is an error in the file


class Orientation(NamedTuple):
    """What to do with the stored rows and columns, in this order."""

    transpose: bool
    flip_rows: bool
    flip_columns: bool


class DisplayedPixels(NamedTuple):
    """Pixels of a frame as it is displayed, before they are made square.

    Attributes:
        pixels: uint8 RGB (3, H, W), upright.
        pixel_aspect: displayed width over displayed height of a pixel.
    """

    pixels: Tensor
    pixel_aspect: Fraction


class Display:
    """Converter of the decoded frames of one video.

    Args:
        video: the video.
    """

    def __init__(self, video: VideoStream) -> None:
        self._name = str(video.path)
        # The fourth byte of a pixel of an uncompressed bitmap is reserved, though FFmpeg takes it for alpha.
        self._is_opaque = video.decoder.name == "rawvideo" and video.container.format.name == "avi"
        self._reformatter = VideoReformatter()
        # Those of the container, since no frame is decoded yet.
        self._tags = {name: getattr(video.stream.codec_context, name) for name in COLOUR_TAGS}

    def convert(self, decoded: DecodedFrame) -> DisplayedPixels:
        """Convert a frame.

        Raises:
            InputError: the colours, the rotation or the pixel aspect are not supported.
        """
        frame, orientation = decoded.frame, orientation_of(decoded.display_matrix, self._name)
        for name, tag in self._tags.items():
            if getattr(frame, name) == UNSPECIFIED:
                setattr(frame, name, tag)
        if frame.color_trc in (TRANSFER_PQ, TRANSFER_HLG):
            pixels = tone_mapped(self._rgb(frame, "rgb48le"), frame.color_trc, frame.color_primaries)
        elif has_alpha(frame) and not self._is_opaque:
            image = on_white(Image.fromarray(self._rgb(frame, "rgba")))
            pixels = torch.from_numpy(np.array(image))
        else:
            rgb = self._rgb(frame, "rgb24")
            limited_gray = frame.format.name.startswith("gray") and frame.color_range == ColorRange.MPEG
            pixels = torch.from_numpy(FULL_RANGE[rgb] if limited_gray else rgb)
        pixels = pixels.permute(2, 1, 0) if orientation.transpose else pixels.permute(2, 0, 1)
        flipped = [axis for axis, flip in ((1, orientation.flip_rows), (2, orientation.flip_columns)) if flip]
        pixels = pixels.flip(flipped).contiguous() if flipped else pixels.contiguous()
        aspect = 1 / decoded.pixel_aspect if orientation.transpose else decoded.pixel_aspect
        if square_width(pixels.shape[2], aspect) > MAX_SIDE:
            ratio = f"{float(decoded.pixel_aspect):g}"
            raise InputError(f"{self._name} states that its pixels are {ratio} times as wide as high: correct that.")
        return DisplayedPixels(pixels, aspect)

    def _rgb(self, frame: "av.VideoFrame", pixel_format: str) -> np.ndarray:
        """Convert a frame to packed RGB (H, W, C) by its matrix and range."""
        converted = self._reformatter.reformat(frame, format=pixel_format, src_colorspace=self._matrix(frame))
        array: np.ndarray = converted.to_ndarray()
        return array

    def _matrix(self, frame: "av.VideoFrame") -> Colorspace | None:
        """Return the matrix to assume; None for the one of the frame."""
        if not is_yuv(frame) or frame.colorspace in CONVERTIBLE_MATRICES:
            return None
        if frame.colorspace not in (MATRIX_RGB, UNSPECIFIED, MATRIX_RESERVED):
            raise InputError(
                f"{self._name} has the colour matrix {frame.colorspace} of ITU-T H.273, which is not supported: "
                "convert it to BT.709."
            )
        if frame.color_trc in (TRANSFER_PQ, TRANSFER_HLG):
            return Colorspace.BT2020
        if frame.format.components[0].bits > 8 and has_dolby_vision(frame):
            raise InputError(
                f"{self._name} has the colours of Dolby Vision profile 5, which are not supported: convert it."
            )
        return Colorspace.ITU709 if frame.height >= HD_LINES else Colorspace.ITU601


def square_width(width: int, pixel_aspect: Fraction) -> int:
    """Return the width at which a frame has square pixels at an unchanged height, as players show it."""
    return max(1, round(width * pixel_aspect))


def has_alpha(frame: "av.VideoFrame") -> bool:
    """Return whether a frame may have transparent pixels."""
    return frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)


def has_dolby_vision(frame: "av.VideoFrame") -> bool:
    """Return whether a frame has metadata of Dolby Vision; with untagged colours they are those of its profile 5."""
    with suppress(ValueError):
        return any(name.startswith("DOVI") for name in read_side_data(frame))
    return False


def is_yuv(frame: "av.VideoFrame") -> bool:
    """Return whether a frame has luma and chroma."""
    return not (frame.format.is_rgb or frame.format.has_palette) and any(c.is_chroma for c in frame.format.components)


def orientation_of(matrix: Sequence[float] | None, name: str) -> Orientation:
    """Return the orientation that a display matrix describes; without a matrix nothing is turned or flipped.

    A stored pixel at column x and row y is displayed in the direction (a x + c y, b x + d y) (ISO 14496-12, 6.2.2;
    libavutil/display.h). As in ffplay, an angle is rounded to the multiple of 90 degrees within one degree.

    Args:
        matrix: the numbers a, b, u, c, d, and others that are ignored.
        name: the video's name in errors.

    Raises:
        InputError: the matrix rotates by another angle.
    """
    a, b, _, c, d = matrix[:5] if matrix else (1, 0, 0, 0, 1)
    if a * d == b * c:
        return Orientation(False, False, False)  # not a rotation; players ignore it
    transpose = abs(b) > abs(a)
    angles = [math.degrees(math.atan2(b, a)), math.degrees(math.atan2(c, d))]
    if others := [angle for angle in angles if abs(angle - 90 * round(angle / 90)) > ROTATION_TOLERANCE]:
        raise InputError(
            f"{name} is displayed rotated by {others[0]:.1f} degrees, and only multiples of 90 are supported: convert "
            "it with the rotation applied."
        )
    across, down = (c, b) if transpose else (a, d)
    return Orientation(transpose, flip_rows=down < 0, flip_columns=across < 0)
