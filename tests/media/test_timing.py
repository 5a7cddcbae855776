"""Times of frames: resampling, frame rates of clips, and even intervals."""

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest

from gpdit_lightning.errors import InputError
from gpdit_lightning.media.timing import fps_of_clip, frame_rate, uneven_intervals
from gpdit_lightning.media.video import count_frames, frame_number_at, iterate_frames
from tests.media.timed import gray_numbers, write_timed

TWO_RATES = [number / 10 for number in range(10)] + [1 + number / 30 for number in range(20)]


@pytest.mark.parametrize("extension", ["mp4", "mkv"])
def test_resampled_frames_are_those_shown_at_even_times(tmp_path: Path, extension: str) -> None:
    times = TWO_RATES
    path = write_timed(tmp_path / f"video.{extension}", times)
    frames = list(iterate_frames(path, fps=10))
    expected = [max(i for i, time in enumerate(times) if time <= number / 10 + 0.002) for number in range(len(frames))]
    assert gray_numbers([frame.pixels for frame in frames]) == expected
    assert [frame.number for frame in frames] == list(range(len(frames)))
    assert [frame.time for frame in frames] == pytest.approx([number / 10 for number in range(len(frames))])
    assert len(frames) == count_frames(path, fps=10) == int(times[-1] * 10 + 0.01) + 1
    strided = list(iterate_frames(path, 1, 2, 3, fps=10))
    assert gray_numbers([frame.pixels for frame in strided]) == expected[1:6:2]


def test_resampling_to_the_rate_of_a_video_changes_nothing(tmp_path: Path) -> None:
    path = write_timed(tmp_path / "video.mkv", [number * 1001 / 30000 for number in range(40)])  # rounded to 1 ms
    frames = list(iterate_frames(path, fps=30000 / 1001))
    assert gray_numbers([frame.pixels for frame in frames]) == list(range(40))


@pytest.mark.parametrize("fps", [0, -1, 1e-9])
def test_a_rate_that_is_too_low_is_refused(tmp_path: Path, fps: float) -> None:
    path = write_timed(tmp_path / "video.mp4", [0.0, 0.1])
    with pytest.raises(InputError, match=rf"the frame rate {fps:g} is too low: give at least"):
        next(iterate_frames(path, fps=fps))


def test_resampling_repeats_frames_that_are_shown_long(tmp_path: Path) -> None:
    path = write_timed(tmp_path / "video.mp4", [0.0, 0.5, 0.6, 2.0])
    numbers = gray_numbers([frame.pixels for frame in iterate_frames(path, fps=4)])
    assert numbers == [0, 0, 1, 2, 2, 2, 2, 2, 3]


@pytest.mark.parametrize(
    ("time", "number"),
    [(0.0, 0), (0.04, 0), (0.06, 1), (0.5, 5), (1.02, 11), (1.0333, 11), (1.64, 29), (1.66, None), (9.0, None)],
)
def test_the_frame_at_a_time_is_found_by_time_stamps(tmp_path: Path, time: float, number: int | None) -> None:
    assert frame_number_at(write_timed(tmp_path / "video.mp4", TWO_RATES), time) == number


def test_the_rate_of_a_clip_is_that_of_its_own_frames() -> None:
    average = Fraction(90000, 4903)  # of the whole video
    assert fps_of_clip(TWO_RATES[:9:2], 2, average) == 10
    assert float(fps_of_clip(TWO_RATES[10:30:3], 3, average)) == pytest.approx(30, abs=1e-3)
    ntsc = Fraction(30000, 1001)
    rounded = [round(number * 3 / float(ntsc), 3) for number in range(5)]
    assert fps_of_clip(rounded, 3, ntsc) == ntsc  # milliseconds do not change the rate
    assert fps_of_clip([7.0], 3, ntsc) == ntsc
    assert frame_rate(29.97002997002997) == ntsc


def test_uneven_intervals_are_distinguished_from_rounded_ones() -> None:
    assert uneven_intervals([round(number / 60, 3) for number in range(20)]) is None
    assert uneven_intervals([1.0]) is None
    shortest, longest = min(b - a for a, b in pairwise(TWO_RATES)), max(b - a for a, b in pairwise(TWO_RATES))
    assert uneven_intervals(TWO_RATES) == (shortest, longest)
    dropped = [number / 30 for number in range(0, 40, 3) if number != 21]
    assert uneven_intervals(dropped) is not None
