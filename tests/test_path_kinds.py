"""Paths of another kind than an option takes: the message says what was found, and names the path or option to use."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from gpdit_lightning.cli import main
from gpdit_lightning.path_kinds import Kind, does_not_exist, reason_and_cure

FILES = (
    *("runs/config.yaml", "runs/a/config.yaml", "runs/a/checkpoints/step-1.ckpt/training.ckpt"),
    *("runs/a/checkpoints/step-1.ckpt/ema.safetensors", "runs/b/checkpoints/x", "runs/sample.mp4"),
    *("latents/one/manifest.json", "latents/one/train.tar", "latents/two/manifest.json"),
    *(
        "exported/config.json",
        "exported/model.safetensors",
        "videos/1.mp4",
        "images/1.png",
        "list.txt",
        "a.mkv",
        "b.webp",
    ),
)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"{}" if name.endswith(".json") else b"\xff")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize(
    ("path", "wanted", "expected"),
    [
        ("runs", "checkpoint", "a folder of such folders: give one of those in it: runs/a runs/b"),
        ("runs/b", "checkpoint", "a run folder without one: CURE"),
        ("runs/a/checkpoints", "checkpoint", "a folder: give runs/a"),
        ("runs/a/config.yaml", "checkpoint", "a recipe: give runs/a"),
        ("runs/a/checkpoints/step-1.ckpt/ema.safetensors", "checkpoint", "a file of a checkpoint: give runs/a/checkp"),
        ("exported/model.safetensors", "checkpoint", "a file of an exported model: give exported"),
        ("exported", "run", "an exported model: CURE (`sample --checkpoint` takes this one)"),
        ("latents/one", "checkpoint", "a folder of prepared data: CURE (`fit --data_dir` takes this one)"),
        ("latents/one/train.tar", "checkpoint", "a shard of prepared data: CURE (`fit --data_dir` takes this one)"),
        ("runs/config.yaml", "checkpoint", "a recipe: CURE (`fit --config` takes this one)"),
        ("videos/1.mp4", "checkpoint", "a video: CURE (`prepare` takes this one)"),
        ("list.txt", "checkpoint", "a file: CURE"),
        ("a.mkv", "data", "a video: prepare it first, with `python -m gpdit_lightning prepare --videos a.mkv "),
        ("b.webp", "data", "an image: prepare it first, with `python -m gpdit_lightning prepare --images b.webp "),
        ("runs/a", "data", "a run folder: CURE (`sample --checkpoint` takes this one)"),
        ("latents", "data", "a folder of such folders: give some of those in it: latents/one latents/two"),
        ("latents/one/train.tar", "data", "a shard of prepared data: give latents/one"),
        (
            "videos/1.mp4",
            "data",
            "a video: prepare it first, with `python -m gpdit_lightning prepare --videos videos/1.",
        ),
        ("images", "data", "a folder with images: prepare it first, with `python -m gpdit_lightning prepare --images "),
        ("empty", "data", "an empty folder: CURE"),
        ("runs/a", "recipe", "a run folder: give runs/a/config.yaml"),
        ("runs/a/checkpoints/step-1.ckpt", "recipe", "a checkpoint: give runs/a/config.yaml"),
        ("latents/one", "media", "a folder of prepared data: CURE (`fit --data_dir` takes this one)"),
    ],
)
def test_a_path_of_another_kind_is_named_with_what_takes_it(path: str, wanted: Kind, expected: str) -> None:
    assert reason_and_cure(Path(path), wanted, "CURE").startswith(f"since it is {expected}")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "fit --config gpdit:demo/stage2_mixed --data_dir videos/1.mp4",
            "which has no manifest.json, since it is a vid",
        ),
        (
            "inspect latents",
            "there are no data at latents, since it is a folder of such folders: give some of those in it: latents/one",
        ),
        (
            "inspect exported/config.json",
            "exported/config.json is no manifest, since it is a file of an exported model",
        ),
        ("fit --config videos/1.mp4", "videos/1.mp4 is no file of options, since it is a video: give a YAML file"),
        ("sample --config runs/a --checkpoint exported", "since it is a run folder: give runs/a/config.yaml"),
        ("export --checkpoint runs --out o", "there is no checkpoint at runs, since it is a folder of such folders: "),
        (
            "diagnose runs",
            "runs has no event files of TensorBoard, since it is a folder of such folders: give one of th",
        ),
        ("diagnose videos/1.mp4", "videos/1.mp4 is no run folder, since it is a video: give a run folder, such as"),
        ("prepare --codec pca --out o --videos images", "images has no video files: give it as --images; other files"),
        (
            "prepare --codec pca --out o --videos images/1.png",
            "1.png is an image, but videos are needed: give it as --im",
        ),
        ("prepare --codec pca --out o --images a.mkv", "a.mkv is a video, but images are needed: give it as --videos"),
        ("prepare --codec pca --out o --images latents/one/train.tar", "is no image, since it is a shard of prepared"),
        (
            "prepare --codec pca --out o --videos latents/one",
            "has no video files, since it is a folder of prepared data",
        ),
    ],
)
def test_options_answer_a_path_of_another_kind(
    command: str, message: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == 2
    assert message in capsys.readouterr().err
    assert not (work / "o").exists()


def test_a_training_recipe_as_options_of_another_verb(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--config", "gpdit:stage2_mixed", "--checkpoint", "runs/a"]) == 2
    assert "is a recipe of fit, not options of sample: leave it out" in capsys.readouterr().err
    (work / "mine.yaml").write_text("config: {a: b}\n")
    for verb in ("fit", "sample"):
        assert main([verb, "--config", "mine.yaml"]) == 2
        assert "mine.yaml has the field config, which no file can have" in capsys.readouterr().err


def test_entries_that_cannot_be_searched_or_are_many_do_not_replace_the_message(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "latents/secret").mkdir()
    (work / "latents/images").mkdir()
    (work / "latents/images/1.png").touch()
    read, seen = os.stat, list[str]()

    def stat(path: str | Path, **settings: Any) -> os.stat_result:
        seen.append(str(path))
        if "secret/" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path, **settings)

    monkeypatch.setattr(os, "stat", stat)
    expected = "since it is a folder of such folders: give some of those in it: latents/one latents/two"
    assert reason_and_cure(Path("latents"), "data", "CURE") == expected
    assert any("latents/secret/" in path for path in seen)
    assert not any("1.png" in path for path in seen)  # a folder may contain a thousand folders of images
    many = [work / "latents" / f"{number:03}" / "manifest.json" for number in range(300)]
    for path in many:
        path.parent.mkdir()
        path.touch()
    assert reason_and_cure(Path("latents"), "data", "CURE").endswith("give one of the 302 in it, such as latents/000")
    monkeypatch.setattr(Path, "iterdir", lambda path: os.scandir(f"{path}/nothing"))
    assert reason_and_cure(Path("latents"), "data", "CURE") == "since it is a folder that cannot be read: CURE"


def test_a_path_that_does_not_exist_names_the_folder_of_the_search_or_its_backslashes(work: Path) -> None:
    assert does_not_exist("videos/2.mp4") == f"does not exist in {work}"
    assert does_not_exist(work / "2.mp4") == "does not exist"
    assert does_not_exist(r"videos\1.mp4") == r"does not exist (folders are separated by /, not by \)"
    assert reason_and_cure(Path("runs/c"), "run", "CURE") == f"since it does not exist in {work}: CURE"
    shutil.rmtree(work)
    assert does_not_exist("videos/2.mp4") == "does not exist"
