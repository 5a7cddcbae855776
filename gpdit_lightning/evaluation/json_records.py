"""Records read back from JSON: every field present, none unknown, each of its annotated type."""

import json
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from gpdit_lightning.errors import InputError

Record = TypeVar("Record")


def load_record(kind: type[Record], path: Path, remedy: str) -> Record:
    """A record from a JSON file.

    Args:
        kind: a dataclass.
        path: of the file.
        remedy: completes error messages.

    Raises:
        InputError: the file is missing or does not hold such a record.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): {remedy}.") from None
    return record_from_json(kind, text, str(path), remedy)


def record_from_json(kind: type[Record], text: str, name: str, remedy: str) -> Record:
    """A record from JSON; `name` says what is read, and the rest is as for :func:`load_record`."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not valid JSON ({error}): {remedy}.") from None
    return typed(kind, content, name, remedy)


def typed(kind: Any, value: Any, name: str, remedy: str) -> Any:
    """A JSON value as the type of an annotation: a dataclass, dict, tuple, optional, literal or plain type.

    Args:
        kind: the type.
        value: what `json.loads` gave.
        name: of the file and the field.
        remedy: completes error messages.

    Raises:
        InputError: the value is not of the type.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        for field in sorted(value.keys() ^ hints.keys()):
            problem = "lacks the field" if field in hints else "has the unknown field"
            raise InputError(f"{name} {problem} {field!r}: {remedy}.")
        fields = {field: typed(hints[field], value[field], f"{name}, {field}", remedy) for field in hints}
        return kind(**fields)  # type: ignore[operator]
    if origin is dict and isinstance(value, dict):
        return {key: typed(parts[1], entry, f"{name}, {key}", remedy) for key, entry in value.items()}
    if origin is tuple and isinstance(value, list):
        kinds = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        if len(kinds) == len(value):
            return tuple(typed(part, entry, name, remedy) for part, entry in zip(kinds, value, strict=True))
    if kind is Any:
        return value
    if NoneType in parts:
        return None if value is None else typed(parts[0], value, name, remedy)
    if origin is Literal and value in parts:
        return value
    if type(value) is kind or (kind is float and type(value) is int):
        return kind(value)
    raise InputError(f"{name} is {value!r}, which is not a value of this field: {remedy}.")
