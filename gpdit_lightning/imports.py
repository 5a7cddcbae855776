"""Lookup of codecs, samplers and other replaceable parts by a registered name or an import path, and their errors."""

import difflib
import importlib
import importlib.util
import logging
import pkgutil
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

from gpdit_lightning.errors import InputError

INSIDE = ("gpdit_lightning", "lightning", "torch")

log = logging.getLogger(__name__)

T = TypeVar("T")


def resolve(name: str, registry: Mapping[str, T], kind: str, base: type | None = None) -> T:
    """Return the entry of a registry, or the object at an import path such as `my_package.my_module.MySampler`.

    Args:
        name: a registered name or an import path.
        registry: the registered objects by name.
        kind: what the object is, for messages: "sampler", "attention_backend".
        base: the class that an object at an import path must be a subclass of; None: it only has to be callable.

    Raises:
        InputError: the name is not registered, the import path does not exist, or its object is unsuitable.
    """
    if name in registry:
        return registry[name]
    if not is_import_path(name):
        raise InputError(
            f"{kind} '{name}' is not known{did_you_mean(name, registry)}: choose one of {', '.join(registry)}, or give "
            "an import path (package.module.name)."
        )
    imported = import_object(name, kind)
    check_part(imported, name, kind, base)
    return imported


def check_part(part: Any, name: str, kind: str, base: type | None) -> None:
    """Check that a custom part is callable, or is a complete subclass; arguments as in :func:`resolve`.

    Raises:
        InputError: it is of another type, or does not define an abstract method.
    """
    if base is None and not callable(part):
        raise InputError(f"{kind} '{name}' is of type {type(part).__name__}; it must be callable.")
    if base is not None and not (isinstance(part, type) and issubclass(part, base)):
        raise InputError(f"{kind} '{name}' is not a subclass of {import_path(base)}.")
    missing = ", ".join(sorted(getattr(part, "__abstractmethods__", ())))
    if missing:
        raise InputError(f"{kind} '{name}' does not define {missing}, which {import_path(base or part)} requires.")


def is_import_path(name: str) -> bool:
    """Return whether `name` has the form `module.object`; neither has to exist."""
    return "." in name and all(part.isidentifier() for part in name.split("."))


def is_outside(path: str) -> bool:
    """Return whether an import path leads to code outside this library and Lightning, whose import is announced."""
    return path.partition(".")[0] not in INSIDE


def import_object(path: str, kind: str) -> Any:
    """Import the object at an import path.

    Args:
        path: the module, a dot, and the name of the object in it.
        kind: what the object is, for messages.

    Raises:
        InputError: the module cannot be imported, or the object in it is not found.
    """
    module_path, _, attribute = path.rpartition(".")
    if is_outside(path) and module_path not in sys.modules:
        log.info("%s names %s, outside this library: its code is imported and run", kind, path)
    try:
        module = importlib.import_module(module_path)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{kind} '{path}' cannot be imported ({error}{_similar_module(error.name or '')}): install its package, or "
            "add its folder to PYTHONPATH."
        ) from error
    except Exception as error:  # the module may raise anything
        summary = error_summary(error, module_path)
        raise InputError(f"{kind} '{path}' cannot be imported ({summary}): correct the module.") from error
    if isinstance(getattr(module, attribute, None), ModuleType | None) and _is_module(path):
        raise InputError(
            f"{kind} '{path}' is a module: give the import path of a class or function in it, such as {path}.NAME."
        )
    if not hasattr(module, attribute):
        public = [name for name in vars(module) if not name.startswith("_")]
        file = getattr(module, "__file__", None) or "built in, or a folder without __init__.py"
        raise InputError(
            f"{kind} '{path}' does not exist: module {module_path} ({file}) has no '{attribute}'"
            f"{did_you_mean(attribute, public)}."
        )
    return getattr(module, attribute)


def _similar_module(name: str) -> str:
    """Return ` (did you mean 'x'?)` for a missing module of a package that has a module with a similar name."""
    package, _, last = name.rpartition(".")
    folders = getattr(sys.modules.get(package), "__path__", [])
    return did_you_mean(last, [module.name for module in pkgutil.iter_modules(folders)])


def import_path(part: Any) -> str:
    """Return the import path of a class or function, or of the class of any other object."""
    named = part if hasattr(part, "__qualname__") else type(part)
    return f"{named.__module__}.{named.__qualname__}"


def error_summary(error: BaseException, module: str) -> str:
    """Return type and message of an error on one line, with the last line of a package that it passed through.

    Args:
        error: the error.
        module: a module of that package.
    """
    message = " ".join(str(error).split())
    package = module.partition(".")[0]
    lines = [
        f" in {frame.f_code.co_filename}, line {line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).partition(".")[0] == package
    ]
    return type(error).__name__ + (f": {message}" if message else "") + (lines[-1] if lines else "")


def value_summary(value: Any) -> str:
    """Return dtype, shape and device of a tensor, or the type of any other value, for messages."""
    if hasattr(value, "dtype") and hasattr(value, "device"):
        return f"{value.dtype} {tuple(value.shape)} on {value.device}"
    return type(value).__name__


@contextmanager
def report_custom_errors(kind: str, path: str, expected: str) -> Iterator[None]:
    """Replace an error of a custom part by an InputError in one sentence that names the part.

    An InputError and a lack of memory are not replaced.

    Args:
        kind: what the part is, and which of its functions is called: "sampler", "the method `encode` of codec".
        path: the import path of the part.
        expected: a clause that describes a correct part: "it must have ...".
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # custom code may raise anything
        if type(error).__name__ == "OutOfMemoryError":  # torch's
            raise
        raise InputError(f"{kind} '{path}' failed ({error_summary(error, path)}): {expected}.") from error


def _is_module(path: str) -> bool:
    try:
        return importlib.util.find_spec(path) is not None
    except ModuleNotFoundError:  # its parent is a module without submodules
        return False


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the choice with the most similar spelling; empty if no choice is similar."""
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
