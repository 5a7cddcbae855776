"""From a command line, and the YAML files that it names, to a record of options."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from gpdit_lightning.cli.arguments import normalised, recipe_arguments
from gpdit_lightning.cli.messages import OptionHelp, explained
from gpdit_lightning.cli.recipe_files import with_bases
from gpdit_lightning.errors import InputError
from gpdit_lightning.options.shared import RecipeOptions

# Every field's docstring becomes its help.
set_parsing_settings(docstring_parse_attribute_docstrings=True)

COMMAND = "python -m gpdit_lightning"

Record = TypeVar("Record")


def parse(verb: str, description: str, record: type[Record], arguments: Sequence[str]) -> Record:
    """The options of a verb.

    Beside `--name value` the command line may say `--switch` and `--no_switch` for an option that is true or false, and
    `--names a b c` for one that takes a list. `--config FILE` gives options as YAML; later ones override earlier ones.
    Where the record is one of :class:`RecipeOptions`, `--config` names recipes instead, and every option that is not
    the record's own overrides them.

    Args:
        verb: names the command in messages.
        description: opens the help.
        record: a dataclass of `gpdit_lightning.options`.
        arguments: of the command line, behind the verb.

    Raises:
        InputError: options that cannot be used, in one sentence.
        SystemExit: after `--help` or `--print_config`.
    """
    parser, recipe = parser_of(verb, description, record), dict[str, list[str]]()
    if issubclass(record, RecipeOptions):
        own, recipe["config"], recipe["overrides"] = recipe_arguments(arguments, own_names(record))
    else:
        own = with_bases(arguments)
    values = parser.instantiate(parser.parse_args(normalised(own, record)))
    given = {name: values[name] for name in own_names(record)} | recipe
    return record(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def parser_of(verb: str, description: str, record: type[Any]) -> "OptionParser":
    """The parser of a verb: a group for each record that its own inherits from, in their order."""
    takes_recipe = issubclass(record, RecipeOptions)
    parser = OptionParser(
        prog=f"{COMMAND} {verb}",
        usage=f"{COMMAND} {verb} [options]{' [options of fit]' if takes_recipe else ''}",
        description=f"{description} The items of a list are separated by blanks.",
        formatter_class=OptionHelp,
        parser_mode="omegaconf+",
    )
    if takes_recipe:
        parser.add_argument("-c", "--config", metavar="RECIPE", help="A recipe, then overlays; later ones override.")
        parser.epilog = "Every other option overrides the recipe: see `fit --help`; --print_config prints the result."
    else:
        parser.add_argument(
            "-c", "--config", action=ActionConfigFile, help="YAML file of options; later ones override."
        )
        parser.add_argument("--base", type=str | list[str], default=[], help=argparse.SUPPRESS)
    for action in parser._actions:
        if action.dest == "print_config":
            action.help, action.metavar = "Print all options as YAML and exit.", ""
    add_record(parser, record)
    return parser


def own_names(record: type[Any]) -> list[str]:
    """The names of a record's fields, without those of a recipe."""
    of_recipe = {field.name for field in dataclasses.fields(RecipeOptions)} if issubclass(record, RecipeOptions) else ()
    return [field.name for field in dataclasses.fields(record) if field.name not in of_recipe]


def add_record(parser: ArgumentParser, record: type[Any]) -> None:
    """Add the fields of a record, each under the title of the class that declares it; equal titles share a group."""
    fields = {field.name for field in dataclasses.fields(record)}
    names = set(own_names(record))
    groups: dict[str, set[str]] = {}
    for declaring in (*record.__mro__[1:], record):
        if dataclasses.is_dataclass(declaring):
            title = (declaring.__doc__ or "").splitlines()[0].rstrip(".")
            groups.setdefault(title, set()).update(names & vars(declaring).get("__annotations__", {}).keys())
    required = {field.name for field in dataclasses.fields(record) if is_required(field)}
    for title, own in groups.items():
        if own:
            group = parser.add_argument_group(title)
            for some in (own & required, own - required):
                group.add_class_arguments(record, as_group=False, skip=fields - some)


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether a field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


class OptionParser(ArgumentParser):
    """A parser whose errors are InputErrors of one sentence, with the nearest option that exists."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise InputError instead of printing the usage."""
        raise InputError(explained(message, [action.dest for action in self._actions]))
