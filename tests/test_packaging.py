"""The wheel works without a clone: it contains the recipes and all verbs."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Content of the wheel that is built from the source distribution."""
    folder = tmp_path_factory.mktemp("packaging")
    ignored = shutil.ignore_patterns(".git", "build", "*.egg-info", "__pycache__", "runs", "latents", ".venv*")
    shutil.copytree(ROOT, folder / "clone", ignore=ignored)
    build(folder / "clone", "build_sdist", folder)
    shutil.unpack_archive(next(folder.glob("*.tar.gz")), folder / "sdist")
    build(next((folder / "sdist").iterdir()), "build_wheel", folder)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def build(source: Path, step: str, out: Path) -> None:
    command = [sys.executable, "-c", f"from setuptools import build_meta; build_meta.{step}({str(out)!r})"]
    subprocess.run(command, cwd=source, check=True, capture_output=True)


def run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpdit_lightning", *arguments],
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
    by_name, by_path = (
        run(installed, tmp_path, "fit", "--config", name, "--print_config")
        for name in ("gpdit:stage2_mixed", "mine/stage2_mixed.yaml")
    )
    assert "class_path: gpdit_lightning.stages.MixedStage" in by_name.stdout, by_name.stderr
    assert "max_steps: 200000" in by_name.stdout
    assert len(by_name.stdout.splitlines()) == len(by_path.stdout.splitlines())
