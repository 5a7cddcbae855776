"""`attention`: the figure of any recipe."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from gpdit_lightning.cli import main


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["stage2_mixed", "--frame_tokens=1x2"], ["attention: 4 clean and 5 noisy blocks; 100 of 324 pairs"]),
        (["stage2_mixed", "--frames=2"], ["attention: 1 clean and 2 noisy blocks; 64 of 144 pairs"]),
        (["stage4_few_shot", "--frame_tokens=1x1"], ["attention: 3 clean and 2 noisy blocks; 12 of 25 pairs"]),
        (["systems/acdit_image"], ["attention: 3 clean and 4 noisy blocks; 256 of 784 pairs"]),
        (
            ["systems/vidgpt", "--frame_tokens=1x2"],
            ["within frames: 2 clean and 2 noisy blocks; 36 of 324", "along time: 2 clean and 2 noisy blocks; 74 of"],
        ),
        (["acdit/imagenet_xl_classification"], ["attention: 4 clean blocks, no noisy ones; 160 of 256 pairs"]),
        (
            ["acdit/ucf101_xl_classification", "--frame_tokens=1x1"],
            ["attention: 4 clean blocks, no noisy ones; 160 of"],
        ),
        (["systems/full_sequence", "--frames=4"], ["attention: 1 clean and 1 noisy blocks; 208 of 256 pairs"]),
    ],
)
def test_figures_of_recipes(
    arguments: list[str], lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, *options = arguments
    path = tmp_path / "figure.png"
    path.touch()
    assert main(["attention", "--config", f"gpdit:{recipe}", "--out", str(path), *options]) == 0
    printed = capsys.readouterr()
    assert f"the existing {path} is replaced" in printed.err
    assert all(line in printed.out for line in lines), printed.out
    assert "attention backend" not in printed.err
    with Image.open(path) as figure:
        assert figure.width > 600 * len(lines)
        of_noise = {(59, 125, 216), (228, 116, 60)} & {colour for _, colour in figure.convert("RGB").getcolors(1 << 24)}
        assert len(of_noise) == (0 if "classification" in recipe else 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frames=3"], "--frames is 3, of which none has noise (data.videos.frames_without_loss is 3): give more"),
        (["--frames=2"], "--frames is 2, less than the first block of the recipe: give at least 3"),
        (["--frames=0"], "--frames is 0: give at least 1"),
        (["--frame_tokens=2"], "--frame_tokens is 2: give ROWSxCOLUMNS, such as 2x2"),
        (["--frame_tokens=0x2"], "--frame_tokens is 0x2: give ROWSxCOLUMNS, such as 2x2"),
        ([f"--out={'x' * 300}.png"], "x.png"),
        (["--out=."], ". cannot be written, since it is a folder: give another --out"),
        (["--frame_tokens=900x2"], "drawn as 19,800 tokens, more than 4,096: give fewer --frames or --frame_tokens"),
    ],
)
def test_wrong_options_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figure.png"
    recipe = "systems/vidgpt"
    assert main(["attention", "--config", f"gpdit:{recipe}", "--out", str(path), *options]) == 2
    assert message in capsys.readouterr().err
    assert not path.exists()


def test_an_unknown_backend_of_matplotlib_is_named(tmp_path: Path) -> None:
    words = ["attention", "--config=gpdit:stage2_mixed", "--frames=2", f"--out={tmp_path / 'a.png'}"]
    command = [sys.executable, "-m", "gpdit_lightning", *words]
    ended = subprocess.run(command, env=os.environ | {"MPLBACKEND": "x"}, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "error: the environment variable MPLBACKEND is 'x'" in ended.stderr
