"""Dataclasses as JSON files with a hash of their content.

When one is read, an unknown field, a value of another type, or the absence of a field without a default is an error.
"""

import json
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from gpdit_lightning.errors import InputError
from gpdit_lightning.regular_files import read_bounded
from gpdit_lightning.retries import transient_error
from gpdit_lightning.schema import CONTENT_HASH, MAX_JSON_BYTES, check_content_hash, content_hash, parse_json

Record = TypeVar("Record")


def record_to_json(record: Any) -> str:
    """Return a dataclass as JSON with a hash of its content; raises `ValueError` for NaN, which JSON lacks."""
    content = asdict(record)
    content[CONTENT_HASH] = content_hash(json.loads(json.dumps(content)))
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def load_record(record_type: type[Record], path: Path, remedy: str) -> Record:
    """Load a record from a JSON file.

    Args:
        record_type: a dataclass.
        path: of the file.
        remedy: what error messages advise.

    Raises:
        InputError: the file is missing, does not contain such a record, or has another content than its hash; those of
            earlier versions have none.
    """
    try:
        text = read_bounded(path, MAX_JSON_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise transient_error(error, path) or InputError(f"{path} cannot be read ({error}): {remedy}.") from None
    return record_from_json(record_type, text, str(path), remedy)


def record_from_json(record_type: type[Record], text: str, name: str, remedy: str) -> Record:
    """Parse a record from JSON. Errors refer to the text as `name`; the rest is as for :func:`load_record`."""
    content = parse_json(text.encode("utf-8", "backslashreplace"), name, remedy)
    if isinstance(content, dict):
        check_content_hash(content, name, remedy)
        content.pop(CONTENT_HASH, None)
    return convert(record_type, content, name, remedy)


def convert(annotation: Any, value: Any, name: str, remedy: str) -> Any:
    """Convert a JSON value to the type of an annotation: a dataclass, dict, tuple, optional, literal or plain type.

    Args:
        annotation: the type.
        value: from `json.loads`.
        name: of the file and the field, for error messages.
        remedy: what error messages advise.

    Raises:
        InputError: the value is not of the type.
    """
    origin, parts = get_origin(annotation), get_args(annotation)
    if is_dataclass(annotation) and isinstance(value, dict):
        all_hints = get_type_hints(annotation)
        hints = {field.name: all_hints[field.name] for field in fields(annotation)}
        optional = {field.name for field in fields(annotation) if field.default is not MISSING}
        for field in sorted(value.keys() - hints.keys() | hints.keys() - optional - value.keys()):
            problem = "lacks the field" if field in hints else "has the unknown field"
            raise InputError(f"{name} {problem} {field!r}: {remedy}.")
        converted = {field: convert(hints[field], value[field], f"{name}, {field}", remedy) for field in value}
        try:
            return annotation(**converted)  # type: ignore[operator]
        except InputError as error:  # of `__post_init__`, which does not know the file
            raise InputError(f"{name} has values that contradict each other ({error}): {remedy}.") from None
    if origin is dict and isinstance(value, dict):
        return {key: convert(parts[1], entry, f"{name}, {key}", remedy) for key, entry in value.items()}
    if origin is tuple and isinstance(value, list):
        kinds = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        if len(kinds) == len(value):
            return tuple(convert(part, entry, name, remedy) for part, entry in zip(kinds, value, strict=True))
    if annotation is Any:
        return value
    if NoneType in parts:
        return None if value is None else convert(parts[0], value, name, remedy)
    if origin is Literal and value in parts:
        return value
    if type(value) is annotation or (annotation is float and type(value) is int):
        return annotation(value)
    raise InputError(f"{name} is {value!r}, which is not a value of this field: {remedy}.")
