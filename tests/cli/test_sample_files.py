"""Files that `sample` writes: formats, borders, interruptions, and memory of long videos."""

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import Tensor

from gpdit_lightning.generation import GeneratedFrames, pipeline, stream_video
from gpdit_lightning.generation.outputs import VideoOutput
from tests.cli.sampling import VIDEO, assert_near, decoded, latents, looks_like, sample, stripe_context
from tests.media.videos import read_video

ORANGE, SILVER = (255, 165, 0), (192, 192, 192)
# Prints the exit status and the peak memory of a child process. The peak of a child begins with that of its parent,
# which is small here.
PEAK = """
import os, subprocess, sys
_, status, used = os.wait4(subprocess.Popen(sys.argv[1:], stdout=2).pid, 0)
print(status, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.mark.parametrize(
    ("out", "formats", "files"),
    [
        ("a.mp4", [], {"a.mp4", "a.png"}),
        ("a.gif", [], {"a.gif"}),
        ("a.png", [], {"a.png"}),
        ("a.b.safetensors", [], {"a.b.safetensors"}),
        ("b", [], {"b/1.mp4", "b/1.png"}),
        ("b", ["gif", "safetensors"], {"b/1.gif", "b/1.safetensors"}),
    ],
)
def test_every_format_is_written_with_the_permissions_of_the_umask(
    workspace: Path, tmp_path: Path, out: str, formats: list[str], files: set[str], capsys: pytest.CaptureFixture[str],
    messages: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    existing = tmp_path / min(files)
    existing.parent.mkdir(exist_ok=True)
    existing.touch()
    before = os.umask(0o027)
    try:
        assert sample(workspace, tmp_path / out, "--frames=3", *(["--formats", *formats] if formats else [])) == 0
    finally:
        os.umask(before)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")} == files
    assert f"the existing {existing} is replaced" in messages.text
    printed = capsys.readouterr().out
    for file in files:
        assert str(tmp_path / file) in printed
        assert stat.S_IMODE((tmp_path / file).stat().st_mode) == 0o640
        if file.endswith(("gif", "png")):
            with Image.open(tmp_path / file) as image:
                assert getattr(image, "n_frames", 1) == (16 if file.endswith("gif") else 1)
                assert image.width >= 96


@pytest.mark.parametrize(("context", "out"), [("1.mp4", "1.mp4"), ("1.mp4", "."), (".", "."), ("link.mp4", "1.mp4")])
def test_a_context_is_not_overwritten(
    context: str, out: str, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = shutil.copy(workspace / VIDEO, tmp_path / "1.mp4")
    if context == "link.mp4":
        (tmp_path / context).symlink_to(video)
    content = video.read_bytes()
    options = ["--frames=3", "--context", tmp_path / context]
    assert sample(workspace, tmp_path / out, *options, context=None) == 2
    assert f"{video} is an input and would be overwritten by a result: give another --out." in capsys.readouterr().err
    assert video.read_bytes() == content
    assert sample(workspace, tmp_path / "new", *options, context=None) == 0


def test_borders_and_ground_truth_beside_the_video(workspace: Path, tmp_path: Path) -> None:
    options = ["--frames=8", "--context_frames=5", "--start=0", "--side_by_side"]
    assert sample(workspace, tmp_path / "plain.mp4", *options) == 0
    assert sample(workspace, tmp_path / "marked.mp4", *options, "--mark") == 0
    plain, marked = read_video(tmp_path / "plain.mp4"), read_video(tmp_path / "marked.mp4")
    assert plain.shape == marked.shape == (13, 3, 32, 64)
    assert looks_like(plain[..., 32:], stripe_context(1, 0, 13))
    assert looks_like(marked[:, :, 4:28, 36:60], stripe_context(1, 0, 13)[:, :, 4:28, 4:28])
    assert looks_like(marked[:, :, 4:28, 4:28], plain[:, :, 4:28, 4:28])
    for number, colour in ((4, SILVER), (5, ORANGE)):  # the last context frame and the first generated one
        assert marked[number, :, 8:24, 1].float().mean(dim=1).tolist() == pytest.approx(colour, abs=15)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--start=1"],
            "7 of the 8 generated frames, since its video ends there .*: the strip shows it as far as it is known$",
        ),
        (["--start=1", "--side_by_side"], "7 of the 8 .*: it is black afterwards in the mp4, and the strip shows it"),
        (["--start=1", "--formats", "gif"], "7 of the 8 .*: a GIF leaves it out"),
        (["--start=1", "--formats", "mp4"], None),
        (["--start=1", "--samples=2"], "7 of the 8 generated frames, since its video ends there [^,]*: the strip"),
        (["--start=0"], None),
        ([], None),
        (["--side_by_side"], "0 of the 8 generated frames"),
    ],
)
def test_ground_truth_that_ends_before_the_video_is_named(
    workspace: Path, tmp_path: Path, options: list[str], says: str | None, messages: pytest.LogCaptureFixture
) -> None:
    assert sample(workspace, tmp_path / "out", "--frames=8", "--context_frames=5", *options) == 0
    named = [message for message in messages.messages if message.startswith("the ground truth of 1 has ")]
    assert len(named) == (says is not None)
    assert says is None or re.search(says, named[0])


def test_options_of_the_mp4_are_refused_where_none_is_written(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("mark", "side_by_side"):
        assert sample(workspace, tmp_path / "a.png", "--frames=1", f"--{option}") == 2
        assert f"--{option} has no effect without an mp4" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_ctrl_c_keeps_the_frames_so_far_as_a_playable_video(workspace: Path, tmp_path: Path) -> None:
    options = ["--formats", "mp4", "png", "safetensors", "--seed=3"]
    names = [
        "--checkpoint",
        workspace / "of2",
        "--context",
        workspace / VIDEO,
        "--out",
        tmp_path / "long.mp4",
        "--steps=2",
    ]
    command = [sys.executable, "-m", "gpdit_lightning", "sample", *map(str, names), *options, "--frames=100000"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        deadline, growing = time.monotonic() + 120, tmp_path / "long.mp4.partial"
        while not (growing.exists() and growing.stat().st_size > 1000):  # of frames; the progress comes later
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
    message = re.search(r"(\d+) frames: (.*)", text := (tmp_path / "log").read_text())
    assert message is not None
    assert message[2].split(", ") == [str(tmp_path / f"long.{name}") for name in ("mp4", "png", "safetensors")]
    assert text.endswith("stopped.\n")
    assert "Traceback" not in text
    assert {path.name for path in tmp_path.iterdir()} == {"log", "long.mp4", "long.png", "long.safetensors"}

    shown = read_video(tmp_path / "long.mp4")
    assert len(shown) == 13 + int(message[1])
    assert looks_like(shown, decoded(tmp_path / "long.safetensors"))
    with Image.open(tmp_path / "long.png") as strip:
        assert strip.height >= 96
    assert sample(workspace, tmp_path / "short.safetensors", "--frames=4", "--seed=3") == 0
    assert_near(latents(tmp_path / "long.safetensors")[:5], latents(tmp_path / "short.safetensors"))


def test_ctrl_c_between_frames_keeps_all_videos_of_the_batch(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Iterator[GeneratedFrames]:
        pieces = stream_video(*arguments, **options)
        yield next(pieces)
        yield next(pieces)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "stream_video", interrupted)
    assert sample(workspace, tmp_path, "--frames=16", "--samples=3", "--batch_size=2", "--formats", "mp4") == 130
    assert {path.name for path in tmp_path.iterdir()} == {"1-seed0.mp4", "1-seed1.mp4"}
    assert [len(read_video(path)) for path in tmp_path.iterdir()] == [13 + 8, 13 + 8]


def test_ctrl_c_during_writing_takes_effect_after_the_frames_of_all_videos(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = VideoOutput.write

    def interrupted(self: VideoOutput, pixels: Tensor, latents: Tensor | None = None) -> None:
        if len(pixels):
            signal.raise_signal(signal.SIGINT)
        write(self, pixels, latents)

    monkeypatch.setattr(VideoOutput, "write", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert sample(workspace, tmp_path, "--samples=2", "--formats", "mp4", "safetensors") == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert [len(read_video(path)) for path in tmp_path.glob("*.mp4")] == [13 + 4, 13 + 4]
    assert [len(latents(path)) for path in tmp_path.glob("*.safetensors")] == [5, 5]


def test_failed_write_leaves_no_file(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: VideoOutput, pixels: Tensor, latents: Tensor | None = None) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(VideoOutput, "write", full)
    assert sample(workspace, tmp_path / "out.mp4") == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_frames(workspace: Path, tmp_path: Path) -> None:
    peaks = []
    for frames in (300, 3000):
        names = ["--checkpoint", workspace / "of2", "--context", workspace / VIDEO, "--out", tmp_path / "out.mp4"]
        command = [sys.executable, "-m", "gpdit_lightning", "sample", *map(str, names), "--steps=1"]
        ran = subprocess.run(
            [sys.executable, "-c", PEAK, *command, f"--frames={frames}"],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        status, peak = map(int, ran.stdout.split())
        assert status == 0, ran.stderr
        peaks.append(peak)
    pixels = 2700 * 3 * 32 * 32
    assert peaks[1] - peaks[0] < pixels / 2
