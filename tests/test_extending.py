"""The examples of docs/extending.md work: its files are written, its commands run, and each part is used."""

import importlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from gpdit_lightning.checkpoints.reading import open_weights
from gpdit_lightning.cli import main
from gpdit_lightning.media.video_writer import write_video

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([\w ]+)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
BLOCK = re.compile(r"```(python|yaml|bash)\n(.*?)```", re.DOTALL)


def follow(text: str) -> None:
    """Write the files and run the commands of a section, in the current folder."""
    for kind, content in BLOCK.findall(text):
        if kind == "bash":
            for line in content.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                assert words[:3] == ["python", "-m", "gpdit_lightning"]
                assert main(words[3:]) == 0, line
        else:
            path = Path(content.partition("\n")[0].removeprefix("# "))
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a few videos and images, and the files and data from the beginning of the page."""
    folder = tmp_path_factory.mktemp("extending")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        (folder / "MY_VIDEOS").mkdir()
        (folder / "MY_IMAGES").mkdir()
        generator = torch.Generator().manual_seed(0)
        for number in range(4):
            noise = torch.randint(0, 256, (12, 3, 32, 32), generator=generator, dtype=torch.uint8)
            write_video(folder / "MY_VIDEOS" / f"{number}.mp4", noise, 24)
            Image.fromarray(noise[0].permute(1, 2, 0).numpy()).save(folder / "MY_IMAGES" / f"{number}.png")
        follow(PAGE.partition("\n## ")[0])
        yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "my_parts"]:
        del sys.modules[name]


@pytest.fixture
def count_calls(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], list[int]]:
    """Return a function `count(module, name)` that counts the calls of a function of the page."""

    def count(module: str, name: str) -> list[int]:
        importlib.invalidate_caches()
        owner: Any = importlib.import_module(module)
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        original, calls = getattr(owner, last), [0]

        def counted(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(owner, last, counted)
        return calls

    return count


def split_at_commands(section: str) -> tuple[str, str]:
    """Return the files and the commands of a section."""
    blocks = [match[0] for match in BLOCK.finditer(SECTIONS[section])]
    files = [block for block in blocks if not block.startswith("```bash")]
    return "\n".join(files), "\n".join(block for block in blocks if block.startswith("```bash"))


@pytest.fixture(scope="module")
def stage(folder: Path) -> Path:
    """The run folder of the first section, whose checkpoint later sections use."""
    follow(SECTIONS["A stage"])
    return folder / "runs" / "stage"


def test_a_stage(stage: Path, folder: Path) -> None:
    assert open_weights(stage).weights.facts.stage == "HuberStage"
    recipe = yaml.safe_load((folder / "runs" / "stage" / "config.yaml").read_text())
    assert recipe["model"]["init_args"]["delta"] == 0.5


def test_a_callback(folder: Path) -> None:
    follow(SECTIONS["A callback"])
    assert re.fullmatch(r"(\d videos \d+\.\d{4}\n)+", (folder / "runs" / "callback" / "log.txt").read_text())


def test_a_logger(folder: Path) -> None:
    follow(SECTIONS["A logger"])
    run_dir = folder / "runs" / "logger"
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {"loss/train", "system/steps_per_s"} <= set().union(*rows)
    assert list(run_dir.glob("events*"))


def test_an_attention_backend(folder: Path, count_calls: Callable[[str, str], list[int]]) -> None:
    files, commands = split_at_commands("An attention backend")
    follow(files)
    calls = count_calls("my_parts.attention", "plain")
    follow(commands)
    assert calls[0] > 0


@pytest.mark.usefixtures("stage")
def test_a_sampler(folder: Path, count_calls: Callable[[str, str], list[int]]) -> None:
    files, commands = split_at_commands("A sampler")
    follow(files)
    calls = count_calls("my_parts.samplers", "Midpoint.solve")
    follow(commands)
    assert calls[0] > 0
    assert (folder / "midpoint.mp4").is_file()
    assert list((folder / "runs" / "sampler" / "previews").glob("*.png"))


@pytest.mark.usefixtures("stage")
def test_a_metric_network(folder: Path) -> None:
    follow(SECTIONS["A metric network"])
    report = next((folder / "evaluations" / "mine").glob("*.json")).read_text()
    for text in ("my_parts.metrics.RandomProjection", "mean color", '"is"', '"fid"', '"fvd"'):
        assert text in report


def test_a_codec(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    follow(SECTIONS["A codec"])
    path = "my_parts.codecs.BlockMeans"
    recorded = json.loads((folder / "latents" / "means" / "manifest.json").read_text())["codec"]
    assert (recorded["name"], recorded["source"]) == (path, "gain=2")
    assert open_weights(folder / "runs" / "codec").weights.facts.codec.to_dict() == recorded
    assert list((folder / "runs" / "codec" / "previews").glob("*.png"))
    assert (folder / "means.mp4").is_file()
    next_command = re.search(r"^next: python -m gpdit_lightning (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert next_command
    small = ["--config=gpdit:size/tiny", "--trainer.max_steps=1", "--data.videos.batch_size=2"]
    assert main([*shlex.split(next_command[1]), *small, "--preview.sampler_steps=1"]) == 0
    assert list((folder / "runs" / "tiny" / "stage2_mixed" / "previews").glob("*.png"))

    assert main(["export", "--checkpoint=runs/codec", "--out=exported"]) == 0
    assert f"sample --checkpoint exported --codec {path} --context VIDEO.mp4" in capsys.readouterr().out
    assert f"sample --checkpoint MODEL --codec {path} --context" in (folder / "exported" / "README.md").read_text()

    prepare = BLOCK.findall(SECTIONS["A codec"])[1][1].replace("\\\n", " ").splitlines()[0]
    for command, message in (
        (
            prepare.replace("gain=2", "gain=3"),
            "are of different codecs (std (1.0, 1.0, 1.0) and (1.5, 1.5, 1.5)): give",
        ),
        (
            prepare.replace("--codec_source gain=2", ""),
            "are of different codecs (std (1.0, 1.0, 1.0) and (0.5, 0.5, 0.5",
        ),
        (
            "python -m gpdit_lightning fit --config recipe.yaml --data.videos.manifests [latents/means]",
            "takes latents of 16 channels, but the data have 3: give --model.init_args.backbone.latent_channels 3",
        ),
        (
            "python -m gpdit_lightning sample --checkpoint=runs/codec --context=MY_VIDEOS/0.mp4 --out=refused.mp4",
            f"a file must not choose code to import: if you trust that class, give --codec {path}",
        ),
    ):
        assert main(shlex.split(command)[3:]) == 2
        assert message in capsys.readouterr().err
    assert not (folder / "refused.mp4").exists()


def test_every_section_is_tested() -> None:
    tests = {name.removeprefix("test_").replace("_", " ") for name in globals() if name.startswith("test_a")}
    assert tests == {section.lower() for section in SECTIONS}
