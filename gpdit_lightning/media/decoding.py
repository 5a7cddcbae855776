"""Decoding of a video up to its first damaged frame: frames as they are stored, with their times."""

import math
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import av
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from gpdit_lightning.errors import InputError
from gpdit_lightning.media.containers import VideoStream, ffmpeg_errors, input_options
from gpdit_lightning.retries import transient_error

# Time stamps that jump by more seconds belong to another recording in the same file, as in ffplay.
LONGEST_STEP, LONGEST_STEP_OF_BROADCASTS = 3600, 10

TIME_BASE = Fraction(1, 90000)  # of frames whose container has none

# Decoders that report the damage of a packet only when they decode the next one.
LATE_DECODERS = ("libdav1d",)

# Bytes of all packets per byte of the file, above which an index refers to the same bytes again and again.
MAX_REPETITION = 64

# Frames that wait, at most, because frames decoded before them are displayed later; H.264 and HEVC allow 16.
MAX_DELAY = 16


class DamagedVideoError(InputError):
    """A frame that FFmpeg could not decode intact.

    Args:
        path: the video.
        frame: number of the frame, from 0.
        reason: what FFmpeg reports.
    """

    def __init__(self, path: Path, frame: int, reason: str) -> None:
        super().__init__(f"{path} is damaged at frame {frame} ({reason}): replace or remove it.")
        self.frame = frame


@dataclass(frozen=True)
class DecodedFrame:
    """A frame as it is stored.

    Attributes:
        number: index in the video, from 0.
        time: seconds after the first frame.
        frame: the decoded frame.
        pixel_aspect: displayed width over displayed height of a pixel.
        display_matrix: rotation and flips, as in ISO 14496-12; None if there are none.
    """

    number: int
    time: Fraction
    frame: "av.VideoFrame"
    pixel_aspect: Fraction
    display_matrix: Sequence[float] | None


def decoded_frames(video: VideoStream) -> Iterator[DecodedFrame]:
    """Decode a video up to the first frame that may be damaged.

    FFmpeg marks the frames that it had to repair, but not those that were predicted from them, and these may be
    displayed earlier. So the intact frames end at the first one that was decoded after a sign of damage.

    Raises:
        DamagedVideoError: after the intact frames.
    """
    damage, order, clock, aspect, numbers = _Damage(), _Order(), _Clock(video), _PixelAspect(video), count()
    matrix = _DisplayMatrix(video)
    undecided: deque[av.VideoFrame] = deque()
    delay = 1 if video.decoder.name in LATE_DECODERS else 0

    def decided(at_end: bool = False) -> Iterator[DecodedFrame]:
        while len(undecided) > (0 if at_end else delay) and (
            at_end or len(undecided) > MAX_DELAY or order.is_complete_before(undecided[0])
        ):
            frame, number = undecided.popleft(), next(numbers)
            if damage.reaches(frame):
                raise DamagedVideoError(video.path, number, damage.reason)
            yield DecodedFrame(number, clock.time(frame), frame, aspect.of(frame), matrix.of(frame))

    for frame in _frames(video, damage, order, aspect):
        undecided.append(frame)
        yield from decided()
    yield from decided(at_end=True)
    if damage.reason:
        raise DamagedVideoError(video.path, next(numbers), damage.reason)


def _frames(
    video: VideoStream, damage: "_Damage", order: "_Order", aspect: "_PixelAspect"
) -> Iterator["av.VideoFrame"]:
    """Decode all packets, and record signs of damage."""
    packets = video.container.demux(video.stream)
    codecs = [stream.codec_context for stream in video.container.streams if stream is not video.stream]
    sound = {codec.name for codec in codecs if codec is not None} - {video.decoder.name}
    position, pts = -1, None
    size = video.path.stat().st_size
    left = MAX_REPETITION * size
    while True:
        packet = av.Packet()  # makes the decoder return the remaining frames if the next packet cannot be read
        with _problems(video, ignored=sound) as messages:
            packet = next(packets, None)
        if messages:  # the end of the packet before was not where the next one begins
            damage.record(_Sign(position, pts, messages[0]))
        if packet is None:
            if video.is_cut:
                damage.record(_Sign(position + 1, None, "the file ends within a fragment"))
            return
        previous = position, pts
        position, pts = position + 1, packet.pts
        packet.opaque = position
        order.add(position, pts)
        if packet.is_corrupt:
            damage.record(_Sign(position, pts, "incomplete data"))
        left -= packet.size
        if left < 0 or position > size:
            damage.record(_Sign(position, pts, f"its index states more packets than {size} bytes can contain"))
            return
        frames: list[av.VideoFrame] = []
        with _problems(video) as messages:
            frames = video.decoder.decode(packet)
        if messages:
            cause = previous if video.decoder.name in LATE_DECODERS else (position, pts)
            damage.record(_Sign(cause[0], cause[1], messages[0]))
        aspect.update(position)
        for frame in frames:
            if frame.is_corrupt:
                damage.record(_Sign(frame.opaque, frame.pts, "FFmpeg marks it as corrupt"))
            damage.begin(frame)
            order.show(frame)
            yield frame


@contextmanager
def _problems(video: VideoStream, ignored: AbstractSet[str] = frozenset()) -> Iterator[list[str]]:
    """Collect FFmpeg's messages within the block as `ffmpeg_errors`, followed by the error that ended the block."""
    with ffmpeg_errors(ignored) as messages:
        try:
            yield messages
        except av.FFmpegError as error:
            if transient := transient_error(error, video.path, video.path):
                raise transient from None
            messages.append(error.strerror or str(error))


class _Order:
    """Order of decoding and order of display, by which frames wait for marks of damage on those they depend on."""

    def __init__(self) -> None:
        self._packets: deque[tuple[int, int]] = deque(maxlen=2 * MAX_DELAY)
        self._shown: int | None = None

    def add(self, position: int, pts: int | None) -> None:
        """Add the next packet, with its presentation time stamp."""
        if pts is not None:
            self._packets.append((position, pts))

    def show(self, frame: "av.VideoFrame") -> None:
        """Record that the decoder has returned a frame."""
        self._shown = frame.pts

    def is_complete_before(self, frame: "av.VideoFrame") -> bool:
        """Return whether the decoder has returned all frames that were decoded before a frame."""
        if frame.opaque is None or self._shown is None:
            return False
        return all(pts <= self._shown for position, pts in self._packets if position < frame.opaque)


class _Sign(NamedTuple):
    """A sign of damage.

    Attributes:
        position: of the packet in the order of decoding.
        pts: presentation time stamp of the packet.
        reason: what FFmpeg reports.
    """

    position: int | None
    pts: int | None
    reason: str

    def affects(self, frame: "av.VideoFrame") -> bool:
        """Return whether a frame was decoded from the packet or later, or is displayed later."""
        decoded_later = None not in (self.position, frame.opaque) and frame.opaque >= self.position
        displayed_later = None not in (self.pts, frame.pts) and frame.pts >= self.pts
        return decoded_later or displayed_later


class _Damage:
    """The signs of damage in a video."""

    def __init__(self) -> None:
        self._signs: list[_Sign] = []
        self._has_begun = False

    @property
    def reason(self) -> str:
        """What FFmpeg reports first; empty as long as there is no sign of damage."""
        return self._signs[0].reason if self._signs else ""

    def record(self, sign: _Sign) -> None:
        """Add a sign of damage."""
        self._signs.append(sign)

    def begin(self, frame: "av.VideoFrame") -> None:
        """Drop the signs before the first frame, since the beginning of a cut video refers to packets it lacks."""
        if not self._has_begun:
            self._has_begun = True
            self._signs = [sign for sign in self._signs if not _precedes(sign, frame)]

    def reaches(self, frame: "av.VideoFrame") -> bool:
        """Return whether a frame may be damaged."""
        return any(sign.affects(frame) for sign in self._signs)


def _precedes(sign: _Sign, frame: "av.VideoFrame") -> bool:
    """Return whether a sign belongs to a packet that is decoded or displayed before a frame."""
    decoded_earlier = None not in (sign.position, frame.opaque) and sign.position < frame.opaque
    displayed_earlier = None not in (sign.pts, frame.pts) and sign.pts < frame.pts
    return decoded_earlier or displayed_earlier


class _Clock:
    """Presentation times of the frames of a video, in seconds after the first one and strictly increasing.

    Args:
        video: the video.
    """

    def __init__(self, video: VideoStream) -> None:
        rate = video.fps
        self._period = 1 / Fraction(rate) if rate else Fraction(1, 25)
        broadcast = video.container.format.flags & av.format.Flags.ts_discont.value
        self._longest_step = LONGEST_STEP_OF_BROADCASTS if broadcast else LONGEST_STEP
        # AVI stores no presentation times, and those that FFmpeg computes are wrong for H.264 with B-frames.
        self._stamp_name = "dts" if video.container.format.name == "avi" else "pts"
        self._time_base = video.stream.time_base or TIME_BASE
        self._stamp: Fraction | None = None
        self._offset = Fraction(0)
        self._time: Fraction | None = None

    def time(self, frame: "av.VideoFrame") -> Fraction:
        """Return the time of the next frame.

        A frame without a time stamp follows the one before by the average period, and so does the first frame after a
        jump of the time stamps. A frame whose time stamp is not later than that of the frame before follows it by a
        thousandth of that period.
        """
        stamp = getattr(frame, self._stamp_name)
        stamp = None if stamp is None else stamp * (frame.time_base or self._time_base)
        if self._time is None:
            time = Fraction(0)
        elif stamp is None or self._stamp is None or self._is_jump(stamp - self._stamp):
            time = self._time + self._period
        else:
            time = max(stamp - self._offset, self._time + self._period / 1000)
        if stamp is not None:
            if self._stamp is None or self._is_jump(stamp - self._stamp):
                self._offset = stamp - time
            self._stamp = stamp
        self._time = time
        return time

    def _is_jump(self, step: Fraction) -> bool:
        """Return whether the time stamps begin anew; small steps back are errors in the order of frames."""
        return not -2 * self._period <= step <= self._longest_step


class _PixelAspect:
    """Sample aspect ratio of the frames of a video, by the rules of FFmpeg's `av_guess_sample_aspect_ratio`.

    The container's ratio precedes that of the codec, which may change within the video.

    Args:
        video: the video.
    """

    def __init__(self, video: VideoStream) -> None:
        self._decoder = video.decoder
        self._current = self._first = video.stream.codec_context.sample_aspect_ratio
        self._guess = video.stream.sample_aspect_ratio
        self._changes: list[tuple[int, Fraction | None]] = []

    def update(self, position: int) -> None:
        """Record a change in the packet at this position in the order of decoding, which has just been decoded."""
        ratio = self._decoder.sample_aspect_ratio or self._current
        if ratio != self._current:
            self._changes.append((position, ratio))
            self._current = ratio

    def of(self, frame: "av.VideoFrame") -> Fraction:
        """Return the ratio of a frame."""
        if self._guess != self._first:
            return self._guess or Fraction(1)
        ratio = self._first
        for position, changed in self._changes:
            if frame.opaque is not None and frame.opaque >= position:
                ratio = changed
        return ratio or Fraction(1)


class _DisplayMatrix:
    """Display matrix of the frames of a video, from the container or the codec.

    A codec may store it with key frames only; it holds for the frames after them.

    Args:
        video: the video.
    """

    def __init__(self, video: VideoStream) -> None:
        self._rotation: int | None = None
        self._matrix: Sequence[float] | None = None
        self._container = _matrix_of_container(video)

    def of(self, frame: "av.VideoFrame") -> Sequence[float] | None:
        """Return the matrix of a frame; None if there is none."""
        if self._rotation is None or frame.rotation not in (0, self._rotation):
            self._rotation = frame.rotation
            self._matrix = _read_display_matrix(frame) or self._container
        return self._matrix


def _matrix_of_container(video: VideoStream) -> Sequence[float] | None:
    """Return the matrix that the container stores; None if the decoder adds it to the frames itself."""
    if video.decoder is video.stream.codec_context:
        return None
    # Only FFmpeg's default decoder has the matrix of the container, and only its frames show the matrix.
    with av.open(f"file:{video.path}", metadata_errors="replace", options=input_options()) as container:
        stream = container.streams[video.stream.index]
        for packet in container.demux(stream):
            with suppress(av.FFmpegError):
                for frame in packet.decode():
                    return _read_display_matrix(frame)
    return None


def _read_display_matrix(frame: "av.VideoFrame") -> Sequence[float] | None:
    try:
        data = read_side_data(frame).get("DISPLAYMATRIX")
    except ValueError:
        angle = math.radians(-frame.rotation)
        return [math.cos(angle), math.sin(angle), 0, -math.sin(angle), math.cos(angle)]
    return None if data is None else struct.unpack("=9i", data)


def read_side_data(frame: "av.VideoFrame") -> dict[str, bytes]:
    """Return the side data of a frame by type; of several of one type the first, as in ffplay.

    Raises:
        ValueError: the frame has a type of side data that PyAV lacks.
    """
    # `side_data` makes a reference cycle of a frame, so that the frame would stay in memory. The copy is small.
    copy = VideoReformatter().reformat(frame, 16, 16, "gray", Colorspace.ITU709, interpolation=Interpolation.POINT)
    # PyAV frees the name of a colour profile twice.
    graph = av.filter.Graph()
    without_profile = graph.add("sidedata", "mode=delete:type=ICC_PROFILE")
    graph.link_nodes(graph.add_buffer(template=copy, time_base=TIME_BASE), without_profile, graph.add("buffersink"))
    graph.configure()
    graph.vpush(copy)
    side_data: Any = graph.vpull().side_data  # a sequence, unlike its type
    return {data.type.name: bytes(data) for data in reversed(list(side_data))}
