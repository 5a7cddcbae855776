"""What the README tells a newcomer to type is what CI types, and what the package has."""

import re
import shlex
from pathlib import Path

import pytest

from gpdit_lightning.cli import VERBS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
PYTHON_BLOCK = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = "\n".join(BLOCKS).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_it_opens_with_two_command_lines() -> None:
    demo, test = (block.strip() for block in BLOCKS[:2])
    assert "\n" not in demo + test
    assert demo.endswith("python -m gpdit_lightning demo")
    assert test.endswith("pytest")


def test_ci_types_the_same() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    install, test = BLOCKS[1].strip().split(" && ")[-2:]
    assert install.replace("pip install", "pip install -q") in script
    assert re.search(rf"^ *{test}$", script, flags=re.MULTILINE)


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_what_a_command_names_exists(command: list[str]) -> None:
    if "gpdit_lightning" in command and "-m" in command:
        assert command[command.index("gpdit_lightning") + 1] in VERBS
    for word in command:
        if word.startswith(("recipes/", "data_prep/", "constraints/")):
            assert (ROOT / word).is_file(), word


def test_the_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_the_python_example_runs() -> None:
    assert PYTHON_BLOCK is not None
    names: dict[str, object] = {}
    exec(compile(PYTHON_BLOCK[1], "README.md", "exec"), names)
    assert names["velocity"].shape == (2, 16, 24, 40)  # type: ignore[attr-defined]
    assert set(names["features"]) == {2, 4}  # type: ignore[call-overload]
