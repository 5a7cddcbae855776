"""Checks of parsed values that jsonargparse leaves out: null, records, and numbers that no computation can use."""

import dataclasses
import errno
import inspect
import math
import os
import re
import types
from argparse import Action
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonargparse import Namespace

from gpdit_lightning.cli.messages import NAMES_WITH_VALUES, type_in_words
from gpdit_lightning.data.source import KINDS
from gpdit_lightning.errors import InputError
from gpdit_lightning.schema import shown

INT_LIMIT = 2**63  # whole numbers of torch and NumPy have 64 bits

# Values above which a recipe would allocate or loop without end, or its weights would overflow within a few steps.
LIMITS: dict[str, int] = {
    "data.workers": 1024,
    "data.noise_draws": 1024,
    "data.validation_batches": 2**20,
    **{f"data.{source}.batch_size": 2**20 for source in KINDS},
    "model.init_args.backbone.layers": 4096,
    "model.init_args.backbone.width": 2**20,
    "model.init_args.backbone.mlp_width": 2**22,
    "model.init_args.optimizer.weight_decay": 100,
    "model.init_args.optimizer.eps": 1,
}


def check_limits(values: Namespace) -> None:
    """Raise `InputError` if an option of a recipe exceeds its value of `LIMITS`."""
    for name, limit in LIMITS.items():
        value = values.get(name)
        if isinstance(value, int | float) and value > limit:
            raise InputError(f"{name} is {value}: give at most {limit}.")


def check_folder(name: str, value: Any) -> None:
    """Raise `InputError` if an option cannot be the path of a folder; it need not exist.

    A path cannot be empty, null, missing (`???`), a list or a mapping, or exceed the limits of the file system.
    """
    cure = "give the path of a folder"
    if not isinstance(value, str) or re.fullmatch(r"\s*|null|~|\?\?\?|\[.*\]|\{.*\}", value):
        raise InputError(f"{name} is {shown(value)}: {cure}.")
    try:
        os.stat(value)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(
                f"{name} is {shown(value)}, which is too long ({len(value)} characters): {cure}."
            ) from None


def check_values(name: str, value: Any) -> None:
    """Check all numbers and texts inside a value.

    Args:
        name: the option, for messages.
        value: parsed, with any nesting of records, mappings and lists.

    Raises:
        InputError: a number is infinite, NaN or beyond 64 bits, or a text has a null character, which no path can have.
    """
    if isinstance(value, str | Path) and "\0" in str(value):
        raise InputError(f"{name} is {shown(str(value))}: remove the null character.")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{name} is {value}: give a finite number.")
    if isinstance(value, int) and not -INT_LIMIT <= value < INT_LIMIT:
        raise InputError(f"{name} is {value}: give a whole number of at most 64 bits, below {INT_LIMIT}.")
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        for key, item in value.items():
            check_values(f"{name}.{key}" if name else str(key), item)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            check_values(f"{name}[{number}]", item)


def check_type(name: str, value: Any, hint: Any) -> None:
    """Check that a value is no null or scalar where its type does not include one; all else jsonargparse has checked.

    Args:
        name: the option, for messages.
        value: parsed.
        hint: the type of the option.

    Raises:
        InputError: it is.
    """
    members = _members(hint)
    if value is None and not {type(None), Any, inspect.Parameter.empty} & {*members}:
        raise InputError(f"{name} is null; it must be {' or '.join(dict.fromkeys(map(_words, members)))}.")
    records = [member for member in members if dataclasses.is_dataclass(member)]
    if len(records) == 1 and len({*members} - {type(None)}) == 1 and value is not None:
        if not isinstance(value, Namespace | Mapping | records[0]):
            raise InputError(f"{name} is {value!r}; it must be {NAMES_WITH_VALUES}.")
        fields, hints = vars(value) if isinstance(value, Namespace) else value, get_type_hints(records[0])
        if isinstance(fields, Mapping):
            for field, item in fields.items():
                if field in hints:
                    check_type(f"{name}.{field}", item, hints[field])


def check_options(values: Namespace, actions: Sequence[Action]) -> None:
    """Check the values of a parser's options, as :func:`check_type` does."""
    for action in actions:
        hint = getattr(action, "_typehint", None)
        if hint is None or action.default is None or action.dest.endswith(".help"):
            continue
        if action.dest in values:
            check_type(action.dest, values[action.dest], hint)


def check_arguments(name: str, kind: type, arguments: Namespace) -> None:
    """Check the arguments of a class, as :func:`check_type` does."""
    constructor = inspect.getattr_static(kind, "__init__")
    for argument, hint in get_type_hints(constructor).items():
        if argument in arguments:
            check_type(f"{name}.{argument}", arguments[argument], hint)


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the type itself."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(member for part in get_args(hint) for member in _members(part))
    return (hint,)


def _words(kind: Any) -> str:
    if dataclasses.is_dataclass(kind):
        return NAMES_WITH_VALUES
    if isinstance(kind, type) and kind.__module__ != "builtins" and get_origin(kind) is None:
        return f"the import path of a subclass of {kind.__name__}"
    return type_in_words(str(kind) if get_origin(kind) in (Literal, None) else str(get_origin(kind)))
