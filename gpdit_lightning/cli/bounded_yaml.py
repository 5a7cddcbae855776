"""Reading of YAML with bounds on size, depth and aliases, since recipes come from other people too.

jsonargparse parses every recipe, file of options and value of the command line with `load_yaml`, and reads every file
with `read_text`.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from jsonargparse import _loaders_dumpers

from gpdit_lightning.errors import InputError
from gpdit_lightning.path_kinds import found_at, reason_and_cure
from gpdit_lightning.regular_files import read_bounded

PARSER_MODE = "omegaconf+"  # YAML with interpolations that are resolved after all files are read

MAX_BYTES = 2**20
MAX_DEPTH = 32
MAX_NODES = 50_000  # with each alias counted as what it stands for
MAX_KEYS = 1000  # of one mapping
MAX_DIGITS = 256  # of a number; as a hexadecimal one it is below 2^1024, the limit of a float
MAX_INTERPOLATED = 4096  # characters of a scalar with ${...}, which takes milliseconds per interpolation to parse

MERGE_KEY = "<<"
TAGS = {None, "!", *(f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map"))}
NUMBER = re.compile(r"[-+]?(0x[0-9a-f_]+|0b[01_]+|[0-9_.:]+)", re.IGNORECASE)  # of YAML 1.1, also 1:30:00
HAS_STRUCTURE = re.compile(r"[\[{&*!\n?:]")


def read_text(path: str | Path) -> str:
    """Return the text of a regular file of at most `MAX_BYTES`.

    Raises:
        OSError: it cannot be read.
        InputError: it is not a regular file, larger, or not UTF-8.
    """
    if "\0" in str(path):
        raise InputError(f"{str(path)!r} contains a null character: give the path of a file.")
    if os.path.exists(path) and (os.path.isdir(path) or found_at(Path(path)).kind not in ("recipe", None)):
        reason = reason_and_cure(Path(path), "recipe", "give a YAML file, or gpdit: and the name of a shipped recipe")
        raise InputError(f"{path} is no file of options, {reason}.")
    content = read_bounded(Path(path), MAX_BYTES)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 (byte {error.start} is {content[error.start]:#x}): save it as UTF-8."
        ) from None


def load_yaml(text: str) -> Any:
    """Return the content of YAML, in jsonargparse's dialect: `1e-3` is a number, and a date is a string.

    Raises:
        yaml.YAMLError: it is invalid, or exceeds a limit of this module; has a tag or a repeated key.
    """
    try:
        if HAS_STRUCTURE.search(text):
            _check_events(text)
        elif len(text) > MAX_DIGITS and NUMBER.fullmatch(text.strip()):
            raise yaml.YAMLError(f"a number of {len(text)} digits is too long")
        return jsonargparse.get_loader("yaml")(text)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise yaml.YAMLError(f"a value cannot be converted: {error}") from None


@dataclass
class _Collection:
    """A list or mapping of which not all items are parsed yet.

    Attributes:
        anchor: its anchor, or None.
        is_mapping: whether it is a mapping.
        nodes: number of its nodes so far, including itself.
        items: number of its direct items so far; for a mapping, of keys and values.
        keys: the keys of a mapping so far.
    """

    anchor: str | None
    is_mapping: bool
    nodes: int = 1
    items: int = 0
    keys: set[str] = field(default_factory=set)


def _check_events(text: str) -> None:
    """Check the structure of YAML before anything is built from it, in time proportional to its length.

    Raises:
        yaml.YAMLError: see `load_yaml`.
    """
    sizes: dict[str, int] = {}  # nodes that the alias of an anchor stands for
    open_collections = [_Collection(None, is_mapping=False)]
    for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        line = event.start_mark.line + 1 if event.start_mark else 1
        parent = open_collections[-1]
        anchor, nodes = None, 1
        if isinstance(event, yaml.CollectionStartEvent):
            _check_tag(event.tag, line)
            _count_item(parent, None, line)
            open_collections.append(_Collection(event.anchor, isinstance(event, yaml.MappingStartEvent)))
            if len(open_collections) > MAX_DEPTH:
                raise yaml.YAMLError(f"line {line} is nested deeper than {MAX_DEPTH} levels")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            ended = open_collections.pop()
            parent, anchor, nodes = open_collections[-1], ended.anchor, ended.nodes
        elif isinstance(event, yaml.AliasEvent):
            if any(collection.anchor == event.anchor for collection in open_collections):
                raise yaml.YAMLError(f"*{event.anchor} in line {line} contains itself")
            _count_item(parent, None, line)
            nodes = sizes.get(event.anchor or "", 1)
        elif isinstance(event, yaml.ScalarEvent):
            _check_tag(event.tag, line)
            if not event.style and len(event.value) > MAX_DIGITS and NUMBER.fullmatch(event.value):
                raise yaml.YAMLError(f"line {line} has a number of {len(event.value)} digits, which is too long")
            if "${" in event.value and len(event.value) > MAX_INTERPOLATED:
                raise yaml.YAMLError(f"line {line} has ${{...}} in a value of more than {MAX_INTERPOLATED} characters")
            _count_item(parent, event.value, line)
            anchor = event.anchor
        else:  # the begin or end of a document
            continue
        if anchor is not None:
            sizes[anchor] = nodes
        parent.nodes += nodes
        if sum(collection.nodes for collection in open_collections) > MAX_NODES:
            raise yaml.YAMLError(f"line {line} is beyond {MAX_NODES} values, the limit of a YAML file with its aliases")


def _check_tag(tag: str | None, line: int) -> None:
    if tag not in TAGS:
        raise yaml.YAMLError(f"line {line} has the tag {tag}, which a recipe cannot have: leave it out")


def _count_item(parent: _Collection, scalar: str | None, line: int) -> None:
    """Count an item of a collection; a scalar key of a mapping must be new."""
    parent.items += 1
    if parent.is_mapping and parent.items > 2 * MAX_KEYS:
        raise yaml.YAMLError(f"line {line} is in a mapping of more than {MAX_KEYS} keys")
    if parent.is_mapping and parent.items % 2 == 1 and scalar is not None:
        if scalar in parent.keys and scalar != MERGE_KEY:
            raise yaml.YAMLError(f"the key {scalar!r} in line {line} is there already: keep one of the two")
        parent.keys.add(scalar)


def _load_scalar(text: str, load: Callable[[str], Any] = _loaders_dumpers.load_basic) -> Any:
    """Return the number or word of YAML that a text is, by a short way; leave long texts to `load_yaml`."""
    return load(text) if len(text) <= MAX_DIGITS else _loaders_dumpers.not_loaded


def _read_text(self: jsonargparse.Path) -> str:
    return read_text(self.absolute)


def use_bounded_yaml() -> None:
    """Make jsonargparse load YAML and read files with the functions of this module.

    Text that is the value of an option of another type, such as `max_steps: "[...]"`, is loaded once more, by a
    function that no setting replaces.
    """
    jsonargparse.set_loader(PARSER_MODE, load_yaml, (yaml.YAMLError,))
    _loaders_dumpers.yaml_load = load_yaml
    _loaders_dumpers.load_basic = _load_scalar
    jsonargparse.Path.read_text = _read_text  # type: ignore[method-assign]
