import gc
import os
import re
import weakref
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.generation.contexts import VideoContext
from gpdit_lightning.generation.outputs import FORMATS, VideoOutput, output_paths
from gpdit_lightning.generation.plans import Clip
from gpdit_lightning.media.images import read_image, write_strip
from gpdit_lightning.media.video import video_info
from tests.media.videos import read_video

STEP = 6  # gray levels from frame to frame: more than what H.264 changes
FPS = Fraction(10000, 1001)
ORANGE, SILVER = (255, 165, 0), (192, 192, 192)


def gray_frames(numbers: Sequence[int], size: tuple[int, int] = (32, 48)) -> Tensor:
    """Frame number i has the gray level 6 i, from which `numbers` computes i."""
    return (torch.tensor(numbers) * STEP).byte().view(-1, 1, 1, 1).expand(-1, 3, *size).contiguous()


def numbers(frames: Tensor) -> list[int]:
    return [round(value / STEP) for value in frames.float().mean(dim=(1, 2, 3)).tolist()]


def make_context(
    frames: Sequence[int], ground_truth: Sequence[int] = (), latents: Tensor | None = None
) -> VideoContext:
    return VideoContext("clip", gray_frames(frames), gray_frames(ground_truth), FPS, latents)


def make_output(
    path: Path, formats: Sequence[str], context: VideoContext, frames: int, mark: bool = False, beside: bool = False
) -> VideoOutput:
    clip = Clip(context, seed=0, label=-1, frames=frames, sample=0)
    return VideoOutput(path, formats, clip, temporal_factor=4, mark=mark, side_by_side=beside)


def latents_of(first: int, frames: int) -> Tensor:
    """Latent frames whose values are their number."""
    return torch.arange(first, first + frames).view(-1, 1, 1, 1).expand(-1, 16, 4, 6).double()


def test_mp4_contains_context_and_pieces_of_any_size(tmp_path: Path) -> None:
    with make_output(tmp_path / "a" / "b" / "v1.5", ["mp4"], make_context([0, 1, 2]), frames=20) as output:
        for piece in ([3], [4, 5, 6, 7], [], [8, 9]):
            output.write(gray_frames(piece))
        assert output.frames_written == 7
        assert output.files == []
    path = tmp_path / "a" / "b" / "v1.5.mp4"
    assert output.files == [path]
    assert numbers(read_video(path)) == list(range(10))
    assert video_info(path).fps == FPS


def test_surplus_frames_are_dropped(tmp_path: Path) -> None:
    with make_output(tmp_path / "v", FORMATS, make_context([0], ground_truth=[21, 22]), frames=6) as output:
        output.write(gray_frames([1, 2, 3, 4]), latents_of(0, 2))  # the first is that of the context
        output.write(gray_frames([5, 6, 7, 8]), latents_of(2, 1))
        output.write(gray_frames([9, 10, 11, 12]), latents_of(3, 1))
    assert output.frames_written == 6
    assert numbers(read_video(tmp_path / "v.mp4")) == [0, 1, 2, 3, 4, 5, 6]
    with Image.open(tmp_path / "v.gif") as animation:
        assert animation.n_frames == 7  # type: ignore[attr-defined]
    with safe_open(tmp_path / "v.safetensors", "pt") as file:
        assert file.get_tensor("latents")[:, 0, 0, 0].tolist() == [0, 1, 2]
    with make_output(tmp_path / "w", ["safetensors"], make_context([]), frames=6) as output:
        output.write(gray_frames(range(13)), latents_of(0, 4))  # all frames in one piece
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.get_tensor("latents")[:, 0, 0, 0].tolist() == [0, 1, 2]  # with 1 + 4 + 4 frames


def test_borders_distinguish_context_and_generated_frames(tmp_path: Path) -> None:
    context = make_context([10], ground_truth=[11])
    with make_output(tmp_path / "v", ["mp4"], context, frames=2, mark=True, beside=True) as output:
        output.write(gray_frames([20, 21]))
    shown = read_video(tmp_path / "v.mp4").float()
    assert shown.shape == (3, 3, 32, 96)
    for frame, half, colour, inside in (
        (0, 0, SILVER, 10),
        (0, 1, SILVER, 10),
        (1, 0, ORANGE, 20),
        (1, 1, SILVER, 11),
        (2, 0, ORANGE, 21),
        (2, 1, (0, 0, 0), 0),
    ):
        part = shown[frame, :, :, 48 * half : 48 * half + 48]
        assert part[:, 12:20, 2].mean(dim=1).tolist() == pytest.approx(colour, abs=12)  # 4:2:0 blurs
        assert part[:, 8:24, 8:40].mean(dim=(1, 2)).tolist() == pytest.approx([inside * STEP] * 3, abs=3)


def test_side_by_side_without_borders(tmp_path: Path) -> None:
    with make_output(tmp_path / "v", ["mp4"], make_context([10], ground_truth=[11]), frames=2, beside=True) as output:
        output.write(gray_frames([20]))
        output.write(gray_frames([21]))
    shown = read_video(tmp_path / "v.mp4")
    assert numbers(shown[..., :46]) == [10, 20, 21]
    assert numbers(shown[..., 50:]) == [10, 11, 0]


def test_strip_equals_that_of_the_whole_video(tmp_path: Path) -> None:
    context = make_context([0, 1, 2], ground_truth=[3, 4, 5, 6, 7])
    with make_output(tmp_path / "v", ["png"], context, frames=30) as output:
        for first in range(10, 40, 4):
            output.write(gray_frames(range(first, first + 4)))
    rows = {"generated": gray_frames([0, 1, 2, *range(10, 40)]), "ground truth": gray_frames(range(8))}
    write_strip(tmp_path / "expected.png", rows, context=3)
    assert (tmp_path / "v.png").read_bytes() == (tmp_path / "expected.png").read_bytes()


def test_strip_of_an_incomplete_video_shows_its_frames(tmp_path: Path) -> None:
    # A strip of 31 frames shows every second one.
    with make_output(tmp_path / "v", ["png"], make_context([30], ground_truth=[7]), frames=30) as output:
        output.write(gray_frames([31, 32, 33]))
    rows = {"generated": gray_frames([30, 32]), "ground truth": gray_frames([30])}
    write_strip(tmp_path / "expected.png", rows, context=1, frame_numbers=[0, 2])
    assert (tmp_path / "v.png").read_bytes() == (tmp_path / "expected.png").read_bytes()


@pytest.mark.parametrize(("ground_truth", "wide"), [([7, 8, 9], True), ([7, 8], True), ([7], False), ([], False)])
def test_gif_shows_ground_truth_of_at_least_the_same_length(
    ground_truth: list[int], wide: bool, tmp_path: Path
) -> None:
    with make_output(tmp_path / "v", ["gif"], make_context([0, 1], ground_truth), frames=9) as output:
        output.write(gray_frames([2, 3]))
    with Image.open(tmp_path / "v.gif") as animation:
        assert animation.n_frames == 4  # type: ignore[attr-defined]
        assert animation.info["duration"] == 100
        assert (animation.width > 2 * 144) == wide
        animation.seek(2)
        page = np.array(animation.convert("RGB")).astype(int)
        assert abs(page[-50, 50, 0] - 2 * STEP) <= 2
        if wide:
            assert abs(page[-50, 250, 0] - 7 * STEP) <= 2


def test_latents_are_stored_raw_with_metadata(tmp_path: Path) -> None:
    context = make_context(range(5), latents=latents_of(0, 2).float())
    with make_output(tmp_path / "v", ["safetensors"], context, frames=8) as output:
        for latent in (2, 3):
            output.write(gray_frames(range(4)), latents_of(latent, 1))
    with safe_open(tmp_path / "v.safetensors", "pt") as file:
        assert list(file.keys()) == ["latents"]
        assert file.get_tensor("latents").dtype == torch.float32
        assert torch.equal(file.get_tensor("latents"), latents_of(0, 4).float())
        assert file.metadata() == {"fps": "10000/1001", "context_frames": "5"}
    assert Fraction("10000/1001") == FPS
    with (
        make_output(tmp_path / "w", ["safetensors"], context, frames=8) as output,
        pytest.raises(InputError, match=r"w\.safetensors stores latents: give those of the frames"),
    ):
        output.write(gray_frames([1]))


def test_output_without_a_context(tmp_path: Path) -> None:
    with make_output(tmp_path / "v", FORMATS, make_context([]), frames=5, mark=True, beside=True) as output:
        output.write(gray_frames([5]), latents_of(0, 1))
        output.write(gray_frames([6, 7, 8, 9]), latents_of(1, 1))
    assert output.files == [tmp_path / f"v.{ending}" for ending in FORMATS]
    shown = read_video(tmp_path / "v.mp4")
    assert numbers(shown[..., 4:28, 4:44]) == [5, 6, 7, 8, 9]
    assert shown[..., 52:].max() <= 2
    with safe_open(tmp_path / "v.safetensors", "pt") as file:
        assert len(file.get_tensor("latents")) == 2


def test_output_without_frames_writes_no_files(tmp_path: Path) -> None:
    with make_output(tmp_path / "v", FORMATS, make_context([]), frames=5) as output:
        output.write(gray_frames([]), latents_of(0, 0)[:0])
    assert output.files == []
    assert list(tmp_path.iterdir()) == []


def test_frames_before_an_interruption_are_kept(tmp_path: Path) -> None:
    with make_output(tmp_path / "v", FORMATS, make_context([0, 1]), frames=400) as output:
        try:
            output.write(gray_frames([2, 3]), latents_of(0, 2))
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
    assert numbers(read_video(tmp_path / "v.mp4")) == [0, 1, 2, 3]
    assert output.files == [tmp_path / f"v.{ending}" for ending in FORMATS]
    with make_output(tmp_path / "w", FORMATS, make_context([0, 1]), frames=400) as output:
        pass
    # The context alone, without its latents.
    assert output.files == [tmp_path / f"w.{ending}" for ending in FORMATS[:3]]


def test_exception_keeps_existing_files(tmp_path: Path) -> None:
    for ending in FORMATS:
        (tmp_path / f"v.{ending}").write_text("older")

    def fail() -> None:
        with make_output(tmp_path / "v", FORMATS, make_context([0, 1]), frames=9) as output:
            output.write(gray_frames([2, 3]), latents_of(0, 2))
            output.write(gray_frames([4, 5], size=(16, 16)), latents_of(2, 1))

    with pytest.raises(InputError, match="later ones 16x16"):
        fail()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {f"v.{name}": "older" for name in FORMATS}


def test_only_latents_and_frames_of_the_strip_stay_in_memory(tmp_path: Path) -> None:
    def frames_in_memory() -> int:
        return sum(type(item) is Tensor and item.shape == (3, 32, 48) for item in gc.get_objects())

    before = frames_in_memory()
    with make_output(tmp_path / "v", ["mp4", "png", "safetensors"], make_context([0]), frames=40) as output:
        for number in range(10):
            pixels, latents = np.full((4, 3, 32, 48), number, np.uint8), np.zeros((1, 16, 4, 6), np.float32)
            memory = weakref.ref(pixels), weakref.ref(latents)  # views would keep these arrays in memory
            output.write(torch.from_numpy(pixels), torch.from_numpy(latents))
            del pixels, latents
            assert memory[0]() is memory[1]() is None
        assert frames_in_memory() - before <= 16


def test_output_paths_are_checked_first(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the formats are mp4, webm: choose from mp4, gif, png, safetensors"):
        output_paths(tmp_path / "v", ["mp4", "webm"])
    with pytest.raises(InputError, match="the formats are none"):
        output_paths(tmp_path / "v", [])
    assert output_paths(tmp_path / "new" / "a.b", ["gif"]) == {"gif": tmp_path / "new" / "a.b.gif"}
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "v.mp4").mkdir()
    with pytest.raises(InputError, match=r"v\.mp4 cannot be written, since it is a folder"):
        make_output(tmp_path / "v", ["mp4"], make_context([0]), frames=1)
    (tmp_path / "file").write_text("")
    no_folder = re.escape(f"since {tmp_path / 'file'} is not a writable folder")
    with pytest.raises(InputError, match=no_folder):
        output_paths(tmp_path / "file" / "v", ["mp4"])


@pytest.mark.parametrize("name", ["clip:1", "%03d", "-v", os.fsdecode(b"caf\xe9"), "a\u2028b\nc", "\N{SNOWMAN}" * 80])
def test_files_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with make_output(Path(name), FORMATS, make_context([10]), frames=2) as output:
        output.write(gray_frames([20, 21]), latents_of(0, 2))
    assert output.files == [Path(f"{name}.{extension}") for extension in FORMATS]
    assert set(os.listdir()) == {str(file) for file in output.files}
    assert read_image(f"{name}.png").shape[1] == 3
    assert "latents" in load(Path(f"{name}.safetensors").read_bytes())
