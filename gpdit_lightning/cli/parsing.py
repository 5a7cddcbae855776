"""Parsing of a command line, and of its YAML files, into a record of options."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings
from jsonargparse.typing import register_type

from gpdit_lightning.cli.arguments import LiteralNames, item_type, normalized, recipe_arguments, warn_of_repeated_lists
from gpdit_lightning.cli.bounded_yaml import PARSER_MODE, use_bounded_yaml
from gpdit_lightning.cli.checked_files import FileCheckingParser
from gpdit_lightning.cli.failures import DEBUG
from gpdit_lightning.cli.guarded_imports import guard_imports, imports_of
from gpdit_lightning.cli.messages import EMPTY, PREFIX, OptionHelp, one_sentence
from gpdit_lightning.cli.recipe_files import AUTO, read_yaml, recipe_path, with_bases
from gpdit_lightning.cli.value_checks import check_values
from gpdit_lightning.errors import InputError
from gpdit_lightning.names import as_text
from gpdit_lightning.options.shared import RecipeOptions

# Every field's docstring becomes its help.
set_parsing_settings(docstring_parse_attribute_docstrings=True)
use_bounded_yaml()
guard_imports()


def _path(text: str) -> Path:
    """Return a path; `Path("")` would be the working directory."""
    if not text:
        raise ValueError(EMPTY)
    return Path(text)


register_type(Path, deserializer=_path, fail_already_registered=False)

OF_RECIPES = {"model", "trainer"}  # fields that no file of options for another verb has
COMMAND = "python -m gpdit_lightning"

Record = TypeVar("Record")


def parse(verb: str, description: str, record: type[Record], arguments: Sequence[str]) -> Record:
    """Return the options of a verb.

    A command line may contain `--name value`, `--switch` and `--no_switch` for a boolean, and `--names a b c` for a
    list. `--config FILE` gives options as YAML; later ones override earlier ones. If the record is a subclass of
    :class:`RecipeOptions`, `--config` gives recipes, which may also contain options of the verb; options on the command
    line that are not fields of the record override the recipe.

    Args:
        verb: the name of the command, for messages.
        description: the first sentence of the help.
        record: a dataclass of `gpdit_lightning.options`.
        arguments: the command line after the verb.

    Raises:
        InputError: an option is unknown or invalid.
        SystemExit: after `--help` or `--print_config`.
    """
    warn_of_repeated_lists(arguments, record)
    parser, recipe = parser_of(verb, description, record), dict[str, list[str]]()
    if issubclass(record, RecipeOptions):
        of_verb, recipe["config"], recipe["overrides"] = recipe_arguments(arguments, option_names(record))
        if unwritable := [word for word in recipe["overrides"] if as_text(word) != word]:
            raise InputError(
                f"{unwritable[0]} is not UTF-8, but the files of a run record it: rename that file or folder."
            )
        # A missing or invalid recipe is reported here, before torch and Lightning are imported, which takes seconds.
        with_bases([f"--config={name}" for name in recipe["config"] if name != AUTO])
        of_verb = [*_options_in_files(recipe["config"], record), *of_verb]
    else:
        of_verb = with_bases(arguments)
        for file in (word.removeprefix("--config=") for word in of_verb if word.startswith("--config=")):
            if not OF_RECIPES.isdisjoint(read_yaml(Path(file))):
                raise InputError(
                    f"{file} is a recipe of fit, not options of {verb}: leave it out; the options of {verb} are those "
                    f"of `{verb} --help`."
                )
    # The values of a recipe may be interpolations, and those of a printed configuration are shown as they are.
    is_literal = not issubclass(record, RecipeOptions) and not any(word.startswith("--print") for word in of_verb)
    names = LiteralNames() if is_literal else None
    with imports_of({}):
        parsed = parser.parse_args(normalized(of_verb, record, names))
    # Left out below, where jsonargparse would create the classes that a mapping names.
    mappings = {name: parsed.pop(name) for name in option_names(record) if isinstance(parsed.get(name), dict)}
    values = {**parser.instantiate(parsed).as_dict(), **_without_namespaces(mappings)}
    if any(word.startswith("--print_config") for word in recipe.get("overrides", ())):
        options = Namespace({name: values[name] for name in option_names(record)})
        print(parser.dump(options, skip_none=False) if options else "", end="")  # the recipe's follow
    given = {name: names.decode(values[name]) if names else values[name] for name in option_names(record)} | recipe
    for name in option_names(record):
        check_values(f"--{name}", given[name])
    return record(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def _without_namespaces(value: Any) -> Any:
    """Return a value with dicts in the place of the namespaces that jsonargparse makes of dicts with a `class_path`."""
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, dict):
        return {name: _without_namespaces(item) for name, item in value.items()}
    return [_without_namespaces(item) for item in value] if isinstance(value, list) else value


def _options_in_files(recipes: Sequence[str], record: type[Any]) -> list[str]:
    """Return the options of a verb in recipe files as words of a command line; those of later files come later."""
    files = [read_yaml(recipe_path(name)) for name in recipes] if option_names(record) else []
    given = [(name, file[name]) for file in files for name in option_names(record) if file.get(name) is not None]
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in given]


def parser_of(verb: str, description: str, record: type[Any]) -> "OptionParser":
    """Return the parser of a verb, with a group of options for each base class of its record."""
    takes_recipe = issubclass(record, RecipeOptions)
    positional = getattr(record, "POSITIONAL", "").upper()
    hints = get_type_hints(record)
    takes_list = any(item_type(hints[name]) is not None for name in option_names(record))
    parser = OptionParser(
        prog=f"{COMMAND} {verb}",
        usage=f"{COMMAND} {verb}{positional and f' {positional}'} [options]{takes_recipe * ' [options of fit]'}",
        description=description + takes_list * " Separate the items of a list by spaces.",
        formatter_class=OptionHelp,
        parser_mode=PARSER_MODE,
        allow_abbrev=False,
    )
    if takes_recipe:
        parser.add_argument("-c", "--config", metavar="RECIPE", help="A recipe, then overlays; later ones override.")
        parser.epilog = "Every other option overrides the recipe: see `fit --help`; --print_config prints the result. "
    else:
        parser.add_argument(
            "-c", "--config", action=ActionConfigFile, help="YAML file of options; later ones override."
        )
        parser.add_argument("--base", type=str | list[str], default=[], help=argparse.SUPPRESS)
    parser.epilog = f"{parser.epilog or ''}{DEBUG} shows the traceback of an error."
    for action in parser._actions:
        if action.dest == "print_config":
            action.help, action.metavar = "Print all options as YAML and exit.", ""
    add_record(parser, record)
    return parser


def option_names(record: type[Any]) -> list[str]:
    """Return the names of a record's fields, without those of :class:`RecipeOptions`."""
    of_recipe = {field.name for field in dataclasses.fields(RecipeOptions)} if issubclass(record, RecipeOptions) else ()
    return [field.name for field in dataclasses.fields(record) if field.name not in of_recipe]


def add_record(parser: ArgumentParser, record: type[Any]) -> None:
    """Add the fields of a record, grouped by the title (the first line of the docstring) of their class."""
    fields = {field.name for field in dataclasses.fields(record)}
    names = set(option_names(record))
    groups: dict[str, set[str]] = {}
    for declaring in (*record.__mro__[1:], record):
        if dataclasses.is_dataclass(declaring):
            title = (declaring.__doc__ or "").splitlines()[0].rstrip(".")
            groups.setdefault(title, set()).update(names & vars(declaring).get("__annotations__", {}).keys())
    required = {field.name for field in dataclasses.fields(record) if is_required(field)}
    for title, members in groups.items():
        if members:
            group = parser.add_argument_group(title)
            for part in (members & required, members - required):
                group.add_class_arguments(record, as_group=False, skip=fields - part)


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Return whether a field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


class OptionParser(FileCheckingParser):
    """A parser whose errors are InputErrors in one sentence; they propose the nearest option for an unknown one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise InputError instead of printing the usage."""
        raise InputError(one_sentence(message, [action.dest for action in self._actions]).removeprefix(PREFIX))
