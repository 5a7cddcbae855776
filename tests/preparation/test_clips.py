"""Cutting of frames into clips, with expected frame numbers written out."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpdit_lightning.media.video_writer import write_video
from gpdit_lightning.preparation import PrepareOptions
from gpdit_lightning.preparation.clips import Clip, ClipReader, EndOfFile, Frame, SkippedInput, cut_clips
from gpdit_lightning.preparation.input_files import InputFile

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
