"""Lookup of codecs, samplers and other replaceable parts by a registered name or an import path."""

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from gpdit_lightning.errors import InputError

T = TypeVar("T")


def resolve(name: str, registry: Mapping[str, T], kind: str, base: type | None = None) -> T:
    """Return the entry of a registry, or the object at an import path such as `my_package.my_module.MySampler`.

    Args:
        name: a registered name or an import path.
        registry: the registered objects by name.
        kind: what the object is, for messages: "sampler", "attention_backend".
        base: the class that an object at an import path must be a subclass of; None: it only has to be callable.

    Raises:
        InputError: the name is not registered, the import path does not exist, or its object is of another type.
    """
    if name in registry:
        return registry[name]
    if not is_import_path(name):
        raise InputError(
            f"{kind} '{name}' is not known{did_you_mean(name, registry)}: choose one of {', '.join(registry)}, or give "
            "an import path (package.module.name)."
        )
    imported = import_object(name, kind)
    if base is None and not callable(imported):
        raise InputError(f"{kind} '{name}' is of type {type(imported).__name__}; it must be callable.")
    if base is not None and not (isinstance(imported, type) and issubclass(imported, base)):
        raise InputError(f"{kind} '{name}' is not a subclass of {base.__module__}.{base.__qualname__}.")
    return imported


def is_import_path(name: str) -> bool:
    """Return whether `name` has the form `module.object`; neither has to exist."""
    return "." in name and all(part.isidentifier() for part in name.split("."))


def import_object(path: str, kind: str) -> Any:
    """Import the object at an import path.

    Other errors that the module raises while it is imported keep their traceback.

    Args:
        path: the module, a dot, and the name of the object in it.
        kind: what the object is, for messages.

    Raises:
        InputError: the module, a module that it imports, or the object in it is not found.
    """
    module_path, _, attribute = path.rpartition(".")
    try:
        module = importlib.import_module(module_path)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{kind} '{path}' cannot be imported ({error}): install its package, or add its folder to PYTHONPATH."
        ) from error
    if not hasattr(module, attribute):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise InputError(
            f"{kind} '{path}' does not exist: module {module_path} ({getattr(module, '__file__', 'built in')}) has no "
            f"'{attribute}'{did_you_mean(attribute, public)}."
        )
    return getattr(module, attribute)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the choice with the most similar spelling; empty if no choice is similar."""
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
