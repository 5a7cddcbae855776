from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from gpdit_lightning.errors import InputError
from gpdit_lightning.files import partial_path
from gpdit_lightning.media.video import video_info
from gpdit_lightning.media.video_writer import VideoWriter, write_video
from tests.media.videos import gray_steps, numbers, read_video


@pytest.fixture
def video(tmp_path: Path) -> Path:
    write_video(tmp_path / "steps.mp4", gray_steps(20), fps=Fraction(30000, 1001))
    return tmp_path / "steps.mp4"


def test_written_video_can_be_read(tmp_path: Path) -> None:
    rows, columns = torch.meshgrid(torch.linspace(0, 255, 64), torch.linspace(0, 255, 96), indexing="ij")
    pixels = torch.stack([rows, columns, 255 - rows]).to(torch.uint8).expand(5, -1, -1, -1)
    write_video(tmp_path / "ramp.mp4", pixels, fps=8)
    again = read_video(tmp_path / "ramp.mp4")
    assert again.shape == pixels.shape
    assert again.dtype == torch.uint8
    assert (again.float() - pixels.float()).abs().mean() < 3
    assert [path.name for path in tmp_path.iterdir()] == ["ramp.mp4"]


def test_odd_sides_and_no_frames_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="47x64 and mp4 needs even sides"):
        write_video(tmp_path / "a.mp4", gray_steps(2, 47), 8)
    with pytest.raises(InputError, match="write at least one"):
        write_video(tmp_path / "a.mp4", gray_steps(0), 8)
    assert list(tmp_path.iterdir()) == []


def write_pieces(path: Path, pieces: Iterable[torch.Tensor], fps: Fraction | float = 8) -> None:
    with VideoWriter(path, fps) as writer:
        for piece in pieces:
            writer.write(piece)


@pytest.mark.parametrize("pieces", [(20,), (1,) * 20, (0, 3, 0, 17), (19, 1)])
def test_video_written_in_pieces_equals_one_written_at_once(video: Path, pieces: tuple[int, ...]) -> None:
    path = video.with_name("pieces.mp4")
    write_pieces(path, gray_steps(20).split(pieces), Fraction(30000, 1001))
    assert video_info(path) == video_info(video)
    assert numbers(read_video(path)) == list(range(20))


def test_frames_are_written_incrementally(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (50, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    sizes = []
    with VideoWriter(tmp_path / "a.mp4", 8) as writer:
        for _ in range(4):
            writer.write(noise)
            sizes.append(partial_path(tmp_path / "a.mp4").stat().st_size)
        assert not (tmp_path / "a.mp4").exists()
    # The encoder buffers a constant number of frames.
    bytes_per_frame = (tmp_path / "a.mp4").stat().st_size / 200
    assert sizes[3] - sizes[1] > 90 * bytes_per_frame
    assert video_info(tmp_path / "a.mp4").frames == 200


@pytest.mark.parametrize("frames", [0, 1, 60])
def test_exception_while_writing_keeps_the_existing_file(video: Path, frames: int) -> None:
    def failing() -> Iterator[torch.Tensor]:
        yield torch.zeros(frames, 3, 16, 16, dtype=torch.uint8)
        raise RuntimeError("generation failed")

    before = video.read_bytes()
    for path in (video.with_name("new.mp4"), video):
        with pytest.raises(RuntimeError, match="generation failed"):
            write_pieces(path, failing())
    assert list(video.parent.iterdir()) == [video]
    assert video.read_bytes() == before


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([gray_steps(2), gray_steps(2, 48, 66)], r"a\.mp4 are 48x64 and later ones 48x66"),
        ([gray_steps(2), gray_steps(2).float()], r"torch\.float32 \(2, 3, 48, 64\)"),
        ([gray_steps(2)[0]], r"\(3, 48, 64\)"),
        ([gray_steps(0), gray_steps(0)], "write at least one"),
        ([], "write at least one"),
    ],
)
def test_invalid_frames_are_refused(tmp_path: Path, pieces: list[torch.Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_pieces(tmp_path / "a.mp4", pieces)
    assert list(tmp_path.iterdir()) == []
