"""Validation of JSON content against a schema, with an `InputError` that names the field.

A schema is a `Constraint`, a dict of schemas (an object with at least these fields), or a list of one schema (a
non-empty list whose elements all match it).
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from gpdit_lightning.errors import InputError


class Constraint(NamedTuple):
    """A condition on a single value.

    Attributes:
        description: completes the sentence "it must be ...".
        accepts: returns whether a value meets the condition.
    """

    description: str
    accepts: Callable[[Any], bool]


TEXT = Constraint("a string", lambda value: isinstance(value, str))
TEXT_OR_NULL = Constraint("a string or null", lambda value: value is None or isinstance(value, str))
COUNT = Constraint("a non-negative integer", lambda value: type(value) is int and value >= 0)
SIZE = Constraint("a positive integer", lambda value: type(value) is int and value >= 1)
NUMBER = Constraint("a finite number", lambda value: type(value) in (int, float) and math.isfinite(value))
NUMBER_OR_NULL = Constraint("a finite number or null", lambda value: value is None or NUMBER.accepts(value))
POSITIVE_NUMBER = Constraint("a positive number", lambda value: NUMBER.accepts(value) and value > 0)
OBJECT = Constraint("an object", lambda value: isinstance(value, dict))
LIST = Constraint("a list", lambda value: isinstance(value, list))
SHA256 = Constraint(
    "a sha256", lambda value: isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None
)


def one_of(*names: str) -> Constraint:
    """Return the constraint that a value is one of `names`."""
    return Constraint(" or ".join(names), lambda value: value in names)


def check(value: Any, schema: Any, name: str, file: str, cure: str) -> Any:
    """Check a value of a file against a schema.

    Args:
        value: a value as `json.loads` returns it.
        schema: see the module's docstring.
        name: the path of the value in the file, such as `codec.mean`; empty for the whole file.
        file: the file's path, for the message.
        cure: what the user should do, for the message.

    Returns:
        The value.

    Raises:
        InputError: the value does not match the schema.
    """
    if isinstance(schema, dict):
        check(value, OBJECT, name, file, cure)
        for field, inner in schema.items():
            full_name = f"{name}.{field}" if name else field
            if field not in value:
                raise InputError(f"{file} lacks the field {full_name}: {cure}.")
            check(value[field], inner, full_name, file, cure)
    elif isinstance(schema, list):
        if not isinstance(value, list) or not value:
            raise _mismatch(value, "a non-empty list", name, file, cure)
        for index, element in enumerate(value):
            check(element, schema[0], f"{name}[{index}]", file, cure)
    elif not schema.accepts(value):
        raise _mismatch(value, schema.description, name, file, cure)
    return value


def _mismatch(value: Any, description: str, name: str, file: str, cure: str) -> InputError:
    content = f"{name} = {value!r}" if name else f"{value!r} as its content"
    return InputError(f"{file} has {content}; it must be {description}: {cure}.")
