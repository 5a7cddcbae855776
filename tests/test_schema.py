"""Validation of JSON content against a schema."""

import math
from typing import Any

import pytest

from gpdit_lightning.errors import InputError
from gpdit_lightning.schema import COUNT, LIST, NUMBER, OBJECT, SHA256, SIZE, TEXT, TEXT_OR_NULL, check, one_of

SCHEMA = {"name": TEXT, "sizes": [[SIZE]], "inner": {"count": COUNT}}
VALUE = {"name": "a", "sizes": [[1, 2], [3]], "inner": {"count": 0}, "more": None}


def test_a_matching_value_is_returned() -> None:
    assert check(VALUE, SCHEMA, "", "file", "cure") is VALUE


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"file has \[\] as its content; it must be an object: cure\."),
        ({"name": "a"}, r"file lacks the field sizes: cure\."),
        (VALUE | {"name": 3}, r"file has name = 3; it must be a string: cure\."),
        (VALUE | {"sizes": []}, r"file has sizes = \[\]; it must be a non-empty list: cure\."),
        (
            VALUE | {"sizes": [[1, 0]]},
            r"file has sizes\[0\]\[1\] = 0; it must be a positive integer below 2\^63: cure\.",
        ),
        (
            VALUE | {"inner": {"count": -1}},
            r"file has inner\.count = -1; it must be a non-negative integer below 2\^63: cure\.",
        ),
    ],
)
def test_the_first_mismatch_is_reported(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        check(value, SCHEMA, "", "file", "cure")


def test_values_that_each_constraint_accepts() -> None:
    values = (None, True, 0, 1, 1.5, math.nan, "a", "0" * 64, [], {})
    accepted = {
        TEXT: ("a", "0" * 64),
        TEXT_OR_NULL: (None, "a", "0" * 64),
        COUNT: (0, 1),
        SIZE: (1,),
        NUMBER: (0, 1, 1.5),
        OBJECT: ({},),
        LIST: ([],),
        SHA256: ("0" * 64,),
        one_of("a", "b"): ("a",),
    }
    for constraint, expected in accepted.items():
        assert [value for value in values if constraint.accepts(value)] == list(expected), constraint.description
