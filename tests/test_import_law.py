"""Who may import whom (docs/architecture.md), read from the source of every module."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gpdit_lightning"
LEAVES = {"errors", "files"}
# room -> the rooms it may import from besides the leaves and itself
ALLOWED = {
    "model": set(),
    "diffusion": set(),
    "codecs": {"media"},  # fit_pca reads pictures and videos
    "data": set(),
    "media": set(),
    "preparation": {"codecs", "data", "media"},
    "generation": {"model", "diffusion", "codecs", "data", "media"},
    "evaluation": {"model", "diffusion", "codecs", "data", "media", "generation"},
    "training": {"model", "diffusion", "data", "generation", "codecs", "media"},
    "stages": {"model", "diffusion", "data", "training"},
}
# Rooms that must work where Lightning is not installed, but for the one file that is its bridge.
WITHOUT_LIGHTNING = {"model", "diffusion", "codecs", "data", "media", "preparation", "generation", "evaluation"}
BRIDGE = PACKAGE / "data" / "datamodule.py"
# How a model is shared: all that the network needs besides torch, and where.
SHARING = {"gpdit.py": {"huggingface_hub"}, "weights.py": {"safetensors"}}


def imported(path: Path) -> set[str]:
    """The modules a file imports, anywhere in it, by full name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def files_of(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py"))


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_imports_only_what_it_stands_on(room: str) -> None:
    assert files_of(room)
    for path in files_of(room):
        for name in imported(path):
            if not name.startswith("gpdit_lightning."):
                continue
            other = name.split(".")[1]
            assert other in ALLOWED[room] | LEAVES | {room}, f"{path.name} of {room} imports {name}"


@pytest.mark.parametrize("room", sorted(WITHOUT_LIGHTNING))
def test_lightning_stays_outside(room: str) -> None:
    for path in files_of(room):
        if path != BRIDGE:
            tops = {name.split(".")[0] for name in imported(path)}
            assert not tops & {"lightning", "pytorch_lightning"}, path


def test_the_network_and_the_objective_need_torch_alone() -> None:
    allowed = {"torch", "xformers", "gpdit_lightning"}
    standard = set(__import__("sys").stdlib_module_names)
    for path in files_of("model") + files_of("diffusion"):
        tops = {name.split(".")[0] for name in imported(path)}
        assert tops <= allowed | standard | SHARING.get(path.name, set()), path


def test_every_room_is_under_the_law() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(ALLOWED) | {"cli"}
