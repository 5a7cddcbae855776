import ctypes
import os
import struct
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from gpdit_lightning.errors import InputError
from gpdit_lightning.files import partial_path
from gpdit_lightning.media.video import video_info
from gpdit_lightning.media.video_writer import VideoWriter, write_video
from tests.media.videos import gray_steps, numbers, read_video

M_PERTURB = -6  # of glibc's mallopt: the byte that new memory is filled with
PATCHES = ((200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (128, 128, 128), (235, 235, 235))


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


def colour_patches(height: int, width: int) -> torch.Tensor:
    """Return an image, uint8 (3, height, width), with 3x2 patches that begin in odd rows and columns."""
    image = torch.full((3, height, width), 90, dtype=torch.uint8)
    for colour, rows, columns in placed_patches(height, width):
        image[:, rows, columns] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
    return image


def placed_patches(height: int, width: int) -> Iterator[tuple[tuple[int, ...], slice, slice]]:
    side = min(height // 2, width // 3) - 3
    for number, colour in enumerate(PATCHES):
        top, left = number // 3 * (height // 2) | 1, number % 3 * (width // 3) | 1
        yield colour, slice(top, top + side), slice(left, left + side)


def rgb_by_tags(frame: av.VideoFrame) -> np.ndarray:
    """Convert a limited-range 4:2:0 frame to (H, W, 3) by the equations of the matrix that it is tagged with."""
    luma, chroma = np.split(frame.to_ndarray().astype(float), [frame.height])
    blue_difference, red_difference = chroma.reshape(2, frame.height // 2, frame.width // 2).repeat(2, 1).repeat(2, 2)
    weight_red, weight_blue = {1: (0.2126, 0.0722), 6: (0.299, 0.114)}[frame.colorspace]  # BT.709, BT.601
    y = (luma - 16) / 219
    red = y + 2 * (1 - weight_red) * (red_difference - 128) / 224
    blue = y + 2 * (1 - weight_blue) * (blue_difference - 128) / 224
    green = (y - weight_red * red - weight_blue * blue) / (1 - weight_red - weight_blue)
    return 255 * np.stack((red, green, blue), axis=-1)


@pytest.mark.parametrize(
    ("height", "width", "matrix"), [(96, 96, 6), (480, 640, 6), (718, 1280, 6), (720, 1280, 1), (1080, 608, 1)]
)
def test_colours_are_tagged_as_they_are_encoded(tmp_path: Path, height: int, width: int, matrix: int) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, colour_patches(height, width).expand(3, -1, -1, -1), fps=8)

    content = path.read_bytes()
    colr = struct.pack(">4s4sHHHB", b"colr", b"nclx", 1, 13, matrix, 0)  # ISO 14496-12; the last byte: limited range
    assert content.count(colr) == 1
    path.write_bytes(content.replace(b"colr", b"free"))  # so that the tags of the H.264 stream are read
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == 3
    for frame in frames:
        assert (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range) == (matrix, 1, 13, 1)
    for shown in (rgb_by_tags(frames[1]), read_video(path)[1].permute(1, 2, 0).numpy().astype(float)):
        for colour, rows, columns in placed_patches(height, width):
            inside = shown[rows, columns][4:-4, 4:-4].reshape(-1, 3)
            assert np.median(inside, axis=0) == pytest.approx(colour, abs=3)


def test_chroma_is_placed_at_the_left_of_its_pixels(tmp_path: Path) -> None:
    """H.264's chroma samples without a tag are those of the even columns, not halfway to the odd ones."""
    pixels = torch.zeros(1, 3, 32, 64, dtype=torch.uint8)
    pixels[:, 0] = 4 * torch.arange(64, dtype=torch.uint8)  # red increases by 4 per column
    write_video(tmp_path / "a.mp4", pixels, fps=8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        frame = next(container.decode(video=0))
    red_difference = frame.to_ndarray()[32:].reshape(2, 16, 32)[1].mean(axis=0)
    expected = 128 + 224 * (4 * np.arange(0, 64, 2) / 255) * (1 - 0.299) / (2 * (1 - 0.299))
    assert np.abs(red_difference - expected)[2:-2].mean() < 0.5  # halfway it would be 0.9 more


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    """What memory contained before has no influence. With x264's macroblock tree, 84 writes gave five files."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        pytest.skip("the C library cannot fill new memory")
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(1, 3, 8, 8, generator=generator)
    image = torch.nn.functional.interpolate(smooth, (48, 64), mode="bicubic")[0]
    noise = 0.02 * torch.randn(8, 3, 48, 64, generator=generator)
    pixels = torch.stack([255 * (image.roll(step, 2) + noise[step]) for step in range(8)]).clamp(0, 255).byte()
    contents = set()
    try:
        for number in range(84):
            libc.mallopt(M_PERTURB, number * 3)
            write_video(tmp_path / "a.mp4", pixels, fps=8)
            contents.add((tmp_path / "a.mp4").read_bytes())
    finally:
        libc.mallopt(M_PERTURB, 0)
    assert len(contents) == 1


@pytest.mark.parametrize(
    "name",
    [
        "clip:1.mp4",
        "%03d.mp4",
        "-i.mp4",
        os.fsdecode(b"caf\xe9.mp4"),
        "a\u2028b\nc.mp4",
        "a b?c=d#e.mp4",
        "\N{LATIN SMALL LETTER E WITH ACUTE}" * 127,  # 254 bytes, without an extension
    ],
)
def test_any_name_that_the_file_system_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(name, gray_steps(3), fps=8)
    assert os.listdir() == [name]
    with av.open(f"file:{name}") as container:
        assert container.streams.video[0].frames == 3
