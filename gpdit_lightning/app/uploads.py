"""Uploaded files: checked by their content, read once as the context of a video, and deleted."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
from PIL import Image

from gpdit_lightning.errors import InputError
from gpdit_lightning.generation.contexts import VideoContext
from gpdit_lightning.generation.pipeline import GPDiTPipeline
from gpdit_lightning.media.containers import input_options
from gpdit_lightning.media.images import IMAGE_FORMATS
from gpdit_lightning.media.mp4_headers import check_mp4_header
from gpdit_lightning.options.sample import GenerationOptions
from gpdit_lightning.regular_files import check_regular

# FFmpeg's formats of one file each. Others, such as playlists, would make FFmpeg open further files or addresses.
VIDEO_FORMATS = ("mov", "matroska", "avi", "gif", "mpegts", "mpeg", "flv", "asf", "ogg")
MAX_IMAGE_PIXELS = 64_000_000
MAX_VIDEO_PIXELS = 4096 * 2304  # a frame of 4K video
MAX_FRAMES_PER_SECOND = 240


@dataclass(frozen=True)
class UploadLimits:
    """What an upload may be.

    Attributes:
        megabytes: largest file.
        seconds: longest video.
    """

    megabytes: int
    seconds: float

    def check_bytes(self, name: str, size: int) -> None:
        """Raise an InputError if a file is too large."""
        if size > self.megabytes * 1_000_000:
            raise InputError(
                f"{name} is larger than {self.megabytes} MB: give a smaller file, or start the server with a larger "
                "--max_upload."
            )


class Upload(NamedTuple):
    """What was read from an uploaded file.

    Attributes:
        context: the given frames.
        duration: time in seconds from the first to the last frame of the video; 0 for an image.
    """

    context: VideoContext
    duration: float


def read_upload(
    file: Path, name: str, pipeline: GPDiTPipeline, limits: UploadLimits, start: float | None = None
) -> Upload:
    """Read an uploaded file as a context: frames of a video, or an image.

    A video that is too short for a context like those of training gives a shorter one.

    Args:
        file: the file; its extension is replaced by one that matches its content.
        name: the user's name of the file, for messages.
        pipeline: the model for which the context is read.
        limits: maximum size and duration.
        start: time in seconds at which the context begins in a video; None for the last frames.

    Raises:
        InputError: the file is neither a video nor an image, exceeds a limit, cannot be read, or ends before `start`.
    """
    try:
        check_regular(file, "give a video or an image")
        duration = 0.0
        if _is_image(file):
            file = file.rename(file.with_suffix(".png"))
        else:
            file = file.rename(file.with_suffix(".mp4"))
            duration = _checked_duration(file, limits)
        if start is not None and not 0 <= start <= duration:
            raise InputError(f"start is {start:g}, but the last frame of {file} is at {duration:.2f} s: give less.")
        (clip,) = pipeline.plan([str(file)], GenerationOptions(start=start)).clips
        return Upload(clip.context, duration)
    except InputError as error:
        message = str(error)
        for extension in (".png", ".mp4", ""):
            message = message.replace(str(file.with_suffix(extension)), name)
        raise InputError(message) from None
    except OSError as error:  # such as a temporary folder that was emptied
        raise InputError(f"{name} cannot be read ({error.strerror}): give it again.") from None


def _is_image(file: Path) -> bool:
    """Return whether a file is a still image; its size is checked before it is decoded."""
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            width, height = image.size
            animated = image.format == "GIF" and getattr(image, "n_frames", 1) > 1
    except Exception:  # for some files Pillow raises other exceptions than OSError
        return False
    limit = MAX_VIDEO_PIXELS if animated else MAX_IMAGE_PIXELS
    _check_pixels(file, height, width, limit)
    return not animated


def _checked_duration(file: Path, limits: UploadLimits) -> float:
    """Check a video without decoding it, and return the time in seconds from its first to its last frame.

    The duration is that of the time stamps, since the header may state anything.

    Raises:
        InputError: the file is no video of a known format, or exceeds a limit.
    """
    try:
        check_mp4_header(file)
        options = input_options(VIDEO_FORMATS)
        with av.open(f"file:{file}", options=options, metadata_errors="replace") as container:
            if not container.streams.video:
                raise InputError(f"{file} contains no video: give a video or an image.")
            for stream in container.streams.video:
                if stream.codec_context is not None:
                    _check_pixels(file, stream.codec_context.height, stream.codec_context.width, MAX_VIDEO_PIXELS)
            stream = container.streams.best("video") or container.streams.video[0]
            packets, first, last = 0, None, 0.0
            for packet in container.demux(stream):
                if packet.size == 0:
                    continue
                packets += 1
                if packet.pts is not None:
                    time = float(packet.pts * packet.time_base)
                    first = time if first is None else min(first, time)
                    last = max(last, time)
                if (first is not None and last - first > limits.seconds) or (
                    packets > limits.seconds * MAX_FRAMES_PER_SECOND
                ):
                    raise InputError(
                        f"{file} is longer than {limits.seconds:g} seconds: give a shorter video, or start the server "
                        "with a larger --max_upload_seconds."
                    )
            return 0.0 if first is None else last - first
    except InputError:
        raise
    except Exception:  # for values that no player would accept, PyAV raises unrelated exceptions
        raise InputError(
            f"{file} is neither a video nor an image that can be read: give an mp4, mov, webm, mkv, avi or GIF file, "
            "or a JPEG, PNG, WebP, AVIF, BMP or TIFF image."
        ) from None


def _check_pixels(file: Path, height: int, width: int, limit: int) -> None:
    if height * width > limit:
        raise InputError(
            f"{file} has {width}x{height} pixels, and at most {limit / 1e6:.0f} million are accepted: scale it down."
        )
