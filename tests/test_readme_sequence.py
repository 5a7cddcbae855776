"""The commands of README.md and of the first pages of docs/ run in their order, in an empty directory, from a wheel.

The commands are those of the code blocks as they are written, without the excluded ones. Options that lower the number
of steps and frames are appended to them. Words in capitals stand for files of a user, which are generated; `runs/NAME`
is a link to a run that an earlier command trains.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from gpdit_lightning.media.video_writer import write_video
from tests.cli.sampling import stripes
from tests.test_packaging import installed
from tests.test_readme import ROOT, bash_blocks

__all__ = ["installed"]  # a fixture

DOCUMENTS = ("README.md", "docs/tutorials/own_data.md", "docs/tutorials/few_shot.md", "docs/sharing.md")
COMMAND = "python -m gpdit_lightning "
TIME_LIMIT = 900  # seconds, for a command that does not end
NEEDS_DEMO = re.compile(r"gpdit_lightning demo|runs/demo")
EXCLUDED = {
    r"python3 -m venv|\.venv|pip install|pytest": "installs the package, which is installed here, or runs this test",
    r"^ln -s": "links data of the demo, in place of those of a user",
    r"tensorboard|gpdit_lightning app": "serves until it is stopped",
    r"latents/mine\b": "downloads the WanVAE, or trains GPDiT-H with 2.28B parameters on its latents",
    r"recipes/": "reads the recipes of a clone",
}
LOWERED = {
    "demo": "--max_steps 2",
    "fit": "--trainer.max_steps 1",
    "chain": "--trainer.max_steps 1",
    "ablate": "--trainer.max_steps 1 --seeds 0",
    "sample": "--steps 1 --frames 4",
    "transform": "--steps 1",
    "evaluate": "--steps 1",
}
RUN_ALL = """
import functools, glob, json, sys
import docstring_parser
from gpdit_lightning.cli import main, plan_trial
docstring_parser.parse_from_object = functools.cache(docstring_parser.parse_from_object)  # see conftest.py
plan_trial.MAX_STEPS = 3
for words in json.load(sys.stdin):
    print("$", *words, flush=True)
    groups = [sorted(glob.glob(word)) if "*" in word else [word] for word in words]
    try:
        status = main([word for group in groups for word in group])
    except SystemExit as end:  # of --print_config
        status = end.code
    if status:
        sys.exit(f"exit status {status}")
print("all commands have run")
"""


def commands() -> Iterator[str]:
    """Yield the commands of the documents' code blocks in order, as they are written, without comments; each once."""
    blocks = (block for name in DOCUMENTS for block in bash_blocks((ROOT / name).read_text(encoding="utf-8")))
    lines = (line for block in blocks for line in block.replace("\\\n", " ").splitlines())
    given = (command for line in lines for command in re.sub(r"\s#.*", "", line).split(" && "))
    yield from dict.fromkeys(" ".join(command.split()) for command in given)


def lowered(command: str) -> str:
    """Return a command with the options that lower its number of steps and frames."""
    return f"{command} {LOWERED.get(command.removeprefix(COMMAND).split()[0], '')}".strip()


def included() -> list[str]:
    """Return the commands that are not excluded."""
    return [command for command in commands() if not any(re.search(pattern, command) for pattern in EXCLUDED)]


def make_files_of_a_user(folder: Path) -> None:
    """Write the files that the commands name: videos and images of several sizes, rates and lengths, and links."""
    sizes = ((48, 64), (64, 48), (50, 90))
    for number in range(9):
        height, width = sizes[number % 3]
        video = torch.cat([stripes(number)] * 2, dim=3).repeat(1, 1, 3, 1)[..., :height, :width]
        path = f"MY_VIDEOS/digit_{number:04}.mp4" if number < 8 else "MY_VIDEO.mp4"
        (folder / path).parent.mkdir(exist_ok=True)
        write_video(folder / path, video[: 60 - 5 * (number % 3)], (24, 30, 60)[number % 3])
        (folder / "CLASSES" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        (folder / "CLASSES" / "ab"[number % 2] / f"{number}.mp4").symlink_to(folder / path)
        for name in ("MY_IMAGES", "PAIRS/source", "PAIRS/target"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            save_image(folder / name / f"{number}.png", video[number])
    for name in ("IMAGE.png", "IMAGE.jpg"):
        save_image(folder / name, stripes(9)[0])
    links = {
        "VIDEOS": "MY_VIDEOS",
        "runs/NAME": "tiny/stage2_mixed",
    }
    (folder / "runs").mkdir()
    for name, target in links.items():
        (folder / name).symlink_to(target)


def save_image(path: Path, pixels: torch.Tensor) -> None:
    """Write pixels (3, H, W)."""
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)


def test_exclusions_are_those_of_existing_commands() -> None:
    for pattern in EXCLUDED:
        assert any(re.search(pattern, command) for command in commands()), pattern
    run = included()
    assert all(command.startswith(COMMAND) for command in run), run
    verbs = {command.removeprefix(COMMAND).split()[0] for command in run}
    assert verbs >= {"demo", "prepare", "inspect", "fit", "chain", "sample", "transform", "evaluate", "export"}
    assert verbs >= {"plan", "prepare-pairs", "probe", "features"}


def test_commands_run_in_sequence(installed: Path, tmp_path: Path) -> None:
    """All commands that need no demo, in one process; the trial of `plan` has three steps."""
    make_files_of_a_user(tmp_path)
    run = [command for command in included() if not NEEDS_DEMO.search(command)]
    process = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        input=json.dumps([shlex.split(lowered(command).removeprefix(COMMAND)) for command in run]),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    )
    assert process.returncode == 0, f"{process.stdout[-2000:]}\n{process.stderr[-4000:]}"
    assert [line[2:].split()[0] for line in process.stdout.splitlines() if line.startswith("$ ")] == [
        command.removeprefix(COMMAND).split()[0] for command in run
    ]
    assert process.stdout.endswith("all commands have run\n")


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_every_command_runs_in_a_shell(installed: Path, tmp_path: Path) -> None:
    """All commands, the demo first, each as it is typed."""
    make_files_of_a_user(tmp_path)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for command in map(lowered, included()):
        process = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(installed), "PATH": path},
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
        )
        assert process.returncode == 0, f"{command}\n{process.stdout[-2000:]}\n{process.stderr[-4000:]}"
