"""Continuing real files with a trained checkpoint."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from gpdit_lightning.cli import main
from gpdit_lightning.media.video import read_video, video_info, write_video

FPS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos of moving stripes, their shards and a run trained for one step."""
    folder = tmp_path_factory.mktemp("sample")
    (folder / "videos").mkdir()
    for number in range(2):
        moments, columns = torch.arange(60)[:, None], torch.arange(48)
        wave = (torch.sin((columns + moments + 7 * number) / 5) * 100 + 128).byte()
        write_video(folder / "videos" / f"{number}.mp4", wave[:, None, None].expand(-1, 3, 32, -1).contiguous(), FPS)
    from gpdit_lightning.preparation import PrepareOptions, prepare

    prepare(PrepareOptions(out=folder / "latents", videos=[folder / "videos"], codec="pca", video_sizes=["32x32"]))
    recipe: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {
            "class_path": "GPDiTStage",
            "init_args": {"backbone": {"size": "tiny", "layers": 1, "width": 24, "heads": 2, "mlp_width": 48}},
        },
        "data": {"videos": {"manifests": [str(folder / "latents")], "batch_size": 1}},
        "trainer": {"accelerator": "cpu", "max_steps": 1, "enable_progress_bar": False, "enable_model_summary": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "--config", str(folder / "recipe.yaml")]) == 0
    return folder


def sample(folder: Path, out: Path, *options: str, context: str = "videos/0.mp4") -> int:
    checkpoint = ["--checkpoint", str(folder / "run")]
    return main(["sample", *checkpoint, "--context", str(folder / context), "--out", str(out), "--steps=2", *options])


def test_the_result_plays_at_the_rate_of_the_stride(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    assert sample(folder, out, "--frames=6", "--start=0") == 0
    assert video_info(out).fps == Fraction(FPS, 3)
    assert read_video(out).shape == (13 + 6, 3, 32, 32)  # trained on 17 frames: 13 are given
    with Image.open(tmp_path / "out.png") as strip:
        assert strip.width > strip.height


def test_the_context_is_read_at_the_training_stride(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    assert sample(folder, out, "--frames=4", "--context_frames=5", "--start=0") == 0
    shown = read_video(out)[:5].float()
    wanted = read_video(folder / "videos" / "0.mp4", stride=3, most=5)[..., 8:40].float()
    assert (shown - wanted).abs().mean() < 8  # what h264 changes


def test_without_start_the_context_ends_with_the_video(folder: Path, tmp_path: Path) -> None:
    assert sample(folder, tmp_path / "out.mp4", "--frames=4", "--context_frames=5") == 0
    shown = read_video(tmp_path / "out.mp4")[:5].float()
    wanted = read_video(folder / "videos" / "0.mp4", start=45, stride=3)[..., 8:40].float()
    assert (shown - wanted).abs().mean() < 8


def test_the_seed_decides(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert sample(folder, tmp_path / f"{name}.mp4", "--frames=4", f"--seed={seed}") == 0
    a, b, c = (read_video(tmp_path / f"{name}.mp4").float() for name in "abc")
    assert (a - b).abs().mean() < 1  # what encoding the same frames twice may change
    assert (a - c).abs().mean() > 10


def test_an_exported_folder_continues_as_its_run_does(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    assert main(["export", "--checkpoint", str(folder / "run"), "--out", str(model)]) == 0
    assert sample(folder, tmp_path / "run.mp4", "--frames=4") == 0
    assert sample(folder, tmp_path / "model.mp4", "--frames=4", "--checkpoint", str(model)) == 0
    assert (tmp_path / "model.png").read_bytes() == (tmp_path / "run.png").read_bytes()


def test_a_still_image(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), "teal").save(folder / "still.png")
    assert sample(folder, tmp_path / "out.mp4", "--frames=8", context="still.png") == 0
    assert len(read_video(tmp_path / "out.mp4")) == 9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--context_frames=33"], ["0.mp4", "20 frames", "needs 33"]),
        (["--context_frames=4"], ["4 pixel frames", "take 1 or 5"]),
        (["--frames=0"], ["--frames is 0"]),
        (["--steps=0"], ["at least 1"]),
        (["--codec_source=/nowhere"], ["/nowhere"]),
    ],
)
def test_bad_input(
    options: list[str], words: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(folder, tmp_path / "out.mp4", *options) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert not (tmp_path / "out.mp4").exists()


def test_a_context_that_does_not_exist(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(folder, tmp_path / "out.mp4", context="nowhere.mp4") == 2
    assert "nowhere.mp4" in capsys.readouterr().err
