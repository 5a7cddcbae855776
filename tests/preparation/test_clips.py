"""Cutting of frames into clips, with expected frame numbers written out."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpdit_lightning.errors import InputError
from gpdit_lightning.media.video_writer import write_video
from gpdit_lightning.preparation import PrepareOptions
from gpdit_lightning.preparation.clips import Clip, ClipReader, EndOfFile, Frame, Note, SkippedInput, cut_clips
from gpdit_lightning.preparation.input_files import InputFile
from tests.media.timed import gray_numbers, write_timed

FACTOR = 4


def options(**settings: Any) -> PrepareOptions:
    return PrepareOptions(**{"out": Path("nowhere"), "codec": "pca", "stride": 1, "clip_frames": 9} | settings)


def frames(count: int, stride: int = 1, cuts: tuple[int, ...] = ()) -> Iterator[Frame]:
    for i in range(count):
        yield Frame(i * stride, i * stride / 24, torch.full((3, 1, 1), i, dtype=torch.uint8), i in cuts)


def cut(count: int, cuts: tuple[int, ...] = (), stride: int = 1, **settings: Any) -> list[tuple[int, list[int]]]:
    clips = cut_clips(frames(count, stride, cuts), options(**settings), FACTOR)
    return [(clip[0].number, [int(frame.pixels[0, 0, 0]) for frame in clip]) for clip in clips]


def run(start: int, length: int) -> tuple[int, list[int]]:
    return start, list(range(start, start + length))


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, []),
        (1, [run(0, 1)]),
        (4, [run(0, 1)]),
        (5, [run(0, 5)]),
        (9, [run(0, 9)]),
        (12, [run(0, 9), run(9, 1)]),
        (17, [run(0, 9), run(9, 5)]),
        (18, [run(0, 9), run(9, 9)]),
    ],
)
def test_clips_are_consecutive_and_the_last_has_1_plus_4_k_frames(count: int, expected: list[Any]) -> None:
    assert cut(count) == expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (9, [run(0, 9)]),
        (10, [run(0, 9)]),  # the 6 remaining frames, cut to 5, are all in the first clip
        (13, [run(0, 9), run(4, 9)]),
        (15, [run(0, 9), run(4, 9)]),
        (17, [run(0, 9), run(4, 9), run(8, 9)]),
    ],
)
def test_a_clip_step_below_the_length_makes_overlapping_clips(count: int, expected: list[Any]) -> None:
    assert cut(count, clip_step=4) == expected


def test_the_last_overlapping_clip_must_contain_new_frames() -> None:
    assert cut(22, clip_step=7) == [run(0, 9), run(7, 9), run(14, 5)]
    assert cut(20, clip_step=7) == [run(0, 9), run(7, 9), run(14, 5)]
    assert cut(18, clip_step=7) == [run(0, 9), run(7, 9)]


def test_a_clip_step_above_the_length_leaves_frames_between_clips() -> None:
    assert cut(30, clip_step=12) == [run(0, 9), run(12, 9), run(24, 5)]
    assert cut(24, clip_step=12) == [run(0, 9), run(12, 9)]


def test_no_clip_crosses_a_cut() -> None:
    assert cut(20, cuts=(3, 14)) == [run(0, 1), run(3, 9), run(12, 1), run(14, 5)]
    assert cut(20, cuts=(14,), clip_step=12) == [run(0, 9), run(12, 1), run(14, 5)]
    assert cut(20, cuts=(11,), clip_step=12) == [run(0, 9), run(11, 9)]


def test_frame_numbers_count_frames_of_the_video() -> None:
    assert cut(12, stride=3) == [(0, list(range(9))), (27, [9])]


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """Four shots of 10, 7, 12 and 3 frames."""
    generator = torch.Generator().manual_seed(3)
    shots = []
    for length in (10, 7, 12, 3):
        image = torch.randint(0, 255, (3, 6, 8), generator=generator, dtype=torch.uint8)
        large = image.repeat_interleave(8, 1).repeat_interleave(8, 2)
        shots += [large] * length
    path = tmp_path / "film.mp4"
    write_video(path, torch.stack(shots), fps=24)
    return path


def items(path: Path, **settings: Any) -> list[Any]:
    file = InputFile(path, path.name, "video", "train", path.stat().st_size, captions=("a film",), label="cinema")
    return list(ClipReader(options(video_sizes=["48x64"], **settings), FACTOR).items(0, file))


def test_avoid_cuts(film: Path) -> None:
    pytest.importorskip("scenedetect", reason="the extra `shots` is not installed")
    clips = [item for item in items(film, avoid_cuts=True, least_clip_frames=5) if isinstance(item, Clip)]
    assert [(clip.metadata["first_frame"], len(clip.pixels)) for clip in clips] == [(0, 9), (10, 5), (17, 9)]
    for clip in clips:
        assert (clip.pixels.float() - clip.pixels[:1].float()).abs().mean() < 3, "all frames of a shot are equal"
    strided = [item for item in items(film, avoid_cuts=True, stride=2, clip_frames=5) if isinstance(item, Clip)]
    assert [(clip.metadata["first_frame"], len(clip.pixels)) for clip in strided] == [(0, 5), (17, 5)]
    across_cuts = [item for item in items(film, least_clip_frames=5) if isinstance(item, Clip)]
    assert [clip.metadata["first_frame"] for clip in across_cuts] == [0, 9, 18, 27]


def test_clip_metadata(film: Path) -> None:
    clip, *_ = items(film)
    assert clip.metadata == {
        "source": "film.mp4",
        "label": "cinema",
        "caption": "a film",
        "fps": 24.0,
        "stride": 1,
        "pixel_size": [48, 64],
        "first_frame": 0,
    }


def test_a_video_that_is_too_short_is_skipped(film: Path) -> None:
    pytest.importorskip("scenedetect", reason="the extra `shots` is not installed")
    skipped, end = items(film, clip_frames=45, least_clip_frames=33)
    assert isinstance(skipped, SkippedInput)
    assert isinstance(end, EndOfFile)
    assert "has 32 frames at stride 1 but a clip needs 33:" in skipped.reason
    skipped, _ = items(film, clip_frames=45, least_clip_frames=17, avoid_cuts=True)
    assert "has 32 frames at stride 1 but a clip needs 17 without a cut" in skipped.reason


TWO_RATES = [number / 10 for number in range(10)] + [1 + number / 30 for number in range(30)]


def prepared_clips(path: Path, **options: Any) -> tuple[list[Clip], list[str]]:
    """Return the clips of a video, and the notes on it."""
    settings = {"stride": 3, "clip_frames": 5, "video_sizes": ["32x32"], "out": path.parent, "codec": "pca"}
    file = InputFile(path, path.name, "video", "train", path.stat().st_size)
    items = list(ClipReader(PrepareOptions(**settings | options), 4).items(0, file))
    return [item for item in items if isinstance(item, Clip)], [item.reason for item in items if isinstance(item, Note)]


def test_the_rate_of_a_clip_is_that_of_its_time_stamps_and_uneven_clips_are_noted(tmp_path: Path) -> None:
    path = write_timed(tmp_path / "video.mp4", TWO_RATES)
    read, notes = prepared_clips(path)
    assert [gray_numbers(clip.pixels) for clip in read] == [[0, 3, 6, 9, 12], [15, 18, 21, 24, 27]]
    span = TWO_RATES[12] - TWO_RATES[0]
    assert [clip.metadata["fps"] for clip in read] == pytest.approx([12 / span, 30], rel=1e-4)
    assert [clip.metadata["stride"] for clip in read] == [3, 3]
    (note,) = notes
    assert "has uneven intervals between the frames of 1 of its 2 clips (0.167 to 0.3 s), which were used" in note
    even = write_timed(tmp_path / "even.mkv", [number * 1001 / 30000 for number in range(30)])
    read, notes = prepared_clips(even)
    assert ([clip.metadata["first_frame"] for clip in read], notes) == ([0, 15], [])
    assert [clip.metadata["fps"] for clip in read] == pytest.approx([29.97, 29.97], rel=2e-3)  # milliseconds


def test_videos_are_resampled_in_time_on_request(tmp_path: Path) -> None:
    read, notes = prepared_clips(write_timed(tmp_path / "video.mp4", TWO_RATES), fps=10.0, stride=2)
    assert [gray_numbers(clip.pixels) for clip in read] == [[0, 2, 4, 6, 8], [10, 16, 22, 28, 34]]
    assert [(clip.metadata["fps"], clip.metadata["stride"], clip.metadata["first_frame"]) for clip in read] == [
        (10, 2, 0),
        (10, 2, 10),
    ]
    assert notes == []
    for fps in (0.0, 1000.5, 1e9, float("inf"), float("nan")):
        with pytest.raises(InputError, match=r"--fps is .*: give frames per second, above 0 and at most 1000\."):
            prepared_clips(tmp_path / "video.mp4", fps=fps)
