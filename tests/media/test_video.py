import struct
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from PIL import Image

from gpdit_lightning.errors import InputError
from gpdit_lightning.media.video import iterate_frames, iterate_images, video_info
from gpdit_lightning.media.video_writer import write_video
from tests.media.encoding import encode, rgb_frame
from tests.media.videos import gray_steps, numbers, read_video


@pytest.fixture
def video(tmp_path: Path) -> Path:
    write_video(tmp_path / "steps.mp4", gray_steps(20), fps=Fraction(30000, 1001))
    return tmp_path / "steps.mp4"


def test_video_info(video: Path) -> None:
    info = video_info(video)
    assert (info.height, info.width, info.frames) == (48, 64, 20)
    assert info.fps == Fraction(30000, 1001)


def test_frame_rate_of_raw_dv(tmp_path: Path) -> None:
    """FFmpeg states an average of 60000 frames per second."""
    encode(tmp_path / "a.dv", [rgb_frame(torch.zeros(3, 576, 720, dtype=torch.uint8))] * 2, "dvvideo")
    assert video_info(tmp_path / "a.dv").fps == 25  # that of all PAL video
    assert [frame.time for frame in iterate_frames(tmp_path / "a.dv")] == [0, 1 / 25]


@pytest.mark.parametrize(
    ("start", "stride", "max_frames", "expected"),
    [(0, 1, None, list(range(20))), (2, 3, None, [2, 5, 8, 11, 14, 17]), (4, 5, 2, [4, 9]), (0, 3, 0, [])],
)
def test_frames_are_selected_by_start_stride_and_max_frames(
    video: Path, start: int, stride: int, max_frames: int | None, expected: list[int]
) -> None:
    frames = [frame.pixels for frame in iterate_frames(video, start, stride, max_frames)]
    assert (numbers(torch.stack(frames)) if frames else []) == expected


def test_gif_is_read_as_a_video(tmp_path: Path) -> None:
    images = [Image.new("RGB", (32, 16), (value, 0, 0)) for value in (0, 100, 200)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=100)
    frames = read_video(tmp_path / "a.gif")
    assert frames.shape == (3, 3, 16, 32)
    assert frames[:, 0, 8, 8].tolist() == pytest.approx([0, 100, 200], abs=3)


@pytest.mark.parametrize(
    ("matrix", "corner"),
    [((0, 1, -1, 0), (0, -1)), ((0, -1, 1, 0), (-1, 0)), ((-1, 0, 0, -1), (-1, -1))],
    ids=["clockwise", "anticlockwise", "upside_down"],
)
def test_rotation_of_a_video_is_applied(tmp_path: Path, matrix: tuple[int, ...], corner: tuple[int, int]) -> None:
    pixels = torch.zeros(2, 3, 48, 64, dtype=torch.uint8)
    pixels[..., :16, :16] = 255  # a white corner, to recognize the rotation
    path = tmp_path / "turned.mp4"
    write_video(path, pixels, fps=10)
    content = bytearray(path.read_bytes())
    # ISO 14496-12, track header, version 0: the matrix begins 44 bytes after the start of the box's name.
    a, b, c, d = (value << 16 for value in matrix)
    offset = content.index(b"tkhd") + 4 + 40
    content[offset : offset + 20] = struct.pack(">5i", a, b, 0, c, d)
    path.write_bytes(content)

    frame = next(iterate_frames(path)).pixels
    expected = (3, 48, 64) if matrix[0] else (3, 64, 48)
    assert frame.shape == expected
    assert frame[0, corner[0], corner[1]] > 200
    assert (video_info(path).height, video_info(path).width) == expected[1:]


def test_unreadable_video_is_named(video: Path, tmp_path: Path) -> None:
    content = bytearray(video.read_bytes())
    video.write_bytes(content[: len(content) * 2 // 3])  # without the index at the end of an mp4
    with pytest.raises(InputError, match=r"steps\.mp4 is not a readable video"):
        list(iterate_frames(video))
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(InputError, match=r"text\.mp4 is not a readable video .*: replace or remove it"):
        video_info(tmp_path / "text.mp4")
    with pytest.raises(InputError, match=r"absent\.mp4 does not exist"):
        next(iterate_frames(tmp_path / "absent.mp4"))


def test_invalid_range_of_frames_is_refused(video: Path) -> None:
    assert list(iterate_frames(video, start=99)) == []
    with pytest.raises(InputError, match="stride 0"):
        read_video(video, stride=0)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of twelve frames whose natural order is not alphabetical, a subfolder, and files that are not images."""
    folder = tmp_path / "frames"
    (folder / "thumbnails").mkdir(parents=True)
    for number in range(12):
        Image.new("RGB", (24, 16), (number * 10,) * 3).save(folder / f"frame_{number}.{'PNG' if number % 2 else 'png'}")
    (folder / "notes.txt").write_text("not an image")
    (folder / "._frame_3.png").write_text("not an image")
    return folder


@pytest.mark.parametrize(
    ("start", "stride", "max_frames", "expected"),
    [(0, 1, None, list(range(12))), (1, 4, None, [1, 5, 9]), (8, 2, 2, [8, 10]), (0, 1, 0, []), (50, 1, None, [])],
)
def test_images_of_a_folder_are_read_in_natural_order(
    images: Path, start: int, stride: int, max_frames: int | None, expected: list[int]
) -> None:
    frames = list(iterate_images(images, start, stride, max_frames))
    assert all(frame.shape == (3, 16, 24) and frame.dtype == torch.uint8 for frame in frames)
    assert (numbers(torch.stack(frames)) if frames else []) == expected


def test_images_are_read_one_at_a_time(images: Path) -> None:
    (images / "frame_2.png").write_text("damaged")
    frames = iterate_images(images)
    assert numbers(torch.stack([next(frames), next(frames)])) == [0, 1]
    with pytest.raises(InputError, match=r"frame_2\.png is not a readable image"):
        next(frames)


def test_images_that_do_not_form_a_video_are_refused(images: Path) -> None:
    Image.new("RGB", (16, 24)).save(images / "frame_10.png")
    with pytest.raises(InputError, match=r"frame_10\.png has 24x16 pixels and .*frame_0\.png 16x24: scale"):
        list(iterate_images(images))
    for name in ("thumbnails", "absent"):
        with pytest.raises(InputError, match=rf"{name} contains no images: give a folder with \.jpg"):
            list(iterate_images(images / name))
    with pytest.raises(InputError, match="stride 0"):
        list(iterate_images(images, stride=0))
