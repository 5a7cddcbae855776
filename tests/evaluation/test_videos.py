"""Selection of videos and reading of clips."""

import logging
import shutil
from pathlib import Path

import pytest
import torch

from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.videos import clip_frame_indices, find_videos, read_clip, select_videos
from gpdit_lightning.media.video_writer import write_video
from tests.media.timed import gray_numbers, write_timed


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Eleven uniform frames; the grey level of each is ten times its number."""
    pixels = torch.arange(11, dtype=torch.uint8)[:, None, None, None] * 10
    write_video(tmp_path / "ramp.mp4", pixels.expand(11, 3, 32, 48), fps=8)
    return tmp_path / "ramp.mp4"


def frame_numbers(clip: torch.Tensor) -> list[int]:
    """Return the frame numbers, by the grey levels."""
    return [round(frame.float().mean().item() / 10) for frame in clip]


@pytest.mark.parametrize(
    ("length", "centred", "resample_short", "expected"),
    [
        (9, False, False, [0, 3, 6]),
        (9, True, False, [1, 4, 7]),
        (7, True, False, [0, 3, 6]),
        (6, True, False, []),
        (6, True, True, [0, 2, 5]),
        (3, False, True, [0, 1, 2]),
        (2, False, True, []),
    ],
)
def test_frame_indices_of_a_clip(length: int, centred: bool, resample_short: bool, expected: list[int]) -> None:
    assert clip_frame_indices(length, 3, 3, centred, resample_short) == expected


def test_a_clip_with_stride_zero_spans_its_video(video: Path) -> None:
    assert clip_frame_indices(9, 3, 0) == [0, 4, 8]
    assert clip_frame_indices(2, 3, 0) == []
    assert frame_numbers(read_clip(video, 3, 0, (16, 16))) == [0, 5, 10]


def test_a_clip_consists_of_the_frames_of_its_indices(video: Path) -> None:
    assert read_clip(video, 3, 2, (16, 16)).shape == (3, 3, 16, 16)
    assert frame_numbers(read_clip(video, 3, 2, (16, 16))) == [0, 2, 4]
    assert frame_numbers(read_clip(video, 3, 2, (16, 16), centred=True)) == [3, 5, 7]
    assert frame_numbers(read_clip(video, 5, 4, (16, 16), resample_short=True)) == [0, 2, 5, 8, 10]
    assert frame_numbers(read_clip(video, 1, 4, (16, 16), centred=True)) == [5]


def test_clips_of_resampled_videos_are_counted_in_resampled_frames(tmp_path: Path) -> None:
    path = write_timed(tmp_path / "video.mp4", [number / 10 for number in range(10)] + [1 + n / 30 for n in range(20)])
    assert gray_numbers(read_clip(path, 4, 4, (16, 16), fps=10)) == [0, 4, 8, 16]
    assert gray_numbers(read_clip(path, 3, 2, (16, 16), centred=True, fps=10)) == [6, 8, 10]
    assert select_videos([path], 1, 0, frames=17, fps=10).names == ("video.mp4",)
    with pytest.raises(InputError, match="have 0 videos of at least 18 frames"):
        select_videos([path], 1, 0, frames=18, fps=10)


def test_a_video_that_is_too_short_is_an_error_that_names_it(video: Path) -> None:
    with pytest.raises(InputError, match=r"ramp.mp4 has 11 frames, but a clip of 5 at stride 3 needs 13: leave"):
        read_clip(video, 5, 3, (16, 16))
    with pytest.raises(InputError, match="has 11 frames, but a clip needs 12: leave it out"):
        read_clip(video, 12, 3, (16, 16), centred=True, resample_short=True)


def test_videos_are_found_at_any_depth_in_order(video: Path) -> None:
    names = ["b/v_10.mp4", "b/v_9.avi", "a/x/v_1.mp4"]
    for name in (*names, "b/.hidden.mp4", "b/notes.txt"):
        path = video.parent / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = find_videos([video, video.parent / "set"])
    assert [path.name for path in found] == ["ramp.mp4", "v_1.mp4", "v_9.avi", "v_10.mp4"]
    with pytest.raises(InputError, match="nowhere does not exist"):
        find_videos([video.parent / "nowhere"])
    (video.parent / "empty").mkdir()
    with pytest.raises(InputError, match="empty has no video files"):
        find_videos([video.parent / "empty"])


def test_the_selection_depends_on_names_and_seed_only(video: Path) -> None:
    def selected(root: Path, names: str, count: int, seed: int = 0) -> list[str]:
        for name in names:
            (root / name).mkdir(parents=True, exist_ok=True)
            (root / name / "v.mp4").write_bytes(video.read_bytes())
        selection = select_videos([root], count, seed, frames=11)
        assert selection.paths == tuple(root / name for name in selection.names)
        return [name[0] for name in selection.names]

    five = selected(video.parent / "one", "abcde", 5)
    assert sorted(five) == list("abcde")
    assert selected(video.parent / "one", "", 3) == five[:3]
    assert selected(video.parent / "two", "abce", 4) == [name for name in five if name != "d"]
    assert any(selected(video.parent / "one", "", 5, seed) != five for seed in range(1, 4))


def test_too_few_long_enough_videos_are_refused(video: Path) -> None:
    folder = video.parent
    (folder / "damaged.mp4").write_bytes(video.read_bytes()[:100])
    assert select_videos([folder], 1, 0, frames=11).names == ("ramp.mp4",)
    with pytest.raises(InputError, match="have 0 videos of at least 12 frames, and 2 that are shorter or damaged, but"):
        select_videos([folder], 1, 0, frames=12)
    assert select_videos([folder, video], 1, 0, frames=11).names == ("ramp.mp4",)  # the same file twice
    for name in ("one", "two"):
        (folder / name).mkdir()
        shutil.copy(video, folder / name)
    with pytest.raises(InputError, match="have the same name"):
        select_videos([folder / "one", folder / "two"], 1, 0, frames=11)


def test_damaged_and_short_videos_are_named(video: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "several"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(video, folder / name)
    (folder / "empty.mp4").touch()
    with caplog.at_level(logging.INFO):
        assert set(select_videos([folder], None, 0, 3, progress=True).names) == {"a.mp4", "b.mp4"}
    assert f"left out: {folder / 'empty.mp4'} is not a readable video" in caplog.text
    assert "2 videos have at least 3 frames; 1 are shorter or damaged" in caplog.text
