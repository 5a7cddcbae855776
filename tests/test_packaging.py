"""The wheel works without a clone: it contains the recipes and all verbs."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import MadeOnce

ROOT = Path(__file__).parents[1]
PRINT_BOTH = """
from contextlib import suppress
from gpdit_lightning.cli import main
for recipe in ("gpdit:stage2_mixed", "mine/stage2_mixed.yaml"):
    with suppress(SystemExit):
        main(["fit", f"--config={recipe}", "--print_config"])
    print("---")
"""


@pytest.fixture(scope="module")
def installed(made_once: MadeOnce) -> Path:
    """Content of the wheel that is built from the source distribution."""
    return made_once("packaging", install) / "site"


def install(folder: Path) -> None:
    ignored = shutil.ignore_patterns(".git", "build", "*.egg-info", "__pycache__", "runs", "latents", ".venv*")
    shutil.copytree(ROOT, folder / "clone", ignore=ignored)
    build(folder / "clone", "build_sdist", folder)
    shutil.unpack_archive(next(folder.glob("*.tar.gz")), folder / "sdist")
    build(next((folder / "sdist").iterdir()), "build_wheel", folder)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")


def build(source: Path, step: str, out: Path) -> None:
    command = [sys.executable, "-c", f"from setuptools import build_meta; build_meta.{step}({str(out)!r})"]
    subprocess.run(command, cwd=source, check=True, capture_output=True)


def run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python(installed, cwd, "-m", "gpdit_lightning", *arguments)


def python(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )


def test_the_wheel_contains_all_data_files(installed: Path) -> None:
    package = ROOT / "gpdit_lightning"
    expected = {
        path: path.relative_to(ROOT) for name in ("*.safetensors", "py.typed", "page/*") for path in package.rglob(name)
    }
    expected |= {path: Path("gpdit_lightning", path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*.yaml")}
    for source, path in expected.items():
        assert (installed / path).read_bytes() == source.read_bytes(), path
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"gpdit_lightning"}


def test_shipped_recipes_can_be_listed_copied_and_used(installed: Path, tmp_path: Path) -> None:
    listed = run(installed, tmp_path, "recipes")
    assert "gpdit:stage2_mixed" in listed.stdout, listed.stderr
    assert run(installed, tmp_path, "recipes", "--out", "mine").returncode == 0
    printed = python(installed, tmp_path, "-c", PRINT_BOTH)
    by_name, by_path, _ = printed.stdout.split("---\n")
    assert "class_path: gpdit_lightning.stages.MixedStage" in by_name, printed.stderr
    assert "max_steps: 200000" in by_name
    assert len(by_name.splitlines()) == len(by_path.splitlines())
