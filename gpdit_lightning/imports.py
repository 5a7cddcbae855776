"""From what a recipe or an option says to the object that it names: one rule for every part that a user can replace."""

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from gpdit_lightning.errors import InputError

T = TypeVar("T")


def resolve(name: str, registry: Mapping[str, T], what: str, base: type | None = None) -> T:
    """The entry of a registry, or the object at an import path such as `my_package.my_module.MySampler`.

    Args:
        name: what the user wrote.
        registry: the names that the library and `register_...` functions have given, with their objects.
        what: how the user calls it, for messages: "sampler", "attention_backend".
        base: the class that an object at an import path must be a subclass of; None: it only has to be callable.

    Raises:
        InputError: no such name, no such import path, or an object of another kind there.
    """
    if name in registry:
        return registry[name]
    if not is_import_path(name):
        raise InputError(
            f"{what} '{name}' is not known{did_you_mean(name, registry)}: choose one of {', '.join(registry)}, or give "
            "the import path of your own (package.module.name)."
        )
    found = import_object(name, what)
    if base is None and not callable(found):
        raise InputError(f"{what} '{name}' is of type {type(found).__name__}; it must be callable.")
    if base is not None and not (isinstance(found, type) and issubclass(found, base)):
        raise InputError(f"{what} '{name}' is not a subclass of {base.__module__}.{base.__qualname__}.")
    return found


def is_import_path(name: str) -> bool:
    """Whether `name` has the form `module.object`; neither has to exist."""
    return "." in name and all(part.isidentifier() for part in name.split("."))


def import_object(path: str, what: str) -> Any:
    """The object at an import path.

    An error that the module itself raises while it is imported keeps its traceback.

    Raises:
        InputError: a module that cannot be found, or an object that is not in it.
    """
    module_path, _, attribute = path.rpartition(".")
    try:
        module = importlib.import_module(module_path)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{what} '{path}' cannot be imported ({error}): install its package, or add its folder to PYTHONPATH."
        ) from error
    if not hasattr(module, attribute):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise InputError(
            f"{what} '{path}' does not exist: module {module_path} ({getattr(module, '__file__', 'built in')}) has no "
            f"'{attribute}'{did_you_mean(attribute, public)}."
        )
    return getattr(module, attribute)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """` (did you mean 'x'?)` with the choice that is spelled most like `name`; empty if none is."""
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
