"""Conversion of command lines to the form that jsonargparse parses: lists, switches, recipes."""

import collections
import collections.abc
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from gpdit_lightning.errors import InputError

log = logging.getLogger(__name__)


def recipe_arguments(arguments: Sequence[str], verb_options: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Divide the arguments of a verb that reads a training recipe.

    Args:
        arguments: the command line after the verb.
        verb_options: names of the options that belong to the verb itself.

    Raises:
        InputError: `--config` or `--data_dir` has no value.

    Returns:
        the verb's options, the files of `--config`, and all other words, which override the recipe.
    """
    words, of_verb, config, overrides = list(arguments), list[str](), list[str](), list[str]()
    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        values = [] if equals or not word.startswith("-") else pop_values(words)
        if option in ("-c", "--config"):
            if not any([value] if equals else values):
                raise InputError("--config has no file: give one, such as --config gpdit:stage2_mixed.")
            config += [value] if equals else values
        elif option in ("-h", "--help") or (option.startswith("--") and option[2:].removeprefix("no_") in verb_options):
            of_verb += [word, *values]
        elif option == "--data_dir" and not equals and not values:
            raise InputError("--data_dir has no folder: give one that `prepare` wrote, or several.")
        elif option == "--data_dir" and len(values) > 1:
            overrides.append(f"{option}={yaml_list(values, str)}")
        else:
            overrides += [word, *values]
    return of_verb, config, overrides


def warn_of_repeated_lists(arguments: Sequence[str], record: type[Any]) -> None:
    """Warn if a command line has an option with a list twice: of all options, the last overrides those before it."""
    lists = [name for name, hint in get_type_hints(record).items() if item_type(hint) is not None]
    words = collections.Counter(word.partition("=")[0] for word in arguments if is_option(word))
    for name in ("data_dir", *lists):
        if name not in ("config", "overrides") and (times := words[f"--{name}"]) > 1:
            log.warning(
                "warning: --%s is given %d times, and only the last is used: for all values give --%s A B",
                name,
                times,
                name,
            )


def normalized(arguments: Sequence[str], record: type[Any], names: "LiteralNames | None" = None) -> list[str]:
    """Return command-line arguments in the form that jsonargparse parses.

    Lists become YAML, switches get a value, and the first word without an option becomes the value of the record's
    `POSITIONAL` option.

    Args:
        arguments: the command line after the verb.
        record: the dataclass of the options.
        names: gets the names of files that YAML would change, if not None.
    """
    hints = get_type_hints(record)
    switches = {name for name, hint in hints.items() if hint is bool}
    lists = {name: item for name, hint in hints.items() if (item := item_type(hint)) is not None}
    positional = getattr(record, "POSITIONAL", None)
    words, result = list(arguments), list[str]()

    def encoded(value: str, hint: Any) -> str:
        types = {str, Path} & {hint, *get_args(hint)}
        is_empty_path = value == "" and str not in types  # the parser refuses it
        return value if names is None or not types or is_empty_path else names.encode(value)

    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        name = option.removeprefix("--")
        if positional and not is_option(word):
            result.append(f"--{positional}={encoded(word, hints[positional])}")
            positional = None
        elif name == option or name not in hints:
            negated = name.removeprefix("no_")
            if name != option and negated != name and negated in switches:
                result.append(f"--{negated}=false")
            else:  # an option of a nested record, or an unknown one, with the value that follows
                result += [word, *([words.pop(0)] if name != option and not equals and words else [])]
        elif name in lists:
            items = [value] if equals else pop_values(words)
            if not is_yaml_list(items):
                items = [encoded(item, lists[name]) for item in items]
            result.append(f"{option}={yaml_list(items, lists[name])}")
        elif equals:
            result.append(f"{option}={encoded(value, hints[name])}")
        elif name in switches:
            result.append(f"{option}={words.pop(0) if words and words[0] in ('true', 'false') else 'true'}")
        else:
            result.append(f"{option}={encoded(words.pop(0), hints[name])}" if words else word)
    return result


class LiteralNames:
    """Values that YAML or OmegaConf would change or reject, such as `&a` or names that are not UTF-8.

    They are replaced by placeholders before jsonargparse parses the command line, and restored afterwards.
    """

    UNCHANGED = re.compile(r"[\w./+-][\w ./:=@%+,*()#-]*")

    def __init__(self) -> None:
        self._values: dict[str, str] = {}

    def encode(self, value: str) -> str:
        """Return a value, or its placeholder."""
        if self.UNCHANGED.fullmatch(value):
            return value
        placeholder = f"literal-name-{len(self._values)}"
        self._values[placeholder] = value
        return placeholder

    def decode(self, value: Any) -> Any:
        """Return a parsed value with the placeholders replaced by what they stand for."""
        if isinstance(value, list | tuple):
            return type(value)(map(self.decode, value))
        return type(value)(self._values[str(value)]) if str(value) in self._values else value


def is_option(word: str) -> bool:
    """Return whether a word is an option and neither a negative number nor a file whose name begins with a dash."""
    return re.match(r"--?[A-Za-z]", word) is not None and (word.startswith("--") or not os.path.lexists(word))


def item_type(hint: Any) -> Any:
    """Return the type of the items if a field may be a list, or None."""
    for option in (hint, *get_args(hint)):
        if get_origin(option) in (list, tuple, collections.abc.Sequence):
            return get_args(option)[0]
    return None


def pop_values(words: list[str]) -> list[str]:
    """Remove and return the words before the next option."""
    end = next((i for i, word in enumerate(words) if is_option(word)), len(words))
    values = words[:end]
    del words[:end]
    return values


def is_yaml_list(values: Sequence[str]) -> bool:
    """Return whether words are a single word that is a YAML list, and not the name of a file."""
    return len(values) == 1 and values[0][:1] + values[0][-1:] == "[]" and not os.path.lexists(values[0])


def yaml_list(values: Sequence[str], item: Any) -> str:
    """Return words as a YAML list; a single word that already is a YAML list is unchanged."""
    if is_yaml_list(values):
        return values[0]
    quoted = item in (str, Path)
    return "[" + ", ".join(json.dumps(value) if quoted else value for value in values) + "]"
