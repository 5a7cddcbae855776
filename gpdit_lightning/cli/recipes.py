"""Recipes: YAML files that build on one another, and a parser that complains in one sentence."""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from gpdit_lightning.diffusion import NoiseSchedule
from gpdit_lightning.errors import InputError
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.training.optimizer import OptimizerConfig

# Every field's docstring becomes its help.
set_parsing_settings(docstring_parse_attribute_docstrings=True)

PREFIX = "the recipe or the command line cannot be used: "
NESTED_OPTIONS = {"backbone": GPDiTConfig, "schedule": NoiseSchedule, "optimizer": OptimizerConfig}


def with_bases(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments in which every `--config FILE` is preceded by the recipes that FILE names as its `base`.

    Later files override earlier ones field by field, so a recipe holds only what is its own.

    Raises:
        InputError: a base that is not there, or recipes that are each other's base.
    """
    expanded: list[str] = []
    given = iter(arguments)
    for argument in given:
        name, equals, value = argument.partition("=")
        if name not in ("--config", "-c"):
            expanded.append(argument)
            continue
        path = Path(value if equals else next(given, ""))
        expanded += [f"--config={part}" for part in _chain_of_bases(path, ())]
    return expanded


def _chain_of_bases(path: Path, above: tuple[Path, ...]) -> list[Path]:
    if path in above:
        raise InputError(f"{path} is its own base: remove it from the `base` of {above[-1]}.")
    bases = read_yaml(path, needed_by=above[-1] if above else None).get("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise InputError(f"the `base` of {path} is {bases!r}: name a recipe, or a list of them.")
    chain = []
    for base in bases:
        chain += _chain_of_bases(path.parent / base, (*above, path))
    return [*chain, path]


def read_yaml(path: Path, needed_by: Path | None = None) -> dict[str, Any]:
    """The fields of a YAML file.

    Raises:
        InputError: missing, no YAML, or no fields in it.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        source = f" (the base of {needed_by})" if needed_by else ""
        raise InputError(f"{path}{source} cannot be read ({error.strerror}): give a recipe that is there.") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no YAML ({' '.join(str(error).split())}): mend it.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no fields: a recipe has lines like `run_dir: runs/mine`.")
    return content


class RecipeParser(LightningArgumentParser):
    """A parser whose complaints are one sentence, with the nearest option that exists."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise InputError instead of printing the usage."""
        sentence = essence(message)
        if PREFIX in message:  # a parser of one part has said it already
            raise InputError(PREFIX + sentence)
        unknown = re.search(r"unrecognized arguments: -*([\w.]+)|ption '([\w.]+)'", sentence)
        if unknown:
            group = re.search(r"Group '([\w.]+)'", sentence)
            key = (f"{group[1]}." if group else "") + (unknown[1] or unknown[2])
            known = [action.dest for action in self._actions]
            known += [
                f"{name}.{f.name}" for name, options in NESTED_OPTIONS.items() for f in dataclasses.fields(options)
            ]
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            sentence += f"; did you mean '{nearest[0]}'?" if nearest else ": see --help for those there are."
        raise InputError(PREFIX + sentence)


def essence(message: str) -> str:
    """The part of a jsonargparse message that a person needs.

    For a model it lists a complaint for every type that the value might have been; the first that is not about None is
    the one about the model itself.
    """
    complaints = [line.strip()[2:] for line in message.splitlines() if line.strip().startswith("- ")]
    relevant = [line for line in complaints if "NoneType" not in line]
    sentence = " ".join((relevant[0] if relevant else message).split("Given value")[0].split())
    return sentence.replace(PREFIX, "")
