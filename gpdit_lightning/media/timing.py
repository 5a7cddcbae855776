"""Times of frames: resampling of videos in time, and the frame rate and evenness of clips."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

from gpdit_lightning.errors import InputError
from gpdit_lightning.media.decoding import DamagedVideoError, DecodedFrame

# Seconds: some containers, such as Matroska, round time stamps to milliseconds.
TOLERANCE = 0.002
MAX_DEVIATION = 0.1  # of an even interval from the mean of its clip, as a fraction of the mean; `TOLERANCE` is added
MAX_DENOMINATOR = 65535  # of frame rates


def frame_rate(value: float | Fraction) -> Fraction:
    """Return a frame rate as a fraction; limiting the denominator restores 30000/1001 from 29.97002997002997.

    Raises:
        InputError: the rate is not positive, or too low for a fraction with this denominator.
    """
    rate = Fraction(value).limit_denominator(MAX_DENOMINATOR)
    if rate <= 0:
        raise InputError(f"the frame rate {float(value):g} is too low: give at least 0.0001 frames per second.")
    return rate


def resampled(frames: Iterator[DecodedFrame], fps: Fraction) -> Iterator[DecodedFrame]:
    """Yield the frame that is shown at each multiple of 1 / `fps` seconds, up to the time of the last frame.

    Frames are numbered anew. A frame is repeated if the video has fewer, and left out if it has more per second. An
    error of `frames` is raised after the frames before it.

    Args:
        frames: all frames of a video, in order.
        fps: frames per second of the result.
    """
    number = 0
    shown: DecodedFrame | None = None
    error: DamagedVideoError | None = None
    tolerance = min(Fraction(TOLERANCE), 1 / (4 * fps))
    try:
        for frame in frames:
            while shown is not None and number / fps < frame.time - tolerance:
                yield replace(shown, number=number, time=number / fps)
                number += 1
            shown = frame
    except DamagedVideoError as damage:
        error = damage
    if shown is not None and number / fps <= shown.time + tolerance:
        yield replace(shown, number=number, time=number / fps)
    if error is not None:
        raise error


def fps_of_clip(times: Sequence[float], stride: int, average: Fraction) -> Fraction:
    """Return the frames per second of a video within a clip, by the times of its frames.

    Args:
        times: seconds at which the frames of the clip are shown.
        stride: video frames from one frame of the clip to the next.
        average: frames per second of the whole video. It is returned if the clip has only one frame, or if its duration
            differs by no more than the rounding of time stamps.
    """
    duration, intervals = times[-1] - times[0], (len(times) - 1) * stride
    if not intervals or abs(duration - intervals / average) <= TOLERANCE:
        return average
    return frame_rate(intervals / duration)


def uneven_intervals(times: Sequence[float]) -> tuple[float, float] | None:
    """Return the shortest and the longest interval between frames; None if all are even, see `MAX_DEVIATION`."""
    intervals = [later - earlier for earlier, later in pairwise(times)]
    if not intervals:
        return None
    mean = (times[-1] - times[0]) / len(intervals)
    shortest, longest = min(intervals), max(intervals)
    is_even = max(longest - mean, mean - shortest) <= MAX_DEVIATION * mean + TOLERANCE
    return None if is_even else (shortest, longest)
