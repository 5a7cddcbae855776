"""The verbs `prepare`, `prepare-pairs` and `inspect`, and the scripts in data_prep."""

import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gpdit_lightning.cli import main
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.media.video_writer import write_video

SCRIPTS = Path(__file__).parents[2] / "data_prep"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "broken.png").write_text("not an image")
    return tmp_path / "images"


def prepare(images: Path, out: Path, *more: str) -> int:
    words = ["--images", str(images), "--codec", "pca", "--image_sizes", "16x16", "24x16", "--labels"]
    return main(["prepare", *words, "--validation_fraction", "0.2", "--workers", "0", "--out", str(out), *more])


def test_prepare_prints_a_table_and_the_next_command(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert prepare(images, out) == 0
    text = capsys.readouterr().out
    assert re.search(r"image +1x16x2x2 +train +1 +\d+", text)
    assert f"skipped: 1 (full list: {out / 'skipped.jsonl'})" in text
    command = "python -m gpdit_lightning fit --config gpdit:acdit/imagenet_xl --config gpdit:acdit/laptop"
    backbone = "--model.init_args.backbone"
    options = f"--data_dir {out} {backbone}.classes 1 {backbone}.block_shape '[1,1,1]'"
    assert text.splitlines()[-1] == f"next: {command} {options}"
    assert prepare(images, out, "--shard_size", "3") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "of other options (--shard_size was 1000 and is 3)" in error


@pytest.mark.parametrize("with_images", [False, True])
def test_the_next_command_trains_on_videos(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    with_images: bool,
) -> None:
    for number in range(20):
        pixels = np.random.default_rng(number).integers(0, 255, (10, 3, 16, 16), dtype=np.uint8)
        write_video(tmp_path / "videos" / f"{number}.mp4", torch.from_numpy(pixels), fps=24)
    monkeypatch.chdir(tmp_path)
    words = ["--videos", "videos", "--stride", "1", "--clip_frames", "5", "--validation_fraction", "0.4"]
    words += ["--images", "images"] if with_images else []
    sizes = ["--video_sizes", "16x16", "--image_sizes", "16x16"]
    assert main(["prepare", *words, *sizes, "--codec", "pca", "--workers", "0", "--out", "latents"]) == 0
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("next: ")
    python, module, package, *words = shlex.split(command)
    assert [python, module, package] == ["python", "-m", "gpdit_lightning"]
    small = ["--trainer.max_steps", "1", "--data.videos.batch_size", "2"]
    assert main([*words, *small]) == 0


def test_prepare_pairs_prints_a_table_and_the_next_command(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (images / "broken.png").unlink()
    words = ["--task", "grayscale", "--codec", "pca", "--size", "16x16", "--out", str(tmp_path / "grey")]
    assert main(["prepare-pairs", "--sources", str(images), *words]) == 0
    text = capsys.readouterr().out
    assert re.search(r"sequence +6x16x2x2 +train +1 +20", text)
    command = text.splitlines()[-2].removeprefix("next: python -m gpdit_lightning ")
    assert f"--data_dir {tmp_path / 'grey'} --run_dir runs/few_shot_grey" in command
    assert main([*shlex.split(command), "--trainer.max_steps", "1"]) == 0
    capsys.readouterr()
    assert main(["prepare-pairs", "--sources", "nowhere", *words]) == 2
    assert re.fullmatch(
        r"error: nowhere does not exist in /.*: give a folder of \.jpg, .* files\.\n", capsys.readouterr().err
    )


def test_inspect(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, sheet = tmp_path / "out", tmp_path / "sheet.png"
    prepare(images, out)
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    text = capsys.readouterr().out
    assert "labels: 1 (images)" in text
    assert f"codec: pca from the package, fingerprint {Manifest.load(out).codec.fingerprint}" in text
    assert len(re.findall(r"^\d+( +-?\d+\.\d{3}){6}$", text, re.MULTILINE)) == 16
    assert "whitened: mean" in text.splitlines()[-1]

    words = ["--verify", "--workers", "1", "--show", "5", "--out", str(sheet), "--why", "3.png"]
    sheet.touch()
    assert main(["inspect", "--folder", str(out), *words]) == 0
    text, log = capsys.readouterr()
    assert f"the existing {sheet} is replaced" in log
    assert "2 shards with 12 samples: no faults" in text
    assert "note:" not in text
    assert Image.open(sheet).height > 5 * 128
    assert "3.png: image of" in text


def test_inspect_reports_all_faults_with_exit_status_1(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    prepare(images, out)
    missing, truncated = sorted(out.glob("*.tar"))
    missing.unlink()
    truncated.write_bytes(truncated.read_bytes()[:700])
    (out / "other.tar").touch()
    assert main(["inspect", str(out), "--verify", "--workers", "1"]) == 1
    text = capsys.readouterr().out
    assert f"{missing} is missing" in text
    assert f"{truncated} has 700 bytes" in text
    assert f"note: {out / 'other.tar'} is in no manifest" in text
    assert re.search(r"2 shards with 12 samples: \d+ faults", text)


@pytest.mark.parametrize("words", [[], ["--verify"], ["--show", "3"], ["--why", "a.mp4"]])
def test_inspect_refuses_a_folder_without_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main(["inspect", str(tmp_path), *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"there are no data at {tmp_path}, since it is an empty folder" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prepare", "--out", "x", "--stride", "0"], "--stride is 0: give at least 1"),
        (["prepare", "--out", "x", "--workers", "17"], "--workers is 17: give at most 16"),
        (["prepare", "--videos", "x"], "out is missing"),
        (["prepare-pairs", "--out", "x", "--pairs", "2"], "--pairs is 2 but a sequence has 3"),
        (["inspect"], "folder is missing"),
        (["inspect", "x", "--show", "0"], "--show is 0: give at least 1"),
        (["inspect", "x", "--samples", "0"], "--samples is 0: give at least 1"),
        (["inspect", "x", "--verfy"], "did you mean --verify?"),
    ],
)
def test_invalid_options_are_refused_in_one_sentence(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("script", "verb"),
    [("shard_latents", "prepare"), ("build_few_shot", "prepare-pairs"), ("inspect_shards", "inspect FOLDER")],
)
def test_a_script_runs_its_verb(
    script: str, verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    assert ended.value.code in (0, None)
    assert capsys.readouterr().out.startswith(f"usage: python -m gpdit_lightning {verb} [options]")


def test_names_that_a_terminal_cannot_show_are_printed_with_escapes(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images / "broken.png").rename(images / "caf\udce9\n\u65e5.png")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert prepare(images, tmp_path / "out") == 0
    assert prepare(images, tmp_path / "out") == 0
    main(["inspect", str(tmp_path / "out"), "--why", str(images / "caf\udce9\n\u65e5.png")])
    text = terminal.buffer.getvalue().decode("latin-1")
    assert text.count(r"caf\xe9\n\u65e5.png is not a readable image") == 3  # in both summaries, and by --why
