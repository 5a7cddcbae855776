"""Code outside the library that a recipe names: announced, and imported only if the rest of the recipe is valid."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gpdit_lightning.cli.bounded_yaml import load_yaml
from gpdit_lightning.cli.recipe_files import read_yaml, value_at
from gpdit_lightning.imports import import_path, is_import_path, is_outside
from gpdit_lightning.stages import GPDiTStage

log = logging.getLogger(__name__)

MODEL = "model"
NAMES = ("callbacks", "logger", "profiler", "strategy", "plugins", "accelerator")
OPTIONS = (MODEL, *(f"trainer.{name}" for name in NAMES))
ARGUMENTS_OF_ALL_STAGES = ("backbone", "schedule", "optimizer", "initial_weights")

Assignment = tuple[str, str, Any]  # option, rest of its name such as `init_args.decay` or `+`, value


def outside_classes(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Return the import paths outside the library that the classes of a recipe name, by option.

    Args:
        arguments: the command line of `fit`, with the bases of recipes.
    """
    found: dict[str, list[str]] = {}
    for part in _parts(arguments):
        for option, _, value in _assignments(part):
            for path in _outside_paths(value, is_class=True):
                found.setdefault(option, []).append(path)
    return {option: list(dict.fromkeys(paths)) for option, paths in found.items()}


def without_options(arguments: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """Return the arguments of a recipe without some options, whose classes would be imported.

    A stage is replaced by :class:`GPDiTStage`, with the arguments that all stages have.

    Args:
        arguments: the command line of `fit`, with the bases of recipes.
        options: the options.
    """
    result = list[str]()
    for part in _parts(arguments):
        if isinstance(part, Path):
            content = read_yaml(part)
            for option in options:
                _remove(content, option)
            result.append(f"--config={json.dumps(content, default=str)}")
            continue
        if part[0].startswith("--print_config"):  # it would end the command
            continue
        names = [(option, rest) for option, rest, _ in _assignments(part)]
        kept = all(
            option not in options or (option == MODEL and rest.startswith(tuple(_inherited("init_args."))))
            for option, rest in names
        )
        result += part if kept else []
    return [*result, *([f"--model={import_path(GPDiTStage)}"] if MODEL in options else [])]


def announce(classes: Mapping[str, Sequence[str]]) -> None:
    """Log the classes whose modules are about to be imported."""
    for option, paths in classes.items():
        log.info("%s names %s, outside this library: its code is imported and run", option, " and ".join(paths))


def _inherited(prefix: str) -> Iterator[str]:
    return (f"{prefix}{name}" for name in ARGUMENTS_OF_ALL_STAGES)


def _parts(arguments: Sequence[str]) -> Iterator[Path | list[str]]:
    """Yield the files of a command line, and its other options with their values, as one or two words."""
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name == "--config" and equals:
            yield Path(value)
        elif not equals and words and not words[0].startswith("--"):
            yield [word, words.pop(0)]
        else:
            yield [word]


def _assignments(part: Path | list[str]) -> Iterator[Assignment]:
    """Yield the values that a file or an option gives to `OPTIONS`."""
    if isinstance(part, Path):
        content = read_yaml(part)
        for option in OPTIONS:
            if (value := value_at(content, option)) is not None:
                yield option, "", value
        return
    name, _, value = part[0].partition("=")
    value = part[1] if len(part) > 1 else value
    for option in OPTIONS:
        rest = name.removeprefix(f"--{option}")
        if rest in ("", "+") or (rest != name and rest.startswith(".")):
            yield option, rest.removeprefix("."), _parsed(value)


def _parsed(value: str) -> Any:
    try:
        return load_yaml(value) if value[:1] in ("[", "{") else value
    except yaml.YAMLError:
        return value


def _outside_paths(value: Any, is_class: bool) -> Iterator[str]:
    """Yield the import paths in a value: of `class_path` at any depth, and where a class is expected."""
    if isinstance(value, str):
        if is_class and is_import_path(value) and is_outside(value) and not _is_file(value):
            yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _outside_paths(item, is_class=name == "class_path")
    elif isinstance(value, list):
        for item in value:
            yield from _outside_paths(item, is_class)


def _is_file(value: str) -> bool:
    return value.endswith((".yaml", ".yml"))


def _remove(content: dict[str, Any], option: str) -> None:
    """Remove an option from the content of a recipe, in place."""
    *groups, last = option.split(".")
    for group in groups:
        inner = content.get(group)
        if not isinstance(inner, dict):
            return
        content = inner
    value = content.pop(last, None)
    if option == MODEL and isinstance(value, Mapping):
        arguments = value.get("init_args")
        if isinstance(arguments, Mapping):
            kept = {name: item for name, item in arguments.items() if name in ARGUMENTS_OF_ALL_STAGES}
            content[last] = {"class_path": import_path(GPDiTStage), "init_args": kept}
