"""From a command line, and the YAML files that it names, to a record of options."""

import argparse
import collections.abc
import copy
import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from gpdit_lightning.cli.recipe_files import with_bases
from gpdit_lightning.errors import InputError
from gpdit_lightning.options.shared import RecipeOptions

# Every field's docstring becomes its help.
set_parsing_settings(docstring_parse_attribute_docstrings=True)

PREFIX = "the recipe or the command line cannot be used: "
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
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file of options; later override.")
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


def explained(message: str, known: Iterable[str]) -> str:
    """A parser's message as one sentence.

    Args:
        message: of jsonargparse.
        known: the options that exist, of which the nearest is proposed for an unknown one.
    """
    sentence = relevant_part(message)
    if PREFIX in message:  # the parser of a part has explained it already
        return PREFIX + sentence
    unknown = re.search(r"unrecognized arguments: -*([\w.]+)|ption '([\w.]+)'", sentence)
    if sentence.startswith("unrecognized arguments: ") and not sentence.startswith("unrecognized arguments: -"):
        sentence += "; every option begins with --, and files of options are named by --config."
    elif unknown:
        group = re.search(r"Group '([\w.]+)'", sentence)
        key = (f"{group[1]}." if group else "") + (unknown[1] or unknown[2])
        nearest = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
        sentence += f"; did you mean '{nearest[0]}'?" if nearest else "; see --help for the options that exist."
    return PREFIX + sentence


def relevant_part(message: str) -> str:
    """The part of a jsonargparse message that a person needs.

    Of a value that may have several types jsonargparse reports why it is none of them; the first reason that is not
    about None is the one about the intended type.
    """
    reasons = [line.strip()[2:] for line in message.splitlines() if line.strip().startswith("- ")]
    relevant = [line for line in reasons if "NoneType" not in line]
    key = re.match(r'Parser key "([\w.]+)":', message)
    value = re.search(r"(?:Given value|Got value): (.*)", message)
    expected = re.match(
        r"Expected an? (.*?)(?:\. Got value: .*)?$", relevant[0] if relevant else message.split("\n  ")[-1]
    )
    if key and value and expected:
        return f"{key[1]} is {value[1]}; it must be {in_words(expected[1])}."
    required = re.fullmatch(r"the following arguments are required: ([\w., -]+)", message)
    if required:
        return f"{required[1]} is missing: give --{required[1].split(', ')[0]}; see --help."
    sentence = " ".join((relevant[0] if relevant else message).split("Given value")[0].split())
    return sentence.replace(PREFIX, "")


def in_words(kind: str) -> str:
    """A type, as jsonargparse names it, in words."""
    if "Sequence" in kind or "list" in kind:
        return "a list"
    choices = re.fullmatch(r"typing\.Literal\[(.*)\]", kind)
    if choices:
        return f"one of {choices[1].replace(chr(39), '')}"
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a string"}
    return words.get(kind.removeprefix("<class '").removesuffix("'>"), kind)


class OptionHelp(DefaultHelpFormatter):
    """Help with choices and defaults, and without Python's names of types."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, max_help_position=28, width=110, **settings)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.required:
            return f"{text} (required)"
        hidden = action.default is None or isinstance(action.default, bool) or action.default in ((), [])
        return text if hidden or not hasattr(action, "_typehint") else f"{text} (default: %(default)s)"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Leave out `--name+`, which adds to the list of a config file."""
        shown = copy.copy(action)
        shown.option_strings = [option for option in action.option_strings if not option.endswith("+")]
        return super()._format_action_invocation(shown)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        hint = getattr(action, "_typehint", None)
        if hint is bool:
            return ""
        choices = [
            choice for option in (hint, *get_args(hint)) if get_origin(option) is Literal for choice in get_args(option)
        ]
        if choices:
            return "{" + ",".join(map(str, choices)) + "}"
        item = item_type(hint)
        return super()._get_default_metavar_for_optional(action) + (" ..." if item is not None else "")


def recipe_arguments(arguments: Sequence[str], own: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Divide the arguments of a verb that reads a training recipe.

    Args:
        arguments: of the command line, behind the verb.
        own: names of the verb's own options.

    Returns:
        the verb's own options, the files that `--config` names, and all other words.
    """
    words, kept, config, overrides = list(arguments), list[str](), list[str](), list[str]()
    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        values = [] if equals or not word.startswith("-") else taken(words)
        if option in ("-c", "--config"):
            config += [value] if equals else values
        elif option in ("-h", "--help") or (option.startswith("--") and option[2:].removeprefix("no_") in own):
            kept += [word, *values]
        else:
            overrides += [word, *values]
    return kept, config, overrides


def normalised(arguments: Sequence[str], record: type[Any]) -> list[str]:
    """Command-line arguments in jsonargparse's form: lists as YAML, switches with a value, a first bare word named."""
    hints = get_type_hints(record)
    switches = {name for name, hint in hints.items() if hint is bool}
    lists = {name: item for name, hint in hints.items() if (item := item_type(hint)) is not None}
    positional = getattr(record, "POSITIONAL", None)
    words, result = list(arguments), list[str]()
    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        name = option.removeprefix("--")
        if positional and not word.startswith("-"):
            result.append(f"--{positional}={word}")
            positional = None
        elif name == option or name not in hints:
            negated = name.removeprefix("no_")
            if name != option and negated != name and negated in switches:
                result.append(f"--{negated}=false")
            else:  # of a nested record, or unknown; with the value that follows
                result += [word, *([words.pop(0)] if name != option and not equals and words else [])]
        elif name in lists:
            result.append(f"{option}={yaml_list([value] if equals else taken(words), lists[name])}")
        elif equals:
            result.append(word)
        elif name in switches:
            result.append(f"{option}={words.pop(0) if words and words[0] in ('true', 'false') else 'true'}")
        else:
            result.append(f"{option}={words.pop(0)}" if words else word)
    return result


def item_type(hint: Any) -> Any:
    """The type of the items where a field takes a list, or a list among others; None for any other field."""
    for option in (hint, *get_args(hint)):
        if get_origin(option) in (list, tuple, collections.abc.Sequence):
            return get_args(option)[0]
    return None


def taken(words: list[str]) -> list[str]:
    """Remove and return the words up to the next option; negative numbers are none."""
    end = next((i for i, word in enumerate(words) if re.match(r"--?[A-Za-z]", word)), len(words))
    values = words[:end]
    del words[:end]
    return values


def yaml_list(values: Sequence[str], item: Any) -> str:
    """Words as a YAML list; a single word that is one already stays."""
    if len(values) == 1 and values[0].startswith("[") and values[0].endswith("]"):
        return values[0]
    quoted = item in (str, Path)
    return "[" + ", ".join(json.dumps(value) if quoted else value for value in values) + "]"
