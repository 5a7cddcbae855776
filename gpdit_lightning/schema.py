"""Validation of JSON content against a schema, with an `InputError` that names the field.

A schema is a `Constraint`, a dict of schemas (an object with at least these fields), or a list of one schema (a
non-empty list whose elements all match it).
"""

import hashlib
import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from gpdit_lightning.errors import InputError

MAX_JSON_BYTES = 2**28  # size of a JSON file
MAX_JSON_CONTAINERS = 2**22  # arrays and objects of a JSON file, each of which takes more memory than bytes in the file
MAX_JSON_DEPTH = 64  # arrays and objects inside each other
CONTENT_HASH = "content_sha256"
MAX_SHOWN_CHARACTERS = 200  # of a value in a message

# A value of a file may have containers within containers without end, by references.
SHORTENED = reprlib.Repr()
SHORTENED.maxlevel, SHORTENED.maxdict, SHORTENED.maxlist, SHORTENED.maxtuple = 4, 50, 50, 50
SHORTENED.maxstring = SHORTENED.maxlong = SHORTENED.maxother = MAX_SHOWN_CHARACTERS


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
# Integers beyond 64 bits are no counts of anything, and neither NumPy nor torch can compute with them.
COUNT = Constraint("a non-negative integer below 2^63", lambda value: type(value) is int and 0 <= value < 2**63)
SIZE = Constraint("a positive integer below 2^63", lambda value: type(value) is int and 1 <= value < 2**63)
NUMBER = Constraint("a finite number", lambda value: type(value) in (int, float) and _is_finite(value))
NUMBER_OR_NULL = Constraint("a finite number or null", lambda value: value is None or NUMBER.accepts(value))
POSITIVE_NUMBER = Constraint("a positive number", lambda value: NUMBER.accepts(value) and value > 0)
OBJECT = Constraint("an object", lambda value: isinstance(value, dict))
LIST = Constraint("a list", lambda value: isinstance(value, list))
SHA256 = Constraint(
    "a sha256", lambda value: isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None
)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floating-point numbers
        return False


def parse_json(content: bytes, file: str, cure: str) -> Any:
    """Parse the content of a JSON file strictly: one meaning, or an error.

    Args:
        content: UTF-8, at most `MAX_JSON_BYTES` with at most `MAX_JSON_CONTAINERS` arrays and objects.
        file: the file's path, for the message.
        cure: what the user should do, for the message.

    Raises:
        InputError: the content is larger, is not JSON, is nested too deeply, has a name twice in an object,
            or a number that is not finite.
    """
    try:
        if len(content) > MAX_JSON_BYTES:
            raise ValueError(f"it has {len(content)} bytes, more than {MAX_JSON_BYTES}")
        if (containers := content.count(b"[") + content.count(b"{")) > MAX_JSON_CONTAINERS:
            raise ValueError(f"it has {containers} brackets, more than {MAX_JSON_CONTAINERS}")
        parsed = _STRICT.decode(content.decode())
        if containers > MAX_JSON_DEPTH and _is_too_deep(parsed):
            raise RecursionError
        return parsed
    except RecursionError:
        raise InputError(
            f"{file} is not readable JSON (it is nested too deeply, in more than {MAX_JSON_DEPTH} levels): {cure}."
        ) from None
    except ValueError as error:
        raise InputError(f"{file} is not readable JSON ({error}): {cure}.") from None


def _is_too_deep(content: Any) -> bool:
    level = [content]
    for _ in range(MAX_JSON_DEPTH):
        containers = [value for value in level if isinstance(value, (dict, list))]
        if not containers:
            return False
        level = [value for outer in containers for value in (outer.values() if isinstance(outer, dict) else outer)]
    return True


def content_hash(content: dict[str, Any]) -> str:
    """Return the sha256 of JSON content without its field `CONTENT_HASH`, whatever its spaces and its order."""
    rest = {name: value for name, value in content.items() if name != CONTENT_HASH}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_content_hash(content: dict[str, Any], file: str, cure: str) -> None:
    """Check the hash that a file has of its content, if it has one; files of earlier versions have none.

    Args:
        content: the content as `parse_json` returns it.
        file: the file's path, for the message.
        cure: what the user should do, for the message.

    Raises:
        InputError: the hash differs.
    """
    if CONTENT_HASH in content and (actual := content_hash(content)) != content[CONTENT_HASH]:
        raise InputError(
            f"{file} records the hash {shown(content[CONTENT_HASH])} of its content, which has {actual}, so it was "
            f"damaged or edited: {cure}."
        )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        repeated = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ValueError(f"the name {shown(repeated)} occurs twice in one object")
    return content


def _reject(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON value")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {shown(text)} is not finite")
    return number


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_reject, parse_float=_finite)


def shown(value: Any) -> str:
    """Return the `repr` of a value for a message, shortened, since a file may contain a value of any size."""
    try:
        text = SHORTENED.repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or deeply nested
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."


def differences(first: Any, second: Any, name: str = "", absent: Any = None) -> Iterator[tuple[str, Any, Any]]:
    """Yield the entries in which two JSON values differ: a dotted name such as "guidance.context", and both values.

    Args:
        first, second: the values.
        name: of the values, before the dot.
        absent: the value of an entry that one of them lacks.
    """
    if isinstance(first, dict) and isinstance(second, dict):
        for key in {**first, **second}:
            inner = f"{name}.{key}" if name else key
            yield from differences(first.get(key, absent), second.get(key, absent), inner, absent)
    elif first != second:
        yield name, first, second


def size_up_to(most: int) -> Constraint:
    """Return the constraint that a value is an integer from 1 to `most`."""
    return Constraint(f"an integer from 1 to {most}", lambda value: SIZE.accepts(value) and value <= most)


def one_of(*names: str) -> Constraint:
    """Return the constraint that a value is one of `names`."""
    return Constraint(" or ".join(names), lambda value: isinstance(value, str) and value in names)


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
    content = f"{name} = {shown(value)}" if name else f"{shown(value)} as its content"
    return InputError(f"{file} has {content}; it must be {description}: {cure}.")
