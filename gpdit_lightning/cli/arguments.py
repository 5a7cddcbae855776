"""The words of a command line, before jsonargparse reads them: lists, switches, recipes."""

import collections.abc
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints


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
