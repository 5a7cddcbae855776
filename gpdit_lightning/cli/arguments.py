"""Conversion of command lines to the form that jsonargparse parses: lists, switches, recipes."""

import collections.abc
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints


def recipe_arguments(arguments: Sequence[str], verb_options: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Divide the arguments of a verb that reads a training recipe.

    Args:
        arguments: the command line after the verb.
        verb_options: names of the options that belong to the verb itself.

    Returns:
        the verb's options, the files of `--config`, and all other words, which override the recipe.
    """
    words, of_verb, config, overrides = list(arguments), list[str](), list[str](), list[str]()
    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        values = [] if equals or not word.startswith("-") else pop_values(words)
        if option in ("-c", "--config"):
            config += [value] if equals else values
        elif option in ("-h", "--help") or (option.startswith("--") and option[2:].removeprefix("no_") in verb_options):
            of_verb += [word, *values]
        else:
            overrides += [word, *values]
    return of_verb, config, overrides


def normalized(arguments: Sequence[str], record: type[Any]) -> list[str]:
    """Return command-line arguments in the form that jsonargparse parses.

    Lists become YAML, switches get a value, and the first word without an option becomes the value of the record's
    `POSITIONAL` option.

    Args:
        arguments: the command line after the verb.
        record: the dataclass of the options.
    """
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
            else:  # an option of a nested record, or an unknown one, with the value that follows
                result += [word, *([words.pop(0)] if name != option and not equals and words else [])]
        elif name in lists:
            result.append(f"{option}={yaml_list([value] if equals else pop_values(words), lists[name])}")
        elif equals:
            result.append(word)
        elif name in switches:
            result.append(f"{option}={words.pop(0) if words and words[0] in ('true', 'false') else 'true'}")
        else:
            result.append(f"{option}={words.pop(0)}" if words else word)
    return result


def item_type(hint: Any) -> Any:
    """Return the type of the items if a field may be a list, or None."""
    for option in (hint, *get_args(hint)):
        if get_origin(option) in (list, tuple, collections.abc.Sequence):
            return get_args(option)[0]
    return None


def pop_values(words: list[str]) -> list[str]:
    """Remove and return the words before the next option; negative numbers are values, not options."""
    end = next((i for i, word in enumerate(words) if re.match(r"--?[A-Za-z]", word)), len(words))
    values = words[:end]
    del words[:end]
    return values


def yaml_list(values: Sequence[str], item: Any) -> str:
    """Return words as a YAML list; a single word that already is a YAML list is unchanged."""
    if len(values) == 1 and values[0].startswith("[") and values[0].endswith("]"):
        return values[0]
    quoted = item in (str, Path)
    return "[" + ", ".join(json.dumps(value) if quoted else value for value in values) + "]"
