"""The parser of training recipes: Lightning's, with errors in one sentence."""

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from gpdit_lightning.cli import VERBS, record_of
from gpdit_lightning.cli.checked_files import FileCheckingParser
from gpdit_lightning.cli.messages import is_offered, one_sentence
from gpdit_lightning.cli.parsing import option_names
from gpdit_lightning.diffusion import NoiseSchedule
from gpdit_lightning.errors import InputError
from gpdit_lightning.imports import import_object
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.stages.classification import ClassificationConfig
from gpdit_lightning.training.optimizer import OptimizerConfig

# Lightning lets jsonargparse look for a file of options at each value that is an address, such as https://host/file.
set_parsing_settings(config_read_mode_fsspec_enabled=False)

# Records among the arguments of stages. Their fields are options of a nested parser, so they are not among `_actions`.
NESTED_OPTIONS = {
    "backbone": GPDiTConfig,
    "schedule": NoiseSchedule,
    "optimizer": OptimizerConfig,
    "classification": ClassificationConfig,
}


class RecipeParser(FileCheckingParser, LightningArgumentParser):
    """A parser whose errors are InputErrors in one sentence; they propose the nearest option for an unknown one.

    Abbreviated option names are unknown.
    """

    arguments_groups = tuple(f"model.init_args.{name}" for name in NESTED_OPTIONS)

    def __init__(self, *args: Any, allow_abbrev: bool = False, **settings: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **settings)

    @property
    def verb_options(self) -> list[str]:
        """The options of the verb itself, such as those of `estimate`, which recipe files may contain."""
        verb = self.prog.split()[-1]
        return option_names(record_of(verb)) if verb in VERBS else []

    def dump(self, namespace: Namespace, *args: Any, **settings: Any) -> str:
        """Return a recipe as YAML, without defaults of classes that YAML cannot contain."""
        recipe = namespace.clone()
        _remove_objects(recipe)
        return super().dump(recipe, *args, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise InputError instead of printing the usage."""
        known = [action.dest for action in self._actions if is_offered(action)] + self.verb_options
        known += [
            f"model.init_args.{name}.{f.name}"
            for name, options in NESTED_OPTIONS.items()
            for f in dataclasses.fields(options)
        ]
        raise InputError(one_sentence(message, known))


def _remove_objects(value: Any) -> None:
    """Remove, in place, arguments of classes that are their defaults and that YAML cannot contain, such as a device.

    Args:
        value: a parsed recipe, or a part of it.
    """
    if isinstance(value, list):
        for item in value:
            _remove_objects(item)
    if not isinstance(value, Namespace):
        return
    arguments = value.get("init_args")
    if "class_path" in value and isinstance(arguments, Namespace):
        defaults = _defaults(value.class_path)
        for name, argument in list(vars(arguments).items()):
            if not _is_data(argument) and defaults.get(name) is argument:
                del arguments[name]
    for item in vars(value).values():
        _remove_objects(item)


def _defaults(class_path: str) -> dict[str, Any]:
    """Return the defaults of the arguments of a class, and of those that it passes on to its bases.

    Of functions and nested classes, which may stand for a class, there are none.
    """
    try:
        kind = import_object(class_path, "class")
    except InputError:
        return {}
    constructors = [vars(base).get("__init__") for base in reversed(getattr(kind, "__mro__", ()))]
    parameters = [inspect.signature(init).parameters for init in constructors if inspect.isfunction(init)]
    return {name: parameter.default for of_base in parameters for name, parameter in of_base.items()}


def _is_data(value: Any) -> bool:
    """Return whether a value is one of YAML, or a path, which is written as one."""
    if isinstance(value, list | tuple):
        return all(map(_is_data, value))
    if isinstance(value, Mapping):
        return all(map(_is_data, value.values()))
    return value is None or type(value) in (bool, int, float, str, Namespace) or isinstance(value, Path)
