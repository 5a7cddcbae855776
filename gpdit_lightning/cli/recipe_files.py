"""Recipes as files: YAML that builds on other YAML, the recipes that ship with the package among them."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from gpdit_lightning.errors import InputError

SHIPPED = "gpdit:"  # `gpdit:stage2_mixed` is the shipped recipe stage2_mixed.yaml


def recipes_folder() -> Path:
    """The folder of the shipped recipes: inside an installed package, beside the package in a clone."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def recipe_path(name: str | Path) -> Path:
    """The file that a recipe's name means.

    Args:
        name: a path, or `gpdit:` and the name of a shipped recipe: its path among these, or its last part where only
            one ends so (`gpdit:size/tiny`, `gpdit:tiny`).

    Raises:
        InputError: no shipped recipe, or several, have that name.
    """
    name = str(name)
    if not name.startswith(SHIPPED):
        return Path(name)
    wanted = name.removeprefix(SHIPPED).removesuffix(".yaml")
    shipped = {path.relative_to(recipes_folder()).with_suffix("").as_posix(): path for path in shipped_recipes()}
    if wanted in shipped:
        return shipped[wanted]
    same = [key for key in shipped if key.endswith(f"/{wanted}")]
    if len(same) == 1:
        return shipped[same[0]]
    near = same or difflib.get_close_matches(wanted, [*shipped, *(key.split("/")[-1] for key in shipped)], 3, 0.5)
    proposed = f"did you mean {' or '.join(SHIPPED + key for key in near)}?" if near else ""
    listed = "`python -m gpdit_lightning recipes` lists all."
    raise InputError(f"{name} names no shipped recipe: {proposed or 'give another name;'} {listed}")


def shipped_recipes() -> list[Path]:
    """The files of all shipped recipes."""
    return sorted(recipes_folder().rglob("*.yaml"))


def with_bases(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments in which every `--config FILE` is preceded by the recipes that FILE names as its `base`.

    Later files override earlier ones field by field, so a recipe holds only what is its own.

    Raises:
        InputError: `--config` without a file, a base that does not exist, or recipes that are each other's base.
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
            raise InputError("--config names no file: give one, such as --config gpdit:stage2_mixed.")
        path = recipe_path(file)
        expanded += [f"--config={part}" for part in _chain_of_bases(path, ())]
    return expanded


def _chain_of_bases(path: Path, above: tuple[Path, ...]) -> list[Path]:
    if path in above:
        raise InputError(f"{path} is its own base: remove it from the `base` of {above[-1]}.")
    bases = read_yaml(path, needed_by=above[-1] if above else None).get("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise InputError(f"the `base` of {path} is {bases!r}: name a recipe, or a list of them.")
    chain = []
    for base in bases:
        chain += _chain_of_bases(path.parent / recipe_path(base), (*above, path))
    return [*chain, path]


def read_yaml(path: Path, needed_by: Path | None = None) -> dict[str, Any]:
    """The fields of a YAML file.

    Raises:
        InputError: the file does not exist, is not YAML, or has no fields.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        source = f" (the base of {needed_by})" if needed_by else ""
        cure = "give the path of a recipe, or gpdit: and the name of a shipped one"
        raise InputError(f"{path}{source} cannot be read ({error.strerror}): {cure}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML ({' '.join(str(error).split())}): correct it.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no fields: a recipe has lines like `run_dir: runs/mine`.")
    return content
