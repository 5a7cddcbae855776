"""Check of the groups of options in each file, before files are merged: a later file would hide the fault."""

import os
from argparse import Action
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpdit_lightning.cli.bounded_yaml import load_yaml
from gpdit_lightning.cli.interpolations import InterpolatingParser
from gpdit_lightning.cli.messages import NAMES_WITH_VALUES, nested_record
from gpdit_lightning.cli.recipe_files import read_yaml
from gpdit_lightning.errors import InputError
from gpdit_lightning.schema import shown

ARGUMENTS = ("init_args", "dict_kwargs")  # of a class, at any depth


class FileCheckingParser(InterpolatingParser):
    """A parser that checks the groups of options in each file of a command line before it merges them.

    Attributes:
        arguments_groups: groups among the arguments of classes, which are no actions of the parser.
    """

    arguments_groups: Sequence[str] = ()

    def parse_args(self, args: Any = None, *others: Any, **options: Any) -> Any:
        """Parse a command line.

        Raises:
            InputError: in a file of `--config`, or in a file that a group names, the value of a group is something
                other than names with values.
        """
        groups = group_names(self._actions) | dict.fromkeys(self.arguments_groups, False)
        for word in args or ():
            name, _, value = word.partition("=")
            if name == "--config" and value.startswith("{"):  # see outside_code.py
                check_content(load_yaml(value), groups, Path("the recipe"))
            elif name == "--config":
                check_content(read_yaml(Path(value)), groups, Path(value))
            elif name.removeprefix("--") in groups and os.path.isfile(value):
                check_content({name.removeprefix("--"): value}, groups, Path())
        return super().parse_args(args, *others, **options)


def group_names(actions: Sequence[Action]) -> dict[str, bool]:
    """Return the groups of options of a parser, outer ones first, and whether their value may be null."""
    names: dict[str, bool] = {}
    for action in actions:
        if action.dest.endswith(".help"):
            continue
        groups = action.dest.split(".")[:-1]
        names |= {".".join(groups[: end + 1]): False for end in range(len(groups))}
        if nested_record(getattr(action, "_typehint", None)) is not None:
            names[action.dest] = True
    return names


def check_content(
    content: Mapping[Any, Any], groups: Mapping[str, bool], path: Path, above: tuple[str, ...] = ()
) -> None:
    """Check that the value of each group of options in a file is names with values, or the path of such a file.

    Args:
        content: of a recipe, or of a file of options.
        groups: as :func:`group_names` returns them.
        path: the file, for the message; paths in it are relative to its folder.
        above: the files of groups in which this one is named, by their real paths.

    Raises:
        InputError: the value is something else, or a file contains itself.
    """
    given = [(name, value, null) for name, null in groups.items() for value in _values(content, name)]
    for name, value, may_be_null in [*given, *_class_arguments(content, "")]:
        if isinstance(value, str) and os.path.isfile(file := path.parent / value):
            if (real := os.path.realpath(file)) in above:
                raise InputError(f"{path}: {name} is {shown(value)}, which contains this file: remove one of them.")
            check_content({name: read_yaml(file)}, groups, file, (*above, real))
        elif not isinstance(value, Mapping) and not (value is None and may_be_null):
            given_value = "null" if value is None else shown(value)
            raise InputError(f"{path}: {name} is {given_value}; it must be {NAMES_WITH_VALUES}.")


def _values(content: Mapping[Any, Any], name: str) -> Iterator[Any]:
    """Yield the values that a file gives to an option; its name may be one key, `a.b`, or several, `a: {b: }`."""
    for key, value in content.items():
        if key == name:
            yield value
        elif isinstance(value, Mapping) and name.startswith(f"{key}."):
            yield from _values(value, name[len(str(key)) + 1 :])


def _class_arguments(content: Any, name: str) -> Iterator[tuple[str, Any, bool]]:
    """Yield the arguments of all classes in a file, with their names; they must not be null."""
    is_mapping = isinstance(content, Mapping)
    items = content.items() if is_mapping else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        inner = f"{name}[{key}]" if not is_mapping else f"{name}.{key}" if name else str(key)
        if is_mapping and str(key).rpartition(".")[2] in ARGUMENTS:
            yield inner, value, False
        yield from _class_arguments(value, inner)
