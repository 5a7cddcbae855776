"""Video files as FFmpeg reads them: which files are videos, and the one stream of a file that a player shows."""

import logging
import mimetypes
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.logging
from av.stream import Disposition

from gpdit_lightning.errors import InputError
from gpdit_lightning.media.image_headers import check_png_texts
from gpdit_lightning.media.mp4_headers import check_mp4_header
from gpdit_lightning.path_kinds import SEARCHED_EXTENSIONS, VIDEO_EXTENSIONS, does_not_exist
from gpdit_lightning.regular_files import check_regular
from gpdit_lightning.retries import transient_error
from gpdit_lightning.specs import MAX_FRAME_PIXELS

MIME_TYPES = mimetypes.MimeTypes()  # the same on every machine, unlike those of `mimetypes.guess_type`
# FFmpeg would show these files as images of text.
TEXT_FORMATS = ("tty", "bin", "xbin", "adf", "idf")
# Lists of other files, which are videos themselves. FFmpeg would open these files, and wait for those of a live stream.
PLAYLIST_FORMATS = {"concat", "hls", "dash", "imf"}
FORMATS = sorted(av.formats_available - PLAYLIST_FORMATS)
LIMITS = {"max_pixels": str(MAX_FRAME_PIXELS)}  # of a frame: FFmpeg refuses larger ones before it allocates them
MAX_PLAUSIBLE_FPS = 1000  # of the average that FFmpeg states
# Decoders that read the transparency of WebM, which FFmpeg's default decoders ignore. The one of VP9 also detects most
# damage; the default one detects little.
VPX_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# Checks of damage that cost little. FFmpeg's further checks reject intact files of careless encoders.
DETECTION = {"err_detect": "crccheck+bitstream+buffer"}

# For some decoders FFmpeg's messages are the only sign of damage. Outside `ffmpeg_errors` they go to Python's logging.
av.logging.set_level(av.logging.ERROR)
av.logging.set_skip_repeated(False)
logging.getLogger("libav").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class VideoStream:
    """The stream of an open file that a player shows, and its decoder.

    Attributes:
        path: the file.
        container: the open file.
        stream: the stream.
        decoder: its decoder.
        is_cut: whether frames at the end are missing, which FFmpeg does not report.
    """

    path: Path
    container: "av.container.InputContainer"
    stream: "av.VideoStream"
    decoder: "av.VideoCodecContext"
    is_cut: bool

    @property
    def fps(self) -> Fraction | None:
        """Average frames per second by the header, or else FFmpeg's estimate; None if there is neither."""
        average, estimate = self.stream.average_rate, self.stream.guessed_rate
        # For raw DV FFmpeg's average is the number of time units per second, 60000.
        is_plausible = average and average <= MAX_PLAUSIBLE_FPS
        return average if is_plausible or not estimate else estimate


def is_video(path: Path) -> bool:
    """Return whether a file is a video, by its extension; a file with an unknown one is opened.

    A file that cannot be opened counts as a video if its extension is in `VIDEO_EXTENSIONS`.
    """
    suffix = path.suffix.lower()
    if suffix in VIDEO_EXTENSIONS:
        return True
    if suffix in SEARCHED_EXTENSIONS or MIME_TYPES.guess_type(f"file{suffix}")[0]:
        return False  # another kind of file, such as the captions beside each video
    try:
        with open_video(path) as video:
            return not video.container.format.name.endswith("_pipe")  # still images
    except InputError:
        return False


@contextmanager
def ffmpeg_errors(ignored: AbstractSet[str] = frozenset()) -> Iterator[list[str]]:
    """Collect FFmpeg's messages at level ERROR within the block, except those of FFmpeg's threads, in a list.

    Args:
        ignored: names of decoders whose messages are dropped.
    """
    messages: list[str] = []
    with av.logging.Capture() as logged:
        try:
            yield messages
        finally:
            messages[:0] = [message.partition("\n")[0] for _, name, message in logged if name not in ignored]


def input_options(formats: Iterable[str] = FORMATS) -> dict[str, str]:
    """Return the options with which FFmpeg opens one file of some formats, and no other file or address."""
    return {"format_whitelist": ",".join(formats), "protocol_whitelist": "file"} | LIMITS


@contextmanager
def open_video(path: str | Path) -> Iterator[VideoStream]:
    """Open the stream of a file that a player shows; errors of FFmpeg inside the block become `InputError`.

    Args:
        path: any file that FFmpeg reads as a video; it determines the format by the content.

    Raises:
        InputError: the file is missing, not a video, its video has no decoder, or its header exceeds a limit.
        TransientError: it could not be read for a reason other than its content.
    """
    path, messages = Path(path), list[str]()
    try:
        if not path.exists():
            raise InputError(f"{path} {does_not_exist(path)}: give the path of a video.")
        check_regular(path, "give the path of a video")
        is_cut = check_mp4_header(path)
        check_png_texts(path)
        with ffmpeg_errors() as messages:
            # Without "file:" FFmpeg would take the text before a colon in the name for a protocol.
            opened = av.open(f"file:{path}", metadata_errors="replace", options=input_options())
        with opened as container:
            stream = _shown_stream(path, container)
            decoder = _decoder(stream)
            decoder.options = DETECTION | LIMITS
            decoder.copy_opaque = True  # a frame carries the `opaque` of its packet
            # With several threads, the frames that can be read from a damaged video would vary from run to run.
            decoder.thread_count = 1
            yield VideoStream(path, container, stream, decoder, is_cut)
    except Exception as error:
        if any("not on whitelist" in message for message in messages):
            raise InputError(
                f"{path} is a list of other files and contains no video: use these files, and remove it."
            ) from None
        if isinstance(error, InputError):
            raise
        is_of_ffmpeg = isinstance(error, av.FFmpegError)
        if transient := transient_error(error, path, path if is_of_ffmpeg else None):
            raise transient from None
        # For values that no player would accept, PyAV raises unrelated exceptions.
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise InputError(f"{path} is not a readable video ({reason}): replace or remove it.") from error


def _shown_stream(path: Path, container: "av.container.InputContainer") -> "av.VideoStream":
    """Return the stream that FFmpeg's players show, but never a cover image."""
    if container.format.name in TEXT_FORMATS or not container.streams.video:
        raise InputError(f"{path} contains no video: replace or remove it.")
    films = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not films:
        raise InputError(f"{path} contains a cover image but no video: remove it.")
    best = container.streams.best("video")
    stream = best if best in films else films[0]
    if stream.codec_context is None:  # also for a truncated mp4
        raise InputError(f"{path} is not a readable video (FFmpeg has no decoder for it): replace or remove it.")
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MAX_FRAME_PIXELS:
        raise InputError(
            f"{path} has frames of {width}x{height} pixels, and at most {MAX_FRAME_PIXELS} are read: scale it down."
        )
    return stream


def _decoder(stream: "av.VideoStream") -> "av.VideoCodecContext":
    default: av.VideoCodecContext = stream.codec_context
    has_alpha = any(tag.lower() == "alpha_mode" and value == "1" for tag, value in stream.metadata.items())
    has_8_bits = default.format is not None and default.format.components[0].bits == 8  # all that libvpx may support
    if default.name not in VPX_DECODERS or not has_8_bits or not (has_alpha or default.name == "vp9"):
        return default
    decoder = av.VideoCodecContext.create(VPX_DECODERS[default.name], "r")
    decoder.extradata = default.extradata
    return decoder
