"""Detection of cuts."""

import sys
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.media.video import iterate_frames
from gpdit_lightning.media.video_writer import write_video
from gpdit_lightning.preparation.shots import check_available, mark_cuts

HEIGHT, WIDTH = 90, 120


def texture(seed: int, height: int, width: int) -> Tensor:
    """Return a smooth color image, uint8 (3, height, width)."""
    coarse = torch.rand(1, 3, height // 12, width // 12, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0] * 255).to(torch.uint8)


def shot(seed: int, frames: int, speed: int = 1) -> Tensor:
    """Film a texture with a camera that moves `speed` pixels per frame: uint8 (frames, 3, HEIGHT, WIDTH)."""
    image = texture(seed, HEIGHT, WIDTH + speed * frames)
    return torch.stack([image[..., speed * frame :][..., :WIDTH] for frame in range(frames)])


def cuts(frames: Iterable[Tensor]) -> list[int]:
    return [number for number, begins_shot in mark_cuts((frame, i) for i, frame in enumerate(frames)) if begins_shot]


def cuts_of_file(path: Path) -> list[int]:
    return cuts(frame.pixels for frame in iterate_frames(path))


@pytest.fixture(autouse=True)
def _needs_scenedetect(request: pytest.FixtureRequest) -> None:
    if "monkeypatch" not in request.fixturenames:
        pytest.importorskip("scenedetect")


def test_cuts_of_a_video_file(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", torch.cat([shot(0, 12), shot(1, 7), shot(2, 20), shot(3, 9)]), fps=24)
    assert cuts_of_file(tmp_path / "a.mp4") == [12, 19, 39]


def test_all_frames_are_returned_in_order() -> None:
    for length in (0, 1, 2, 3, 8):
        marked = list(mark_cuts((frame, number) for number, frame in enumerate(shot(0, 8)[:length])))
        assert [number for number, _ in marked] == list(range(length))
        assert not any(begins_shot for _, begins_shot in marked)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (2, 2), (3, 1)])
def test_cuts_near_the_ends(before: int, after: int) -> None:
    assert cuts(torch.cat([shot(0, before), shot(1, after)])) == [before]


def test_both_cuts_of_a_short_shot() -> None:
    assert cuts(torch.cat([shot(0, 10), shot(1, 5), shot(2, 10)])) == [10, 15]


@pytest.mark.parametrize("speed", [0, 6])
def test_camera_motion_is_not_a_cut(speed: int) -> None:
    assert cuts(shot(0, 30, speed)) == []


def test_fades_and_dissolves_are_not_cuts() -> None:
    weights = torch.linspace(0, 1, 24).view(-1, 1, 1, 1)
    first, second = shot(0, 24).float(), shot(1, 24).float()
    assert cuts((first * (1 - 0.95 * weights)).to(torch.uint8)) == []
    assert cuts((first * (1 - weights) + second * weights).to(torch.uint8)) == []


def test_cut_between_dark_images() -> None:
    assert cuts(torch.cat([shot(0, 10), shot(1, 10)]) // 3) == [10]


def test_large_frames_are_downscaled() -> None:
    frames = F.interpolate(torch.cat([shot(0, 6), shot(1, 6)]), (540, 720), mode="bilinear")
    assert cuts(frames) == [6]


def test_the_last_two_frames_before_an_error_are_lost() -> None:
    def breaking() -> Iterator[tuple[Tensor, int]]:
        yield from ((frame, number) for number, frame in enumerate(shot(0, 6)))
        raise InputError("broken midway")

    marked = mark_cuts(breaking())
    for _ in range(4):
        next(marked)
    with pytest.raises(InputError, match="broken midway"):
        next(marked)


def test_frames_are_in_memory_one_at_a_time() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def frames() -> Iterator[tuple[Tensor, int]]:
        for number in range(10):
            frame = texture(0, HEIGHT, WIDTH)
            alive.append(weakref.ref(frame))
            assert sum(reference() is not None for reference in alive) <= 2  # this one, and the one before
            yield frame, number

    assert [number for number, _ in mark_cuts(frames())] == list(range(10))


def test_missing_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    for use in (check_available, lambda: next(mark_cuts([]))):
        with pytest.raises(
            InputError, match=r"PySceneDetect.* cannot be imported .*pip install 'gpdit_lightning\[shots\]'"
        ):
            use()


def test_cuts_of_real_videos_equal_those_of_scenedetect(assets: Path) -> None:
    from scenedetect import AdaptiveDetector, detect

    path = assets / "videos" / "misc" / "bikes.mp4"
    scenes = detect(str(path), AdaptiveDetector(min_scene_len=1))
    expected = [begin.frame_num for begin, _ in scenes[1:]]
    assert len(expected) > 3
    assert cuts_of_file(path) == expected
    assert cuts_of_file(assets / "videos" / "misc" / "01_dog.mp4") == []
    # Two horse races on the same track: similar colors on both sides of the cut.
    assert cuts_of_file(assets / "videos" / "ucf101_6class" / "HorseRace" / "v_HorseRace_g16_c05.avi") == [184]
