"""The cause of an error in a class of a recipe, such as its stage or a logger, where jsonargparse's message loses it.

Nothing here runs for a recipe without an error. After one, the classes are imported and their arguments are parsed
again, one at a time.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy

from gpdit_lightning.cli.bounded_yaml import load_yaml
from gpdit_lightning.cli.messages import PREFIX, same_word
from gpdit_lightning.cli.parsing import OptionParser
from gpdit_lightning.cli.recipe_files import read_yaml, value_at
from gpdit_lightning.errors import InputError
from gpdit_lightning.imports import did_you_mean, error_summary, import_path, is_import_path, resolve
from gpdit_lightning.schema import shown
from gpdit_lightning.stages import GPDiTStage

# Options whose values are classes, or lists of classes, and the required base class.
BASES: dict[str, type] = {
    "model": GPDiTStage,
    "trainer.callbacks": Callback,
    "trainer.logger": Logger,
    "trainer.profiler": Profiler,
    "trainer.strategy": Strategy,
}
NAMED = ("trainer.profiler", "trainer.strategy")  # a string is a name that Lightning resolves
NESTED = "arguments_of_class"  # replaced in messages by the name of the option
SPEC_FIELDS = ("class_path", "init_args", "dict_kwargs")


@dataclass
class ClassSpec:
    """A class as it is given in a recipe.

    Attributes:
        option: its option, with its place in a list: `trainer.logger[0]`.
        base: the class that it must be a subclass of.
        kind: the class; None if it is not given.
        arguments: its constructor arguments.
    """

    option: str
    base: type
    kind: type | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def update(self, value: Any) -> None:
        """Apply a later value: an import path, the name of a known class, or a mapping of `SPEC_FIELDS`.

        Raises:
            InputError: the class cannot be imported or used here, or the mapping has other fields.
        """
        given = value if isinstance(value, Mapping) else {"class_path": value}
        if "class_path" in given and not has_interpolation(given["class_path"]):
            kind = resolve_class(given["class_path"], self.option, self.base)
            if self.kind not in (None, kind):  # jsonargparse drops arguments that the new class does not take
                accepted = argument_names(kind)
                self.arguments = {name: value for name, value in self.arguments.items() if name in accepted}
            self.kind = kind
        for name in given:
            if name not in SPEC_FIELDS:
                meant = self.arguments_meant(name) or f"{self.option}.init_args.{name}"
                cure = did_you_mean(name, SPEC_FIELDS) or f": write {meant}"
                raise InputError(f"{self.option}.{name} is not an option{cure}.")
        later = {} if given.get("init_args") is None else given["init_args"]
        if not isinstance(later, Mapping):
            raise InputError(
                f"{self.option}.init_args is {shown(later)}; it must be names with values, such as {{width: 8}}."
            )
        merge(self.arguments, later)

    def arguments_meant(self, name: str) -> str:
        """Return the options inside the arguments that an unknown name may stand for, joined by `or`; often empty."""
        where = f"{self.option}.init_args"
        return " or ".join(same_word(f"{where}.{name}", nested_names(self.kind, where))) if self.kind else ""

    def check_arguments(self) -> None:
        """Raise `InputError` unless the constructor accepts the arguments."""
        if self.kind is None:
            return
        where, kind, names = f"{self.option}.init_args", import_path(self.kind), argument_names(self.kind)
        for name in self.arguments:
            if name not in names:
                meant = self.arguments_meant(name)
                cure = f" (did you mean {meant}?)" if meant else did_you_mean(name, names)
                cure = cure or f": its arguments are {', '.join(names)}"
                raise InputError(f"{where}.{name} is not an argument of {kind}{cure}.")
        for name in names:
            if has_interpolation(self.arguments.get(name)) or (name == "save_dir" and self.base is Logger):
                continue  # resolved, or set to the run folder, after the files are read
            given = {name: self.arguments[name]} if name in self.arguments else {}
            parser = OptionParser()
            parser.add_class_arguments(self.kind, NESTED, fail_untyped=False, skip={*names} - {name})
            try:
                parser.parse_object({NESTED: given})
            except InputError as error:
                message = str(error).removeprefix(PREFIX).replace(NESTED, where)
                raise InputError(message if given else f"{where}.{name} is missing: {kind} requires it.") from None


def check_constructors(recipe: Namespace) -> None:
    """Construct each class of a recipe whose constructors failed.

    Args:
        recipe: parsed, with all interpolations resolved.

    Raises:
        InputError: a constructor raises an error, which is named.
    """
    for option, base in BASES.items():
        setting = recipe.get(option)
        for number, item in enumerate(setting if isinstance(setting, list) else [setting]):
            if not isinstance(item, Namespace):
                continue
            name = f"{option}[{number}]" if isinstance(setting, list) else option
            parser = OptionParser()
            parser.add_class_arguments(resolve_class(item.class_path, name, base), NESTED, fail_untyped=False)
            values = parser.parse_object({NESTED: item.get("init_args", Namespace()).as_dict()})
            try:
                parser.instantiate(values)
            except InputError:
                raise
            except Exception as error:  # a custom class may raise anything
                summary = error_summary(error, item.class_path)
                raise InputError(f"{name} '{item.class_path}' cannot be constructed ({summary}).") from error


def check_classes(arguments: Sequence[str]) -> None:
    """Check the classes of a recipe and their constructor arguments.

    Args:
        arguments: the command line of `fit`, with the bases of recipes.

    Raises:
        InputError: a class or an argument cannot be used.
    """
    specs: dict[str, list[ClassSpec]] = {}
    for option, path, value in given_values(arguments):
        update(specs, option, path, value)
    for spec in (spec for of_option in specs.values() for spec in of_option):
        spec.check_arguments()


def given_values(arguments: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    """Yield what a command line and its recipes give for the options in `BASES`, later values last.

    Yields:
        the option; the rest of the name (`init_args.delta`; `+` for an addition to a list; empty); the value.
    """
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        if name == "--config":
            recipe = load_yaml(value) if value.startswith("{") else read_yaml(Path(value))  # see outside_code.py
            for option in BASES:
                if (section := value_at(recipe, option)) is not None:
                    yield option, "", section
        for option in BASES:
            rest = name.removeprefix(f"--{option}")
            if rest in ("", "+") or (rest != name and rest.startswith(".")):
                yield option, rest.removeprefix("."), load_yaml(value) if value[:1] in ("[", "{") else value


def update(specs: dict[str, list[ClassSpec]], option: str, path: str, value: Any) -> None:
    """Apply a value of :func:`given_values` to the classes that were given before."""
    base, before = BASES[option], specs.get(option, [])
    if isinstance(value, str) and path in ("", "+") and value.endswith((".yaml", ".yml")) and Path(value).is_file():
        value = read_yaml(Path(value))
    if path == "+":
        spec = ClassSpec(f"{option}[{len(before)}]", base)
        spec.update(value)
        specs[option] = [*before, spec]
    elif path:
        spec = before[-1] if before else ClassSpec(option, base)
        fields, *rest = path.split(".")
        names = [fields, *rest] if fields in SPEC_FIELDS else ["init_args", fields, *rest]
        for name in reversed(names):
            value = {name: value}
        spec.update(value)
        specs[option] = [*before[:-1], spec]
    elif isinstance(value, list):
        specs[option] = [ClassSpec(f"{option}[{number}]", base) for number in range(len(value))]
        for spec, item in zip(specs[option], value, strict=True):
            spec.update(item)
    elif value in (None, "", "null", "true", "false", True, False) or (isinstance(value, str) and option in NAMED):
        specs[option] = []
    else:
        spec = before[0] if len(before) == 1 and "[" not in before[0].option else ClassSpec(option, base)
        spec.update(value)
        specs[option] = [spec]


def resolve_class(path: Any, option: str, base: type) -> type:
    """Return the class at an import path, or the imported subclass of this name.

    Raises:
        InputError: there is none, it is not a subclass of `base`, or it is abstract.
    """
    if not isinstance(path, str):
        raise InputError(f"{option} is {path!r}; it must be the import path of a {base.__name__} subclass.")
    known = {kind.__name__: kind for kind in subclasses(base) if not inspect.isabstract(kind)}
    if path not in known and not is_import_path(path):
        advice = f": give the import path (package.module.name) of a subclass of {base.__name__}"
        cure = did_you_mean(path, known) or advice
        raise InputError(f"{option} '{path}' is not known{cure}.")
    return resolve(path, known, option, base)


def subclasses(base: type) -> list[type]:
    """Return a class and all its imported subclasses."""
    direct: list[type] = base.__subclasses__()
    return [base, *(kind for subclass in direct for kind in subclasses(subclass))]


def argument_names(kind: type) -> list[str]:
    """Return the names of a constructor's arguments, with those that it passes to its base class."""
    return list(dict.fromkeys(name.split(".")[1] for name in nested_names(kind, "of")))


def nested_names(kind: type, group: str) -> list[str]:
    """Return the names of a constructor's arguments in a group, and those of the fields of records among them."""
    parser = OptionParser()
    parser.add_class_arguments(kind, group, fail_untyped=False)
    return [action.dest for action in parser._actions if action.dest.startswith(f"{group}.")]


def has_interpolation(value: Any) -> bool:
    """Return whether a value contains `${...}`, which is resolved after all files are read."""
    return "${" in str(value)


def merge(settings: dict[str, Any], later: Mapping[str, Any]) -> None:
    """Update nested settings by later ones, in place."""
    for name, value in later.items():
        if isinstance(value, Mapping) and isinstance(settings.get(name), dict):
            merge(settings[name], value)
        else:
            settings[name] = dict(value) if isinstance(value, Mapping) else value
