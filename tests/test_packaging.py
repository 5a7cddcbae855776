"""Packages: the wheel works without a clone, the source distribution is the repository, and versions agree."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from gpdit_lightning.version import __version__
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
    ignored = shutil.ignore_patterns(".git", "build", "dist", "*.egg-info", "__pycache__", "runs", "latents", ".venv*")
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


def files_below(folder: Path) -> dict[Path, bytes]:
    """Return the content of all files except compiled ones, by path."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(folder): path.read_bytes() for path in paths}


def test_the_wheel_contains_the_package_and_the_recipes(installed: Path) -> None:
    expected = files_below(ROOT / "gpdit_lightning")
    expected |= {"recipes" / path: content for path, content in files_below(ROOT / "recipes").items()}
    assert files_below(installed / "gpdit_lightning") == expected
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"gpdit_lightning"}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a clone")
def test_the_source_distribution_contains_the_repository(installed: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    expected = {Path(name) for name in listed.split("\0") if name and (ROOT / name).exists()}
    (source,) = (installed.parent / "sdist").iterdir()
    assert expected <= files_below(source).keys()


def test_shipped_recipes_can_be_listed_copied_and_used(installed: Path, tmp_path: Path) -> None:
    listed = run(installed, tmp_path, "recipes")
    assert "gpdit:stage2_mixed" in listed.stdout, listed.stderr
    assert run(installed, tmp_path, "recipes", "--out", "mine").returncode == 0
    printed = python(installed, tmp_path, "-c", PRINT_BOTH)
    by_name, by_path, _ = printed.stdout.split("---\n")
    assert "class_path: gpdit_lightning.stages.MixedStage" in by_name, printed.stderr
    assert "max_steps: 200000" in by_name
    assert len(by_name.splitlines()) == len(by_path.splitlines())


def test_oldest_versions_are_the_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = (
        requirement for name in ("shots", "ray", "edges") for requirement in project["optional-dependencies"][name]
    )
    bounds = {
        canonicalize_name(requirement.name): [
            Version(bound.version) for bound in requirement.specifier if bound.operator == ">="
        ]
        for requirement in map(Requirement, (*project["dependencies"], *extras))
    }
    lines = (ROOT / "constraints" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.split("==") for line in lines if not line.startswith("#"))
    assert {canonicalize_name(name): [Version(version)] for name, version in pins} == bounds


def test_version_and_date_are_the_same_everywhere() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d\S*)\] - (\d{4}-\d\d-\d\d)$", changelog, flags=re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert released[0] == (__version__, str(citation["date-released"]))
    assert citation["version"] == __version__
    assert re.search(r"^## \[Unreleased\]$", changelog, flags=re.MULTILINE)
