"""Damage of JSON and YAML files: values, keys, structure and encodings."""

import functools
import json
import operator
import random
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import yaml

from gpdit_lightning.schema import CONTENT_HASH

DEPTHS = (50, 500, 5000, 200_000)
STRANGE_VALUES: tuple[Any, ...] = (
    *(0, 1, -1, 2**31, -(2**31), 2**63, 2**64, -(2**64), 10**9, 10**12, 10**30, 10**400, -(10**30)),
    *(0.5, -0.5, 1e-30, 1e30, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", " ", "abc", "0", "null", "nan", "a" * 10_000, "\0", "\ud800", "\u2028", "é" * 200, "None", "true"),
    *("../../../etc/passwd", "/etc/passwd", "/dev/zero", "https://localhost:1/a", "os.system", "${a.b}"),
    *(None, True, False, [], {}, [[]], [None], {"": None}, {"a": {"b": {}}}, [1, "a", None], [0] * 5000),
)  # fmt: skip
KEYS = ("", "unknown", "__class__", "class_path", "format", "\0", "é", "a.b", "0", "path", "shards")
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE_YAML = (
    BOMB,
    "run_dir: !!python/object/apply:os.system ['true']\n",
    "run_dir: !!python/name:os.system\n",
    "run_dir: !unknown x\n",
    "base: &x [*x]\n",
    "model: &m\n  init_args: *m\n",
    "model: {<<: *nothing}\n",
    "? [a, b]\n: c\n",
    "? {a: b}\n: c\n",
    "run_dir: a\nrun_dir: b\n",
    "trainer:\n\tmax_steps: 1\n",
    "--- a\n--- b\n",
    "run_dir: 'a\n",
    "trainer: {max_steps: 0x" + "F" * 5000 + "}\n",
    "trainer: {max_steps: " + "9" * 5000 + "}\n",
    "seed_everything: 1:2:3\n",
    "run_dir: 2026-99-99\n",
    "run_dir: !!binary '%%%'\n",
    "run_dir: !!timestamp x\n",
    "run_dir: !!int x\n",
    "- a\n- b\n",
    "text\n",
    "base: recipe.yaml\n",
    "base: [base.yaml, recipe.yaml]\n",
    "base: /dev/zero\n",
    "base: .\n",
    "base: [[[]]]\n",
)
# A value of each type, one after the other for every field of a file.
FIELD_VALUES: tuple[Any, ...] = (None, True, -1, 1.5, "x", [], {})
REMOVED = object()
ENCODINGS = ("utf-16", "utf-32", "utf-16-le", "latin-1", "utf-8-sig", "utf-7")

Edit = Callable[[Any, random.Random], str]


def damage_values(content: bytes, numbers: random.Random, is_yaml: bool) -> tuple[bytes, str]:
    """Damage the text of a JSON or YAML file.

    Args:
        content: the undamaged bytes.
        numbers: source of all choices.
        is_yaml: whether it is YAML.

    Returns:
        The damaged bytes, and a description.
    """
    text = content.decode()
    kinds = ["value", "value", "value", "key", "missing", "unknown", "duplicate", "deep", "encoding", "text", "list"]
    kind = numbers.choice([*kinds, "hostile", "hostile"] if is_yaml else kinds)
    if kind == "hostile":
        addition = numbers.choice(HOSTILE_YAML)
        damaged = addition if numbers.random() < 0.5 else f"{text}\n{addition}"
        return damaged.encode(), f"YAML {addition[:60]!r}"
    if kind == "encoding":
        encoding = numbers.choice(ENCODINGS)
        return text.replace("a", "ä", 1).encode(encoding), f"text in {encoding}"
    if kind == "text":
        return _with_damaged_text(text, numbers)
    if kind == "deep":
        depth = numbers.choice(DEPTHS)
        opening, closing = numbers.choice((("[", "]"), ('{"a": ', "}")))
        return _with_value(text, opening * depth + "0" + closing * depth, numbers, is_yaml), f"nested {depth} times"
    tree = yaml.safe_load(text) if is_yaml else json.loads(text)
    if kind == "duplicate":
        return text.replace("\n", '\n"format": 1,\n', 1).encode() if not is_yaml else (text + text).encode(), "twice"
    edits: dict[str, Edit] = {
        "value": _change_value,
        "key": _rename_key,
        "missing": _remove,
        "unknown": _add_key,
        "list": _change_list,
    }
    description = edits[kind](tree, numbers)
    return _dump(tree, is_yaml), description


class DamagedField(NamedTuple):
    """A JSON file in which a field has another value or is missing."""

    content: bytes
    description: str


def damage_every_field(content: bytes) -> Iterator[DamagedField]:
    """Yield a JSON file with every field in turn removed, and replaced by every value of `FIELD_VALUES`.

    Of a list only the first item is damaged, and of the lines of a .jsonl file only the first one, if it has any.
    """
    text = content.decode()
    try:
        end = json.JSONDecoder().raw_decode(text)[1]
    except ValueError:
        return
    first, rest = text[:end], text[end:]

    def fields(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        items = tree.items() if isinstance(tree, dict) else enumerate(tree[:1]) if isinstance(tree, list) else ()
        for key, value in items:
            if key != CONTENT_HASH:  # recorded hashes are replaced by matching ones
                yield (*above, key)
                yield from fields(value, (*above, key))

    for *outer, key in fields(json.loads(first)):
        for value in (*FIELD_VALUES, REMOVED):
            tree = json.loads(first)
            container = functools.reduce(operator.getitem, outer, tree)
            if value is REMOVED:
                del container[key]
            else:
                container[key] = value
            name, change = ".".join(map(str, (*outer, key))), "was removed" if value is REMOVED else f"is {value!r}"
            yield DamagedField(f"{json.dumps(tree)}{rest}".encode(), f"{name} {change}")


def _dump(tree: Any, is_yaml: bool) -> bytes:
    text = yaml.safe_dump(tree, allow_unicode=True) if is_yaml else json.dumps(tree, indent=2)
    return text.encode(errors="surrogatepass")


def _with_damaged_text(text: str, numbers: random.Random) -> tuple[bytes, str]:
    """Replace one number of the text by characters that JSON and YAML read differently, or by none."""
    places = list(re.finditer(r"-?\d+(\.\d+)?", text))
    replacement = numbers.choice(
        ("", "NaN", "Infinity", "-", "1e999", "1_000", "0x10", "01", "9" * 6000, "1e", "é", "\x00")
    )
    if not places:
        return (text + replacement).encode(), f"{replacement!r:.20} at the end"
    place = numbers.choice(places)
    return (
        text[: place.start()] + replacement + text[place.end() :]
    ).encode(), f"{place[0]} became {replacement!r:.20}"


def _with_value(text: str, value: str, numbers: random.Random, is_yaml: bool) -> bytes:
    """Replace the value of one key in the text, which need not be a tree that Python can hold."""
    places = list(re.finditer(r"(?m)^(\s*\"?\w+\"?:) (.+?),?$", text))
    if not places or (is_yaml and numbers.random() < 0.3):
        return value.encode()
    place = numbers.choice(places)
    return (text[: place.end(1)] + " " + value + ("" if is_yaml else ",") + text[place.end() :]).encode()


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (container, key or index) of a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        yield from _places(value)


def _pick(tree: Any, numbers: random.Random, container: type = object) -> tuple[Any, Any] | None:
    """Return a place, or None; fields near the root are as likely as the many items of lists."""
    places = [place for place in _places(tree) if isinstance(place[0], container)]
    named = [place for place in places if isinstance(place[0], dict)]
    chosen = named if named and numbers.random() < 0.8 else places
    return numbers.choice(chosen) if chosen else None


def _change_value(tree: Any, numbers: random.Random) -> str:
    value = numbers.choice(STRANGE_VALUES)
    place = _pick(tree, numbers)
    if place is None:
        return "nothing"
    container, key = place
    old = container[key]
    if isinstance(old, (int, float)) and numbers.random() < 0.5:
        value = numbers.choice((old + 1, -old, old * 1000, old - 1, float(old), str(old), old * 10**15, 10**9))
    container[key] = value
    return f"{key} was {old!r:.40} and is {value!r:.40}"


def _rename_key(tree: Any, numbers: random.Random) -> str:
    place = _pick(tree, numbers, dict)
    if place is None:
        return "nothing"
    container, key = place
    container[new := numbers.choice((*KEYS, f"{key}x"))] = container.pop(key)
    return f"{key} was renamed to {new!r}"


def _remove(tree: Any, numbers: random.Random) -> str:
    place = _pick(tree, numbers)
    if place is None:
        return "nothing"
    container, key = place
    del container[key]
    return f"{key} was removed"


def _add_key(tree: Any, numbers: random.Random) -> str:
    containers = [tree, *(value for container, key in _places(tree) if isinstance(value := container[key], dict))]
    container, key, value = numbers.choice(containers), numbers.choice(KEYS), numbers.choice(STRANGE_VALUES)
    if not isinstance(container, dict):
        return "nothing"
    container[key] = value
    return f"{key!r} was added as {value!r:.40}"


def _change_list(tree: Any, numbers: random.Random) -> str:
    lists = [value for container, key in _places(tree) if isinstance(value := container[key], list) and value]
    if not lists:
        return _change_value(tree, numbers)
    chosen = numbers.choice(lists)
    kind = numbers.choice(("shuffled", "reversed", "repeated", "halved", "emptied", "multiplied"))
    if kind == "shuffled":
        numbers.shuffle(chosen)
    elif kind == "reversed":
        chosen.reverse()
    elif kind == "repeated":
        chosen.append(numbers.choice(chosen))
    elif kind == "halved":
        del chosen[len(chosen) // 2 :]
    elif kind == "emptied":
        chosen.clear()
    else:
        chosen *= 500
    return f"a list was {kind}"
