"""Recipe files: YAML that builds on other YAML; recipes that ship with the package."""

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gpdit_lightning.cli.bounded_yaml import load_yaml, read_text
from gpdit_lightning.data.source import KINDS
from gpdit_lightning.errors import InputError
from gpdit_lightning.names import check_local
from gpdit_lightning.path_kinds import does_not_exist

SHIPPED = "gpdit:"  # `gpdit:stage2_mixed` is the shipped recipe stage2_mixed.yaml
AUTO = "gpdit:auto"  # a recipe that `fit` plans for its data
MAX_FILES = 100  # a recipe with all of its bases, each as often as it is named


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes: inside an installed package, or beside the package in a clone."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def recipe_path(name: str | Path, role: str = "the recipe") -> Path:
    """Return the file of a recipe.

    Args:
        name: a path, or `gpdit:` and the name of a shipped recipe: its path without `.yaml`, or the last part of the
            path if no other recipe has the same one (`gpdit:size/tiny`, `gpdit:tiny`).
        role: what the recipe is, for the message about an address.

    Raises:
        InputError: no shipped recipe has this name, or several have; or it is an address.
    """
    name = str(name)
    if not name.startswith(SHIPPED):
        check_local(role, name)
        return Path(name)
    if name == AUTO:
        raise InputError(
            f"{AUTO} is a recipe of fit, validate and test only: write one with `python -m gpdit_lightning plan`, and "
            "give its path."
        )
    key = name.removeprefix(SHIPPED).removesuffix(".yaml")
    shipped = {path.relative_to(recipes_folder()).with_suffix("").as_posix(): path for path in shipped_recipes()}
    if key in shipped:
        return shipped[key]
    matches = [path for path in shipped if path.endswith(f"/{key}")]
    if len(matches) == 1:
        return shipped[matches[0]]
    names = dict.fromkeys([*shipped, *(path.split("/")[-1] for path in shipped)])
    near = matches or difflib.get_close_matches(key, names, 3, 0.5)
    advice = f"did you mean {' or '.join(SHIPPED + path for path in near)}?" if near else "give another name;"
    raise InputError(f"{name} names no shipped recipe: {advice} `python -m gpdit_lightning recipes` lists all.")


def shipped_recipes() -> list[Path]:
    """Return the files of all shipped recipes."""
    return sorted(recipes_folder().rglob("*.yaml"))


def with_bases(arguments: Sequence[str]) -> list[str]:
    """Return command-line arguments with the bases of every `--config FILE` inserted before it.

    The bases are the recipes in the field `base` of FILE. Later files override earlier ones field by field.

    Raises:
        InputError: `--config` has no file, a base does not exist, a recipe is a base of itself, or a file has the field
            `config`.
    """
    expanded: list[str] = []
    given = iter(arguments)
    for argument in given:
        name, equals, value = argument.partition("=")
        if name not in ("--config", "-c"):
            expanded.append(argument)
            continue
        file = value if equals else next(given, "")
        if not file:
            raise InputError("--config has no file: give one, such as --config gpdit:stage2_mixed.")
        path = recipe_path(file)
        expanded += [f"--config={part}" for part in _chain_of_bases(path, (), {})]
    return expanded


def without_earlier_manifests(arguments: Sequence[str]) -> list[str]:
    """Return arguments in which `data_dir`, in a file or as an option, removes the manifests given before it.

    So `--data_dir` replaces the data of a recipe, and the manifests of a later file or option replace it in turn.

    Args:
        arguments: the result of :func:`with_bases`.
    """
    expanded: list[str] = []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "--data_dir" or (name == "--config" and read_yaml(Path(value)).get("data_dir")):
            expanded += [f"--data.{source}.manifests=[]" for source in KINDS]
        expanded.append(argument)
    return expanded


def _chain_of_bases(path: Path, above: tuple[Path, ...], known: dict[str, list[Path]]) -> list[Path]:
    """Return a recipe after all of its bases.

    Args:
        path: the recipe.
        above: the recipes from the first one to the one that names this recipe as a base.
        known: the results for other recipes, by their real path; this one is added.

    Raises:
        InputError: see :func:`with_bases`.
    """
    content = read_yaml(path, needed_by=above[-1] if above else None)
    if "config" in content:
        raise InputError(f"{path} has the field config, which no file can have: name files to build on as `base`.")
    bases = content.get("base") or []
    file = os.path.realpath(path)
    if file in known:
        return known[file]
    if file in map(os.path.realpath, above):
        raise InputError(f"{path} is a base of itself: remove it from the `base` of {above[-1]}.")
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise InputError(f"the `base` of {path} is {bases!r}: name a recipe, or a list of them.")
    chain = list[Path]()
    for base in bases:
        chain += _chain_of_bases(path.parent / recipe_path(base, f"a base of {path}"), (*above, path), known)
        if len(chain) >= MAX_FILES or len(above) >= MAX_FILES:
            raise InputError(
                f"{above[0] if above else path} builds on more than {MAX_FILES} files: merge some of them."
            )
    known[file] = [*chain, path]
    return known[file]


def value_at(content: Any, option: str) -> Any:
    """Return the value of an option such as `trainer.logger` in the content of a recipe; None if it has none."""
    for name in option.split("."):
        content = content.get(name) if isinstance(content, Mapping) else None
    return content


def read_yaml(path: Path, needed_by: Path | None = None) -> dict[str, Any]:
    """Return the fields of a YAML file.

    Raises:
        InputError: the file does not exist, is not YAML, or has no fields.
    """
    try:
        content = load_yaml(read_text(path))
    except OSError as error:
        source = f" (the base of {needed_by})" if needed_by else ""
        cure = "give the path of a recipe, or gpdit: and the name of a shipped one"
        is_missing = isinstance(error, FileNotFoundError)
        problem = does_not_exist(path) if is_missing else f"cannot be read ({error.strerror})"
        raise InputError(f"{path}{source} {problem}: {cure}.") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML ({' '.join(str(error).split())}): correct it.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} has no fields: a recipe has lines like `run_dir: runs/mine`.")
    return content
