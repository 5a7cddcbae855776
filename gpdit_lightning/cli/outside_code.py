"""Code outside the library that a recipe names, which is imported only if the rest of the recipe is valid."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from gpdit_lightning.cli.bounded_yaml import load_yaml, read_text
from gpdit_lightning.cli.recipe_files import read_yaml, value_at
from gpdit_lightning.errors import InputError
from gpdit_lightning.imports import import_path, is_import_path, is_outside
from gpdit_lightning.stages import GPDiTStage

MODEL, TRAINER = "model", "trainer"
NAMES = ("callbacks", "logger", "profiler", "strategy", "plugins", "accelerator")
OPTIONS = (MODEL, *(f"{TRAINER}.{name}" for name in NAMES))
ARGUMENTS_OF_ALL_STAGES = ("backbone", "schedule", "optimizer", "initial_weights")
MAX_PARTS = 32  # of the name of an option


class _Part(NamedTuple):
    """A file of a command line, or another option with its value.

    Attributes:
        words: of the command line.
        name: of the option.
        content: what it gives to the groups of `OPTIONS`, as nested mappings.
    """

    words: list[str]
    name: str
    content: dict[str, Any]


def outside_classes(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Return the import paths outside the library that the classes of a recipe name, by option.

    Strings among the arguments of classes may be import paths too, of functions for example; whether they are is known
    only when the class is.

    Args:
        arguments: the command line of `fit`, with the bases of recipes.
    """
    found: dict[str, list[str]] = {}
    for part in _parts(arguments):
        for option in OPTIONS:
            for path in _outside_paths(_own(option, value_at(part.content, option))):
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
        if part.name.startswith("print_config"):  # it would end the command
            continue
        if all(value_at(part.content, option) is None for option in options):
            result += part.words
        elif part.name in ("config", TRAINER):
            for option in options:
                _remove(part.content, option)
            result.append(f"--config={json.dumps(part.content, default=str)}")
        elif f"{part.name}.".startswith(tuple(f"{MODEL}.init_args.{name}." for name in ARGUMENTS_OF_ALL_STAGES)):
            result += part.words
    return [*result, *([f"--model={import_path(GPDiTStage)}"] if MODEL in options else [])]


def _parts(arguments: Sequence[str]) -> Iterator[_Part]:
    """Yield the files of a command line, and its other options with their values, as one or two words."""
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        given = [word]
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
            given.append(value)
        name, content = name.removeprefix("--"), dict[str, Any]()
        if name == "config" and value:
            content = load_yaml(value) if value.startswith("{") else read_yaml(Path(value))
            content = _with_files(_absolute(_nested(content), Path(value).parent))
        elif name.partition(".")[0] in (MODEL, TRAINER):
            content = _with_files(_nested({name.removesuffix("+"): _parsed(value)}))
        yield _Part(given, name, content)


def _parsed(value: str) -> Any:
    """Return the list or the mapping that the text of an option is; another text as it is."""
    try:
        content = load_yaml(value)
    except yaml.YAMLError:
        return value
    return content if isinstance(content, list | dict) else value


def _nested(content: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the content of a file with mappings in the place of names such as `trainer.callbacks`, at any depth."""
    result = dict[Any, Any]()
    for name, value in content.items():
        inner = _nested(value) if isinstance(value, Mapping) else value
        first, *rest = name.removesuffix("+").split(".", MAX_PARTS) if isinstance(name, str) else [name]
        for part in reversed(rest):
            inner = {part: inner}
        result = _merged(result, {first: inner})
    return result


def _merged(first: Mapping[Any, Any], second: Mapping[Any, Any]) -> dict[Any, Any]:
    both = [name for name in second if isinstance(first.get(name), dict) and isinstance(second[name], dict)]
    return {**first, **second, **{name: _merged(first[name], second[name]) for name in both}}


def _with_files(content: dict[Any, Any]) -> dict[Any, Any]:
    """Return nested content with that of the files which it names in the place of the trainer, or of classes."""
    content = dict(content)
    if TRAINER in content:
        trainer = content[TRAINER] = _read(content[TRAINER])
        for name in NAMES if isinstance(trainer, dict) else ():
            if name in trainer:
                trainer[name] = _classes_in_files(trainer[name])
    if MODEL in content:
        content[MODEL] = _classes_in_files(content[MODEL])
    return content


def _classes_in_files(value: Any) -> Any:
    value = _read(value)
    return [_read(item) for item in value] if isinstance(value, list) else value


def _read(value: Any) -> Any:
    """Return the content of the file that a value names; another value as it is."""
    if not isinstance(value, str) or not os.path.isfile(value):
        return value
    try:
        content = load_yaml(read_text(value))
    except (OSError, InputError, yaml.YAMLError):
        return value
    return _absolute(_nested(content) if isinstance(content, dict) else content, Path(value).parent)


def _absolute(value: Any, folder: Path) -> Any:
    """Return a value of a file with absolute paths in the place of those of files relative to a folder."""
    if isinstance(value, str):  # other names of files, such as `cosine`, are values
        is_file = value.endswith((".yaml", ".yml", ".json")) and os.path.isfile(os.path.join(folder, value))
        return os.path.abspath(os.path.join(folder, value)) if is_file else value
    if isinstance(value, dict):
        return {name: _absolute(item, folder) for name, item in value.items()}
    return [_absolute(item, folder) for item in value] if isinstance(value, list) else value


def _own(option: str, value: Any) -> Any:
    """Return the value of an option without the arguments of all stages, which name no classes."""
    arguments = value.get("init_args") if option == MODEL and isinstance(value, Mapping) else None
    if not isinstance(arguments, Mapping):
        return value
    return {**value, "init_args": {n: item for n, item in arguments.items() if n not in ARGUMENTS_OF_ALL_STAGES}}


def _outside_paths(value: Any) -> Iterator[str]:
    """Yield the import paths in a value, at any depth."""
    if isinstance(value, str):
        if is_import_path(value) and is_outside(value) and not value.endswith((".yaml", ".yml")):
            yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _outside_paths(item)


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
