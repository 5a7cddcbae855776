"""Who may import whom (docs/architecture.md), read from the source of every module."""

import ast
import sys
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gpdit_lightning"
# Single files that any package may import; they import only each other.
LEAVES = {
    *(
        "errors",
        "files",
        "hashes",
        "devices",
        "imports",
        "names",
        "path_kinds",
        "progress",
        "randomness",
        "recalled_files",
        "regular_files",
        "retries",
        "schema",
        "signals",
        "specs",
        "tensor_files",
    ),
    *("version", "whitening", "workers"),
}
# package -> the packages that it may import from, besides the leaves and itself
ALLOWED = {
    "options": set(),
    "model": set(),
    "diffusion": set(),
    "media": set(),
    "data": set(),
    "codecs": {"media"},  # fitting_clips.py reads images and videos
    "estimation": {"model", "data"},
    "planning": {"model", "data", "estimation", "options"},
    "diagnosis": {"model", "data"},
    "checkpoints": {"model", "diffusion"},
    "preparation": {"codecs", "data", "media", "options"},
    "generation": {"options", "model", "diffusion", "codecs", "data", "media", "checkpoints"},
    "app": {"options", "diffusion", "media", "generation"},
    "evaluation": {"options", "model", "diffusion", "codecs", "data", "media", "checkpoints", "generation"},
    "probing": {"model", "codecs", "data", "media", "checkpoints", "evaluation"},
    "training": {
        *("options", "model", "diffusion", "data", "codecs", "media", "checkpoints", "estimation", "generation"),
        *("evaluation", "diagnosis"),
    },
    "stages": {"model", "diffusion", "data", "checkpoints", "training"},
}
# Of the leaves, the network and the objective need three only.
TORCH_ONLY = {"model", "diffusion"}
# Packages that know Lightning. Below them two files are its bridges: the data module, and the format of checkpoints.
WITH_LIGHTNING = {"training", "stages", "cli"}
BRIDGES = {PACKAGE / "data" / "datamodule.py", PACKAGE / "checkpoints" / "io.py"}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it, by full name: of `from P import M` both P and P.M."""
    return imports_of(ast.walk(ast.parse(path.read_text(encoding="utf-8"))), path)


def imports_of(nodes: Iterable[ast.AST], path: Path) -> set[str]:
    """The modules that some statements of a file import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names if is_module(f"{node.module}.{alias.name}")}
    return names


def is_module(name: str) -> bool:
    path = ROOT / Path(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def internal_imports(path: Path) -> set[str]:
    """The parts of the package that a file imports: `model` for `gpdit_lightning.model.config`, "" for its top."""
    parts = {name.partition(".")[2] for name in imports(path) if name.split(".")[0] == "gpdit_lightning"}
    if any(parts):
        parts.discard("")  # `from gpdit_lightning import errors` names the module itself too
    return {part.split(".")[0] for part in parts}


def files_of(package: str) -> list[Path]:
    return sorted((PACKAGE / package).rglob("*.py"))


def top_level_names(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_a_package_imports_only_those_below_it(package: str) -> None:
    assert files_of(package)
    leaves = {"errors", "imports", "devices"} if package in TORCH_ONLY else LEAVES
    for path in files_of(package):
        others = internal_imports(path) - ALLOWED[package] - leaves - {package}
        assert not others, f"{path.relative_to(ROOT)} imports {sorted(others)}"


def test_the_leaves_import_no_package() -> None:
    for leaf in LEAVES:
        assert internal_imports(PACKAGE / f"{leaf}.py") <= LEAVES, leaf


def test_no_circle_of_packages() -> None:
    try:
        TopologicalSorter(ALLOWED).prepare()
    except CycleError as error:
        pytest.fail(f"packages import each other in a circle: {error.args[1]}")


def test_no_circle_of_files() -> None:
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        if path.name != "__init__.py":  # a package's face imports its files, and nothing in the package imports it
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            graph[module] = {name for name in imports(path) if name.startswith("gpdit_lightning.")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"files import each other in a circle: {error.args[1]}")


def test_lightning_stays_above() -> None:
    for package in sorted(set(ALLOWED) - WITH_LIGHTNING):
        for path in files_of(package):
            if path not in BRIDGES:
                assert not top_level_names(path) & {"lightning", "pytorch_lightning"}, path


def test_the_network_and_the_objective_need_torch_alone() -> None:
    for package in sorted(TORCH_ONLY):
        for path in files_of(package):
            allowed = {"torch", "gpdit_lightning"} | sys.stdlib_module_names
            if path == PACKAGE / "model" / "attention" / "xformers_backends.py":
                allowed |= {"xformers"}
            assert top_level_names(path) <= allowed, path


def test_options_are_read_without_heavy_imports() -> None:
    allowed = {"gpdit_lightning"} | sys.stdlib_module_names
    light = ["options", *LEAVES - {"devices", "progress", "randomness", "files", "whitening", "workers"}]
    light_files = ("__init__.py", "parsing.py", "arguments.py", "messages.py")
    for path in [
        *files_of("options"),
        *(PACKAGE / "cli" / name for name in light_files),
    ]:
        assert top_level_names(path) <= allowed | {"jsonargparse"}, path
    for path in files_of("options"):
        assert internal_imports(path) <= {*light}, path


def test_packages_that_take_a_second_to_import_are_imported_where_they_are_used() -> None:
    for path in PACKAGE.rglob("*.py"):
        at_start = imports_of(ast.parse(path.read_text(encoding="utf-8")).body, path)
        assert not {name.split(".")[0] for name in at_start} & {"sklearn", "pandas", "deepspeed", "ray"}, path


def test_every_package_and_file_is_under_the_law() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages == set(ALLOWED) | {"cli"}
    assert {path.stem for path in PACKAGE.glob("*.py")} == LEAVES | {"__init__", "__main__"}
