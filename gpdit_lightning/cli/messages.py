"""Readable output of jsonargparse: help without Python's types, errors in one sentence."""

import argparse
import dataclasses
import difflib
import itertools
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from jsonargparse import DefaultHelpFormatter

from gpdit_lightning.cli.arguments import item_type

PREFIX = "the recipe or the command line cannot be used: "
# Other names of options in this field.
SYNONYMS = {"depth": "layers", "dim": "width", "epochs": "max_steps", "hidden_size": "width", "iterations": "max_steps"}
NAMES_WITH_VALUES = "names with values, such as {width: 8}"
LARGEST_EXACT = 2**53  # a float is a rounded number above
EMPTY = "empty: give a value, or leave the option out"  # of a path
# Nested lines of jsonargparse's reasons, which explain what a class path is.
EXPECTED = r"Expected an? (.*?)(?:\. Got value: .*)?$|Not a valid (subclass of \w+)"
EXPLANATIONS = ("a class path (str)", "a dict with")
NO_SUBCLASS = "Import path does not correspond to a subclass"  # without the path
# A value of an option that is a record of options: jsonargparse takes any text for the import path of such a record.
NO_RECORD = r"(Unexpected|Expected dot) import path|Import path |Problem with given class_path|Not a valid subclass"
OF_RECORD = r"Subtypes: \[<class '[\w.]+Options'>"


class OptionHelp(DefaultHelpFormatter):
    """Formats help with choices and defaults, and without Python's types."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, max_help_position=28, width=110, **settings)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        nested = nested_record(getattr(action, "_typehint", None))
        if nested is not None:
            fields = ", ".join(field.name for field in dataclasses.fields(nested))
            text += f" FIELD is one of {fields}; see --{action.dest}.help."
        if action.required:
            return f"{text} (required)"
        if not hasattr(action, "_typehint") or default is None or default in ((), []):
            return text
        values = default if isinstance(default, tuple) else (default,)
        return f"{text} (default: {' '.join(str(v).lower() if isinstance(v, bool) else str(v) for v in values)})"

    def add_argument(self, action: argparse.Action) -> None:
        """Add an option to the help, unless it is `--NAME.help`."""
        if not action.dest.endswith(".help"):
            super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        hint = getattr(action, "_typehint", None)
        if hint is None:
            return super()._format_action_invocation(action)
        if hint is bool:
            return f"--{action.dest}, --no_{action.dest}"
        if nested_record(hint) is not None:
            return f"--{action.dest}.FIELD VALUE"
        choices = literal_choices(hint)
        choices += ["NUMBER"] if choices and float in get_args(hint) else []
        value = "{" + ",".join(choices) + "}" if choices else action.dest.upper()
        return f"--{action.dest} {value}{'' if item_type(hint) is None else ' ...'}"


def nested_record(hint: Any) -> Any:
    """Return the dataclass if a field may be a nested record, or None."""
    return next((option for option in (hint, *get_args(hint)) if dataclasses.is_dataclass(option)), None)


def literal_choices(hint: Any) -> list[str]:
    """Return the distinct values of all Literals inside a type; true and false too if it also includes bool."""
    if get_origin(hint) is Literal:
        return [str(choice) for choice in get_args(hint)]
    choices = [choice for part in get_args(hint) for choice in literal_choices(part)]
    return list(dict.fromkeys(["true", "false", *choices] if choices and bool in get_args(hint) else choices))


def one_sentence(message: str, known: Sequence[str]) -> str:
    """Return an error message of jsonargparse as one sentence.

    Args:
        message: the message.
        known: the existing options; the nearest one is proposed for an unknown option.
    """
    sentence = relevant_part(message)
    if PREFIX in message:  # the parser of a part of the recipe has already done it
        return PREFIX + sentence
    word = re.match(r"unrecognized arguments: (\S+)", sentence)
    if word and not word[1].startswith("-"):
        return f"'{word[1]}' is not an option: every option begins with --, and files of options are given by --config."
    if word:
        key = word[1].lstrip("-").partition("=")[0]
        return f"--{key} is not an option" + nearest_option(key, known, "--{}")
    unknown = re.search(r"ption '([\w.]+)'", sentence)
    if unknown and not sentence.endswith(("?", ".")):  # else the parser of a record has proposed one already
        group = re.search(r"Group '([\w.]+)'", sentence)
        sentence += nearest_option((f"{group[1]}." if group else "") + unknown[1], known, "'{}'")
    return PREFIX + sentence


def names_unknown_option(message: str) -> bool:
    """Return whether a message of :func:`one_sentence` is about an option that does not exist."""
    return re.search(r"is not an option|does not accept option|ption '[\w.]+' is not accepted", message) is not None


def nearest_option(key: str, known: Sequence[str], form: str) -> str:
    """Return the end of a sentence about an unknown option: the nearest existing one, in a form such as `--{}`."""
    abbreviated = sorted((name for name in known if name.startswith(key)), key=len)[:1]
    nearest = abbreviated or same_word(key, known) or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {' or '.join(map(form.format, nearest))}?" if nearest else "; see --help for all options."


def same_word(key: str, known: Sequence[str]) -> list[str]:
    """Return the options of which the last word of an unknown one is the name, the initials (lr), or a synonym.

    Of several, those are returned whose groups agree most with that of the unknown one.
    """
    group, _, word = key.rpartition(".")
    found: dict[str, int] = {}
    for name in known:
        last = name.rpartition(".")[2]
        initials = "".join(part[:1] for part in last.split("_"))
        if SYNONYMS.get(word, word) == last or (len(initials) > 1 and word == initials):
            equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(group, name, strict=False))
            found[name] = len(list(equal))
    return [name for name, agreement in found.items() if agreement == max(found.values())]


def is_offered(action: argparse.Action) -> bool:
    """Return whether an action is an option that is not hidden, and that no other option sets."""
    hidden = argparse.SUPPRESS in (action.help, action.default)
    return not hidden and any(name.startswith("-") for name in action.option_strings)


def relevant_part(message: str) -> str:
    """Return the relevant part of a jsonargparse message.

    If a value may have several types, jsonargparse gives a reason for each type that does not fit; the reason for None
    is left out.
    """
    reasons: list[str] = []
    for line in message.splitlines():
        if line.strip().startswith(("- ", "Expected a")):  # of a value that is a list in YAML, such as `-`, without -
            reasons.append(line.strip().removeprefix("- "))
        elif reasons and line.startswith("      "):  # continues the reason
            reasons[-1] += f" {line.strip()}"
    no_cause = ("Expected a path but", "Does not validate against", "Not of type")
    relevant = [line for line in reasons if "NoneType" not in line and not line.startswith((*no_cause, *EXPLANATIONS))]
    others = [line for line in relevant if not line.startswith(NO_SUBCLASS)]
    relevant = others or relevant
    key = re.match(r'Parser key "([\w.]+)":', message)
    config = re.search(r"Unable to load config (?:'(.*)'|\"(.*)\")$", message, re.MULTILINE)
    if key and config:
        nested = message.find("Parser key", key.end())
        if nested >= 0 and (config[1] or config[2]).startswith("{"):  # a mapping, of which one value cannot be used
            return relevant_part(message[nested:].replace("\n    ", "\n  "))
        reason = "" if nested >= 0 else f" ({' '.join(reasons[:1])})"
        return f"{key[1]} is {config[1] or config[2]}; it must be {NAMES_WITH_VALUES}{reason}."
    if key and EMPTY in message:
        return f"--{key[1]} is {EMPTY}."
    value = re.search(r"Given value: (.*)", message) or re.search(r"Got value: (.*)", message)
    reasons_or_last_line = relevant or [message.split("\n  ")[-1]]
    if key and value and re.search(OF_RECORD, message) and re.match(NO_RECORD, reasons_or_last_line[0]):
        return f"{key[1]} is {value[1]}; it must be {NAMES_WITH_VALUES}."
    expected = [re.match(EXPECTED, reason) for reason in reasons_or_last_line]
    kinds = list(dict.fromkeys(type_in_words(match[1] or match[2]) for match in expected if match))
    if "a number" in kinds:  # which a whole number is too
        kinds = [kind for kind in kinds if kind != "a whole number"]
    if key and value and all(expected):
        unquoted = f"'{value[1]}'" in message and "value type: <class 'str'>" not in message
        as_list = f", such as \"['{value[1]}']\"" if kinds == ["a list"] and value[1][:1] not in "[{" else ""
        quoted = ", in quotes" if unquoted else ""
        digits = digits_of(value[1]) if "a whole number" in kinds else ""
        cure = f": write {digits}" if digits else ""
        return f"{key[1]} is {value[1] or 'empty'}; it must be {' or '.join(kinds)}{as_list}{quoted}{cure}."
    required = re.fullmatch(r"the following arguments are required: ([\w., -]+)", message)
    if required:
        names = [f"--{name}" for name in required[1].split(", ")]
        return f"{' and '.join(names)} {'are' if len(names) > 1 else 'is'} missing: see --help."
    causes = [reason for reason in relevant if not re.match(EXPECTED, reason)] or relevant or [message]
    sentence = " ".join(causes[0].split("Given value")[0].split()).replace(PREFIX, "")
    return sentence if not key or key[1] in sentence else f"{key[1]}: {sentence}"


def digits_of(value: str) -> str:
    """Return the digits of a whole number that is written with a point or an exponent, as 1e4; empty for others."""
    try:
        number = float(value.strip("'"))
    except ValueError:
        return ""
    return str(int(number)) if number.is_integer() and abs(number) < LARGEST_EXACT else ""


def type_in_words(kind: str) -> str:
    """Return a type, as jsonargparse prints it, in words."""
    pair = re.fullmatch(r"tuple with (\d+) elements", kind)
    if pair:
        return f"a list of {pair[1]} values"
    if "Mapping" in kind:
        return NAMES_WITH_VALUES
    if any(name in kind for name in ("Sequence", "Iterable", "list", "tuple")):
        return "a list"
    choices = re.fullmatch(r"typing\.Literal\[(.*)\]", kind)
    if choices:
        return f"one of {choices[1].replace(chr(39), '')}"
    if "import path" in kind or "subclass" in kind:
        return f"the import path of a {kind if 'subclass' in kind else 'class'}"
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a string"}
    words["dict"] = NAMES_WITH_VALUES
    return words.get(kind.removeprefix("<class '").removesuffix("'>"), kind)
