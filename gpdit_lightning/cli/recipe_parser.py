"""The parser of training recipes: Lightning's, with errors in one sentence."""

import dataclasses
from typing import Any, NoReturn

from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from gpdit_lightning.cli import VERBS, record_of
from gpdit_lightning.cli.checked_files import FileCheckingParser
from gpdit_lightning.cli.messages import is_offered, one_sentence
from gpdit_lightning.cli.parsing import option_names
from gpdit_lightning.diffusion import NoiseSchedule
from gpdit_lightning.errors import InputError
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

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise InputError instead of printing the usage."""
        known = [action.dest for action in self._actions if is_offered(action)] + self.verb_options
        known += [
            f"model.init_args.{name}.{f.name}"
            for name, options in NESTED_OPTIONS.items()
            for f in dataclasses.fields(options)
        ]
        raise InputError(one_sentence(message, known))
