"""The demo, short in the default run and whole in the slow one."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from gpdit_lightning.cli import demo, demo_videos, main
from gpdit_lightning.media.video import video_info, write_video

STAGES = ("stage1_image_warmup", "stage2_mixed", "stage3_long_video", "stage4_few_shot")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "VIDEOS", 3)
    monkeypatch.setattr(demo, "HELD_OUT_VIDEOS", 2)


@pytest.mark.usefixtures("small")
def test_it_leaves_what_it_says_and_goes_on_when_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "demo"
    assert main(["demo", "--run_dir", str(run_dir), "--max_steps", "2"]) == 0
    shown = capsys.readouterr().out
    assert "2 held-out clips" in shown
    assert str(run_dir / "sample.png") in shown
    for stage in STAGES:
        assert (run_dir / stage / "checkpoints" / "last.ckpt").is_dir()
        assert list((run_dir / stage / "tensorboard").glob("events*"))
        assert (run_dir / stage / "previews" / "step-000002.png").is_file()
    for picture in ("sample.png", "few_shot.png"):
        assert (run_dir / picture).stat().st_size > 0
    info = video_info(run_dir / "sample.mp4")
    assert (info.height, info.width, info.fps) == (64, 128, Fraction(8))
    report = json.loads((run_dir / "report.json").read_text())
    assert report["step"] == 2
    assert len(report["error"]) == len(report["copy_error"]) == demo.CLIP - demo.CONTEXT

    made = {path: path.stat().st_mtime_ns for ending in ("mp4", "tar", "ckpt") for path in run_dir.rglob(f"*.{ending}")}
    del made[run_dir / "sample.mp4"]
    assert main(["demo", "--run_dir", str(run_dir), "--max_steps", "2"]) == 0
    assert capsys.readouterr().out.count("finished at step 2") == len(STAGES)
    assert made == {path: path.stat().st_mtime_ns for path in made}


def test_with_videos_of_ones_own(tmp_path: Path) -> None:
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


def test_held_out_movies_show_other_digits_on_other_paths() -> None:
    digits = demo_videos.load_digits()
    assert len(digits[: -demo_videos.HELD_OUT_DIGITS]) + demo_videos.HELD_OUT_DIGITS == len(digits)
    mine = demo_videos.render(digits[0], np.random.default_rng([0, False, 0]))
    again = demo_videos.render(digits[0], np.random.default_rng([0, False, 0]))
    other = demo_videos.render(digits[0], np.random.default_rng([0, True, 0]))
    assert torch.equal(mine, again)
    assert not torch.equal(mine, other)


def test_a_digit_drifts_straight_and_stays_inside() -> None:
    for seed in range(20):
        path = demo_videos.random_path(np.random.default_rng(seed))
        assert path.min() >= 0
        assert path.max() <= demo_videos.SIZE - demo_videos.DIGIT
        steps = np.diff(path, axis=0)
        np.testing.assert_allclose(steps, np.broadcast_to(steps[0], steps.shape), atol=1e-9)
        assert np.linalg.norm(path[-1] - path[0]) >= demo_videos.SHORTEST_PATH


def test_the_ink_moves_with_the_path() -> None:
    digit = torch.ones(1, demo_videos.DIGIT, demo_videos.DIGIT)
    path = demo_videos.random_path(np.random.default_rng(3))
    movie = demo_videos.render(digit, np.random.default_rng(3)).float()
    ink = movie.mean(dim=1) - movie.mean(dim=1).amin(dim=(1, 2), keepdim=True)
    columns = (ink.sum(dim=1) * (torch.arange(demo_videos.SIZE) + 0.5)).sum(dim=1) / ink.sum(dim=(1, 2))
    np.testing.assert_allclose(columns.numpy(), path[:, 0] + demo_videos.DIGIT / 2, atol=0.1)


def test_an_empty_folder_of_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--videos", str(tmp_path), "--run_dir", str(tmp_path / "demo")]) == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_demo_beats_repeating_the_last_frame(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    try:
        assert main(["demo", "--run_dir", str(tmp_path / "demo")]) == 0
    finally:
        torch.set_num_threads(1)
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["clips"] >= 32
    assert report["ratio"] <= 0.8
    stage = demo.CHAIN.with_name("stage3_long_video.yaml")
    assert report["step"] == yaml.safe_load(stage.read_text())["trainer"]["max_steps"]
