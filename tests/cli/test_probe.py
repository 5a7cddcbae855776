"""`probe`, end to end on synthetic videos."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gpdit_lightning.checkpoints.reading import sha256_of_weights
from gpdit_lightning.cli import run
from gpdit_lightning.diffusion import Guidance, NoiseSchedule
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.report import Protocol, Report, Score
from gpdit_lightning.evaluation.report_text import write_report
from gpdit_lightning.media.video_writer import write_video

GROUPS = (7, 1, 8, 2, 9)  # split 1 holds out 1, 2 and 7


@pytest.fixture(scope="module")
def ucf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright and dark videos of five frames."""
    folder = tmp_path_factory.mktemp("ucf")
    numbers = torch.Generator().manual_seed(0)
    for label, level in (("Bright", 160), ("Dark", 20)):
        (folder / label).mkdir()
        for group in GROUPS:
            pixels = torch.randint(level, level + 60, (5, 3, 4, 4), generator=numbers, dtype=torch.uint8)
            pixels = pixels.repeat_interleave(8, 2).repeat_interleave(8, 3)
            write_video(folder / label / f"v_{label}_g{group:02d}_c01.avi", pixels, 24)
    return folder


def probe(*options: Any) -> None:
    run("probe", [str(option) for option in ("--workers", 1, "--frames", 5, "--stride", 1, *options)])


def evaluation_of(checkpoint: Path, **scores: float) -> Report:
    """Return a report as `evaluate` writes it for an exported folder."""
    protocol = Protocol(
        data="toys", choice="all", split_sha256="0", videos=2, context_frames=1, generated_frames=4, fvd_frames="all",
        size=(32, 32), stride=1, resize="none", sampler="rotation", steps=2, guidance=Guidance(),
        schedule=NoiseSchedule(), seeds=(0,), window=4, precision="32", checkpoint=checkpoint.name,
        checkpoint_sha256=sha256_of_weights(checkpoint), step=1, weights="ema", codec="pca", codec_sha256="0",
        networks={}, versions={}, hardware="none",
    )  # fmt: skip
    return Report(protocol, {name: Score.of([value]) for name, value in scores.items()})


def test_every_layer_of_two_models_is_probed(
    workspace: Path, ucf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = [workspace / "of2", workspace / "of"]
    write_report(evaluation_of(workspace / "of", fvd=300.0), tmp_path)
    arguments = ["--checkpoint", *checkpoints, "--videos", ucf, ucf / "Dark", "--out", tmp_path / "out"]
    probe(*arguments, "--evaluations", tmp_path / "results.json", "--regularisation", 0.1)
    results = json.loads((tmp_path / "out" / "probe.json").read_text())["results"]
    assert [result["identity"] for result in results] == [sha256_of_weights(checkpoint) for checkpoint in checkpoints]
    for result in results:
        assert [score["layer"] for score in result["layers"]] == [0, 1]
        assert result["layers"][0]["accuracy"] == 1
        protocol = result["protocol"]
        assert (protocol["train_videos"], protocol["test_videos"], protocol["chance"]) == (4, 6, 0.5)
        assert (protocol["split"], protocol["size"]) == ("UCF-101's published split 1", [32, 32])
        assert protocol["regularisation"] == "C = 0.1"
    text = (tmp_path / "out" / "probe.md").read_text()
    assert text in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "probe.png") as image:
        assert image.width > 3 * image.height  # three panels: layers, steps and FVD

    cached = set((tmp_path / "out" / "features").iterdir())
    probe(*arguments, "--split", 1)
    assert set((tmp_path / "out" / "features").iterdir()) == cached
    protocol = json.loads((tmp_path / "out" / "probe.json").read_text())["results"][0]["protocol"]
    assert protocol["regularisation"].startswith("best C of 0.0001,")


def test_folders_of_classes_are_enough(workspace: Path, ucf: Path, tmp_path: Path) -> None:
    """The split, the clips and the size follow from the videos and the model."""
    for path in ucf.rglob("*.avi"):
        copy = tmp_path / "mine" / path.parent.name / path.name.replace("_c01", "")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(path)
    out = tmp_path / "out"
    run("probe", [f"--checkpoint={workspace / 'of2'}", f"--videos={tmp_path / 'mine'}", f"--out={out}", "--frames=5"])
    protocol = json.loads((out / "probe.json").read_text())["results"][0]["protocol"]
    assert (protocol["train_videos"], protocol["test_videos"], protocol["classes"]) == (8, 2, 2)
    assert (protocol["stride"], protocol["squeezed"], protocol["size"]) == (3, 10, [32, 32])
    with pytest.raises(InputError, match=r"--frames is 205, but the model has positions for 125: give fewer"):
        run("probe", [f"--checkpoint={workspace / 'of2'}", f"--videos={ucf}", f"--out={out}", "--frames=205"])


def test_evaluations_of_different_protocols_are_refused(workspace: Path, ucf: Path, tmp_path: Path) -> None:
    first, second = evaluation_of(workspace / "of", fvd=300.0), evaluation_of(workspace / "of2", fvd=200.0)
    write_report(first, tmp_path / "first")
    write_report(replace(second, protocol=replace(second.protocol, stride=3)), tmp_path / "second")
    arguments = ["--checkpoint", workspace / "of", "--videos", ucf, "--out", tmp_path / "out", "--evaluations"]
    paths = [tmp_path / name / "results.json" for name in ("first", "second")]
    with pytest.raises(InputError, match=r"second/results.json has another --stride \(3, not 1\) than .*first/"):
        probe(*arguments, *paths)
    with pytest.raises(InputError, match="evaluate the same checkpoint: give one of them"):
        probe(*arguments, paths[0], paths[0])


def test_lists_and_folders_give_the_same_split(workspace: Path, ucf: Path, tmp_path: Path) -> None:
    names = {"train": [], "test": []}
    for number, path in enumerate(sorted(ucf.rglob("*.avi"))):
        split = "train" if number % 5 < 3 else "test"
        copy = tmp_path / "set" / split / path.parent.name / f"{number}.avi"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(path)
        names[split].append(f"{copy.parent.name}/{copy.name}")
    for split, lines in names.items():
        (tmp_path / split).write_text("\n".join(lines))
    arguments = [
        "--checkpoint",
        workspace / "of2",
        "--videos",
        tmp_path / "set",
        "--group_pattern",
        ".+",
        "--out",
        tmp_path,
    ]
    results = []
    for split in (["--split", "folders"], ["--train_list", tmp_path / "train", "--test_list", tmp_path / "test"]):
        probe(*arguments, *split)
        results.append(json.loads((tmp_path / "probe.json").read_text())["results"][0])
    folders, lists = results
    assert folders["layers"] == lists["layers"]
    assert folders["protocol"]["data_sha256"] == lists["protocol"]["data_sha256"]
    assert (folders["protocol"]["split"], lists["protocol"]["split"]) == (
        "folders train and test",
        "lists train and test",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", 3], "split 3 tests on the groups g15 to g21"),
        (["--group_pattern", ".+"], "--group_pattern has no effect with split 1 of UCF-101"),
        (["--split", 1, "--train_list", "a", "--test_list", "b"], "both --split 1 and lists of videos are given"),
        (["--train_list", "a"], "give both"),
        (["--regularisation", "-1"], "--regularisation is -1.0: give auto or a number above 0"),
        (["--regularisation", "much"], "regularisation is much; it must be one of auto or a number"),
        (["--batch_size", 0], "--batch_size is 0: give at least 1"),
        (["--size", "64x64"], "--size is 64x64, but the checkpoint was trained on 32x32"),
        (["--frames", 4], "--frames is 4, which is not 1"),
        (["--evaluations", "WITHOUT_FVD"], "has no FVD: evaluate with a video network"),
        (["--checkpoint", "/nowhere"], "there is no checkpoint at /nowhere"),
    ],
)
def test_invalid_options_are_an_error(
    workspace: Path, ucf: Path, tmp_path: Path, options: list[Any], message: str
) -> None:
    write_report(evaluation_of(workspace / "of", fid=30.0), tmp_path)
    given = [tmp_path / "results.json" if option == "WITHOUT_FVD" else option for option in options]
    with pytest.raises(InputError, match=message):
        probe("--checkpoint", workspace / "of2", "--videos", ucf, "--out", tmp_path, *given)
