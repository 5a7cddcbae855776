"""The demo with few steps and videos, and the complete demo in a slow test."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from gpdit_lightning.cli import demo, demo_videos, main
from gpdit_lightning.cli.recipe_files import recipe_path
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.files import write_once
from gpdit_lightning.media.video import video_info
from gpdit_lightning.media.video_writer import write_video

STAGES = ("stage1_image_warmup", "stage2_mixed", "stage3_long_video", "stage4_few_shot")


@pytest.fixture
def few_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "VIDEOS", 3)
    monkeypatch.setattr(demo, "HELD_OUT_VIDEOS", 2)


@pytest.mark.usefixtures("few_videos")
def test_demo_writes_its_results_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "demo"
    assert main(["demo", "--run_dir", str(run_dir), "--max_steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert "2 held-out clips" in printed
    assert "codec alone" in printed
    assert Manifest.load(run_dir / "latents" / "video").codec.name == "pca_digits"
    assert str(run_dir / "sample.png") in printed
    for stage in STAGES:
        assert (run_dir / stage / "checkpoints" / "last.ckpt").is_dir()
        assert list((run_dir / stage).glob("events*"))
        assert (run_dir / stage / "previews" / "step-000002.png").is_file()
    for name in ("sample.png", "few_shot.png"):
        assert (run_dir / name).stat().st_size > 0
    info = video_info(run_dir / "sample.mp4")
    with Image.open(run_dir / "sample.gif") as animation:
        assert animation.n_frames == info.frames == demo.CLIP
        assert min(info.height, animation.height) >= 256
    assert info.fps == Fraction(8)
    report = json.loads((run_dir / "report.json").read_text())
    assert report["step"] == 2
    assert len(report["error"]) == len(report["copy_error"]) == demo.CLIP - demo.CONTEXT
    assert 0 < sum(report["codec_error"]) < 0.1 * sum(report["copy_error"])

    times = {path: path.stat().st_mtime_ns for name in ("mp4", "tar", "ckpt") for path in run_dir.rglob(f"*.{name}")}
    del times[run_dir / "sample.mp4"]
    assert main(["demo", "--run_dir", str(run_dir), "--max_steps", "2"]) == 0
    assert capsys.readouterr().out.count("finished at step 2") == len(STAGES)
    assert times == {path: path.stat().st_mtime_ns for path in times}

    again = ["demo", "--run_dir", str(run_dir), "--max_steps", "2"]
    # The training is complete, and results are written as before.
    monkeypatch.setattr(demo, "chain", lambda options: None)
    monkeypatch.setattr(demo, "evaluate", lambda run_dir, videos: "")
    image = min((run_dir / "images" / "train").iterdir())
    written = image.read_bytes()
    image.write_bytes(written[: len(written) // 2])
    previews = run_dir / "stage4_few_shot" / "previews"
    previews.rename(tmp_path / "previews")
    assert main(again) == 2
    assert f"{previews} has no images, though its stage is trained: remove" in capsys.readouterr().err
    assert image.read_bytes() == written
    for damaged in (
        run_dir / "latents" / "few_shot" / "manifest.json",
        run_dir / "movies" / "train" / "digit_0000.mp4",
    ):
        kept = damaged.read_bytes()
        damaged.write_bytes(b"")
        assert main(again) == 2
        error = capsys.readouterr().err
        assert str(damaged) in error
        assert f": remove {run_dir}, or give another --run_dir." in error
        damaged.write_bytes(kept)

    videos = tmp_path / "videos"
    assert main(["demo", "--videos", str(videos), "--run_dir", str(run_dir)]) == 2
    assert f"{run_dir} holds the demo of the digits, not of {videos}" in capsys.readouterr().err


def test_demo_of_an_earlier_version_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "movies").mkdir()
    assert main(["demo", "--run_dir", str(tmp_path)]) == 2
    assert f"{tmp_path} holds a demo that was begun by another version" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["movies"]


def test_of_two_demos_of_other_videos_that_start_at_once_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other one records its videos after this one has found no record."""
    run_dir = tmp_path / "run"

    def write_later(path: Path, text: str) -> None:
        path.parent.mkdir()
        path.write_text(json.dumps(demo.recorded(tmp_path / "others")))
        write_once(path, text)

    monkeypatch.setattr(demo, "write_once", write_later)
    assert main(["demo", "--run_dir", str(run_dir)]) == 2
    assert f"{run_dir} holds the demo of {tmp_path / 'others'}, not of the digits: remove" in capsys.readouterr().err


def test_a_record_without_its_videos_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "demo.json").write_text(json.dumps({"version": demo.VERSION}))
    assert main(["demo", "--run_dir", str(tmp_path), "--videos", str(tmp_path)]) == 2
    assert f"{tmp_path} holds the demo of the digits, not of {tmp_path}: remove" in capsys.readouterr().err


@pytest.mark.parametrize(("lengths", "said"), [((60,), "too few videos:"), ((60, 20), "videos of 49 or more frames")])
def test_too_few_videos_are_refused_before_training(
    lengths: tuple[int, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for number, length in enumerate(lengths):
        write_video(videos / f"{number}.mp4", torch.full((length, 3, 64, 64), number, dtype=torch.uint8), 30)
    assert main(["demo", "--videos", str(videos), "--run_dir", str(tmp_path / "demo")]) == 2
    assert f"{videos} has too few videos" in (error := capsys.readouterr().err)
    assert said in error


@pytest.mark.slow
def test_demo_with_given_videos(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        noise = torch.randint(0, 256, (60, 3, 80, 96), generator=generator, dtype=torch.uint8)
        write_video(videos / f"{number}.mp4", noise, 30)
    run_dir = tmp_path / "demo"
    assert main(["demo", "--videos", str(videos), "--run_dir", str(run_dir), "--max_steps", "1"]) == 0
    assert (run_dir / "sample.png").is_file()
    assert (run_dir / "few_shot.png").is_file()
    report = json.loads((run_dir / "report.json").read_text())
    assert len(report["error"]) == demo.SHORTEST_CLIP - demo.CONTEXT  # 60 frames are 20 at the stride


def test_drawn_video_depends_on_its_number_and_the_seed_only() -> None:
    (first, _), (again, _), other, of_seed = (
        demo_videos.draw_video(*key) for key in ((0, False, 0),) * 2 + ((1, False, 0), (0, False, 1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other[0])
    assert not torch.equal(first, of_seed[0])


def test_path_of_a_digit_is_straight_and_inside_the_frame() -> None:
    for seed in range(20):
        path = demo_videos.random_path(np.random.default_rng(seed))
        assert path.min() >= 0
        assert path.max() <= demo_videos.SIZE - demo_videos.DIGIT
        steps = np.diff(path, axis=0)
        np.testing.assert_allclose(steps, np.broadcast_to(steps[0], steps.shape), atol=1e-9)
        assert np.linalg.norm(path[-1] - path[0]) >= demo_videos.MIN_PATH_LENGTH


def test_rendered_digit_follows_the_path() -> None:
    digit = torch.ones(1, demo_videos.DIGIT, demo_videos.DIGIT)
    path = demo_videos.random_path(np.random.default_rng(3))
    gray = demo_videos.render(digit, path, np.random.default_rng(3)).float().mean(dim=1)
    ink = gray - gray.amin(dim=(1, 2), keepdim=True)
    columns = (ink.sum(dim=1) * (torch.arange(demo_videos.SIZE) + 0.5)).sum(dim=1) / ink.sum(dim=(1, 2))
    np.testing.assert_allclose(columns.numpy(), path[:, 0] + demo_videos.DIGIT / 2, atol=0.1)


def test_folder_without_videos_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        assert main(["demo", "--videos", str(folder), "--run_dir", str(tmp_path / "demo")]) == 2
        assert str(folder) in capsys.readouterr().err
        assert not (tmp_path / "demo").exists()  # so that the run folder can be used with the right one


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_complete_demo_is_better_than_repeating_the_last_frame(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    try:
        assert main(["demo", "--run_dir", str(tmp_path / "demo")]) == 0
    finally:
        torch.set_num_threads(1)
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["clips"] >= 32
    assert report["ratio"] <= 0.25
    assert all(error <= copied for error, copied in zip(report["error"], report["copy_error"], strict=True))
    recipe = yaml.safe_load(recipe_path("gpdit:demo/stage3_long_video").read_text())
    assert report["step"] == recipe["trainer"]["max_steps"]
