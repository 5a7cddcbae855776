"""A guard of jsonargparse, which imports what the value of any option names: only announced code is imported."""

import importlib.util
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jsonargparse import _util

from gpdit_lightning.errors import InputError
from gpdit_lightning.imports import is_outside

log = logging.getLogger(__name__)


class _UnannouncedImportError(ImportError, ValueError):
    """Raised in jsonargparse for an import that was not announced; it handles both types as an invalid value."""


_allowed: dict[str, str] = {}  # options by the import paths that may be imported; empty once that is logged
_refused: list[str] = []  # import paths that were not imported


@contextmanager
def imports_of(classes: Mapping[str, Sequence[str]], cure: str = "remove it") -> Iterator[None]:
    """Let values of options import code outside the library only if these classes name it; each import is logged.

    Outside of the block they import none.

    Args:
        classes: import paths by option, of :func:`outside_classes`.
        cure: what the user should do about other code, for the message.

    Raises:
        InputError: parsing failed, and another import was refused.
    """
    _refused.clear()
    _allowed.update({path: option for option, paths in classes.items() for path in paths})
    try:
        yield
    except InputError:
        if not _refused:
            raise
        raise InputError(f"{_refused[0]} is code outside this library, named where none is expected: {cure}.") from None
    finally:
        _allowed.clear()


def _import(name: str, fromlist: Sequence[str] = ()) -> Any:
    """Import a module for jsonargparse, which finds this function in the place of the built-in `__import__`."""
    path = ".".join((name, *fromlist))
    if option := _allowed.get(path):
        log.info("%s names %s, outside this library: its code is imported and run", option, path)
        _allowed[path] = ""
    is_allowed = name in sys.modules or any(other.startswith(f"{name}.") for other in _allowed)
    if is_outside(name) and not is_allowed and importlib.util.find_spec(name.partition(".")[0]) is not None:
        _refused.append(path)
        raise _UnannouncedImportError(f"{path} is not imported")
    return __import__(name, fromlist=fromlist)


def guard_imports() -> None:
    """Make jsonargparse import what values name with the function of this module, for all parsers."""
    _util.__import__ = _import  # type: ignore[attr-defined]
