"""The LightningCLI of training recipes: from their options to model, data and trainer."""

import logging
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gpdit_lightning.checkpoints.files import last_checkpoint
from gpdit_lightning.cli.bounded_yaml import PARSER_MODE
from gpdit_lightning.cli.class_errors import check_classes, check_constructors
from gpdit_lightning.cli.guarded_imports import imports_of
from gpdit_lightning.cli.messages import PREFIX, relevant_part
from gpdit_lightning.cli.outside_code import outside_classes, without_options
from gpdit_lightning.cli.recipe_files import read_yaml, with_bases, without_earlier_manifests
from gpdit_lightning.cli.saved_recipe import SaveRecipe
from gpdit_lightning.cli.trainer_settings import (
    FIXED,
    TrainingParser,
    callbacks_of,
    check_interval,
    check_precision,
    check_repeated,
    check_trainer,
    logger_specs,
    loggers_of,
    strategy_of,
)
from gpdit_lightning.data.batches import check_ranks
from gpdit_lightning.data.datamodule import LatentDataModule
from gpdit_lightning.errors import InputError
from gpdit_lightning.imports import import_object
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.stages import GPDiTStage
from gpdit_lightning.stages.initial_weights import check_kind
from gpdit_lightning.training.callbacks.ema import EMA
from gpdit_lightning.training.callbacks.health import Health
from gpdit_lightning.training.callbacks.metrics import MetricsLogger
from gpdit_lightning.training.callbacks.previews import Preview
from gpdit_lightning.training.callbacks.progress import StepProgress
from gpdit_lightning.training.callbacks.run_checkpoint import RunCheckpoint
from gpdit_lightning.training.callbacks.scores import Scores
from gpdit_lightning.training.callbacks.stalls import StallWatch

log = logging.getLogger(__name__)

NEVER = 2**40  # optimizer steps
WHERE_CODE_IS_NAMED = (
    "remove it, or give it as class_path of the model, or of a callback, logger, profiler, strategy, plugin or "
    "accelerator"
)

# Warnings that do not apply to the runs of this library.
IGNORED_WARNINGS = (
    ".*resuming from a checkpoint that ended before the epoch ended.*",  # an epoch is the whole run
    ".*does not have many workers.*",
    ".*You have overridden `on_before_batch_transfer`.*",  # in the stage of classification, as intended
    ".*smaller than the logging interval.*",
    ".*across ranks is zero.*",  # the data may have no held-out samples
    "(?s).*Dump of a value that does not round-trip.*",
    ".*treespec, LeafSpec.*",  # concerns Lightning's use of torch
    ".*sync_dist=True.*",  # logged values are already reduced over ranks
    "LightningCLI's args parameter is intended to run from within Python.*",
)


# Messages of Lightning that are not shown: advertisements, absent accelerators, the seed at every reading of a recipe,
# the interval of the recipe in Lightning's words, and the end of the training, which `fit` prints with the checkpoint.
HIDDEN_MESSAGES = (
    "litlogger",
    "GPU available: False",
    "TPU available: False",
    "Seed set to",
    "`Trainer(val_check_interval=1)` was configured",
    "`Trainer.fit` stopped: `max_steps",
)


# Fields of files that are no recipes of `fit`; what such a file is, and what to do with it.
RECIPES_OF_OTHER_VERBS = {
    "stages": "a chain of stages: give it to `chain` as the first --config, or give one of its recipes here",
    "arms": "an ablation with several arms: give it to `ablate`",
}


def patch_size_of(model: Any) -> int:
    """Return the patch size of a stage's backbone; the default if the stage has no such option, or an invalid one."""
    size = getattr(model, "init_args", Namespace()).get("backbone.patch_size")
    return size if isinstance(size, int) else GPDiTConfig().patch_size


def block_frames_of(model: Any) -> tuple[int, int]:
    """Return `GPDiTConfig.block_frames` of a stage's backbone; the default if it has no such options, or invalid ones.

    The construction of the backbone refuses invalid ones.
    """
    options = getattr(model, "init_args", Namespace())
    fields = {name: options.get(f"backbone.{name}") for name in ("block_shape", "first_block_frames")}
    try:
        return GPDiTConfig(**{name: value for name, value in fields.items() if value is not None}).block_frames
    except InputError:
        return GPDiTConfig().block_frames


def sources_of_stage(model: Any) -> list[str]:
    """Return the sources on which a stage trains; empty: any."""
    path = getattr(model, "class_path", None)
    return list(getattr(import_object(path, "model"), "SOURCES", ())) if path else []


def as_list(value: str | list[str] | None) -> list[str]:
    """Return the folders of `data_dir` as a list."""
    return [value] if isinstance(value, str) and value else list(value or ())


class RecipeCLI(LightningCLI):
    """LightningCLI whose trainer writes to a run folder and accumulates gradients according to the batch plan."""

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the trainer (without those that a run fixes), the stage and the data."""
        assert isinstance(parser, TrainingParser)
        parser.add_trainer_options()
        parser.add_lightning_class_args(GPDiTStage, "model", subclass_mode=True)
        parser.add_lightning_class_args(LatentDataModule, "data")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the folders, the validation interval, and the callbacks that recipes configure."""
        parser.add_argument("--base", type=str | list[str], default=[], help="Recipes that this one builds on.")
        parser.add_argument("--runs", type=str, default="runs", help="Folder of all runs, as ${runs} in recipes.")
        parser.add_argument("--latents", type=str, default="latents", help="Folder of all latents, as ${latents}.")
        parser.add_argument(
            "--data_dir",
            type=list[str] | None | str,
            default=None,
            help="Folder of `prepare` or `prepare-pairs`, or several: data of every source that the stage uses. "
            "Replaces the manifests of earlier recipes.",
        )
        parser.add_argument(
            "--run_dir", type=str, default="${runs}/default", help="Folder that this run writes everything to."
        )
        parser.add_argument(
            "--validate_every_steps", type=int, default=0, help="Optimizer steps between validations; 0: none."
        )
        parser.add_lightning_class_args(Health, "health")
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(Preview, "preview")
        parser.add_lightning_class_args(Scores, "scores")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.link_arguments("model", "data.patch_size", compute_fn=patch_size_of)
        parser.link_arguments("model", "data.block_frames", compute_fn=block_frames_of)
        for name in ("codec", "codec_source"):
            parser.link_arguments(f"preview.{name}", f"scores.{name}")
        parser.link_arguments("model", "data.stage_sources", compute_fn=sources_of_stage)
        parser.link_arguments("data_dir", "data.data_dir", compute_fn=as_list)

    def instantiate_classes(self) -> None:
        """Construct the classes of the recipe.

        Raises:
            InputError: the arguments of one are invalid.
        """
        try:
            super().instantiate_classes()
        except (ValueError, ImportError) as error:
            if not isinstance(error, InputError):
                check_constructors(self.config)
            raise

    def instantiate_trainer(self, **_: Any) -> Trainer:
        """Construct the recipe's trainer, with the run folder and the callbacks of every run."""
        given, run_dir = dict(self.config_init["trainer"]), Path(self.config_init["run_dir"])
        check_trainer(given, self.datamodule.plan.max_ranks)
        validate_every_steps = self.config_init["validate_every_steps"]
        check_interval("validate_every_steps", validate_every_steps, least=0)
        check_interval("trainer.log_every_n_steps", given["log_every_n_steps"], least=1)
        strategy = strategy_of(given["strategy"])
        per_step = self.datamodule.micro_batches_per_step
        settings = given | {
            **{name: value for name, (value, _) in FIXED.items()},
            "accumulate_grad_batches": per_step,
            "callbacks": self._callbacks(given),
            "default_root_dir": str(run_dir),
            "logger": loggers_of(given["logger"], run_dir),
            "strategy": strategy,
            "val_check_interval": (validate_every_steps or NEVER) * per_step,  # Lightning counts micro-batches
        }
        try:
            trainer = Trainer(**settings)
            check_precision(given["precision"], trainer.strategy.root_device)
            check_ranks(trainer.world_size, self.datamodule.plan.max_ranks)  # before the ranks are launched
            return trainer
        except (ValueError, TypeError, MisconfigurationException) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the trainer cannot be set up with these settings: {_on_one_line(error)}") from None
        except RuntimeError as error:
            if "SLURM" in str(error):  # tasks of a job, of which Lightning requires other numbers
                raise InputError(f"the trainer cannot be set up in this job: {_on_one_line(error)}") from None
            repeated = re.search(r"more than one stateful callback of type `(\w+)`", str(error))
            if not repeated:
                raise
            raise InputError(
                f"trainer.callbacks has several callbacks of the class {repeated[1]}, whose states have one name in "
                "checkpoints: override its property `state_key`, such that it depends on the arguments."
            ) from None

    def _callbacks(self, given: dict[str, Any]) -> list[Callback]:
        """Return the callbacks of a run in their order; Lightning moves checkpoint callbacks to the end.

        Args:
            given: the trainer's settings in the recipe.
        """
        health, ema, scores = (self.config_init[name] for name in ("health", "ema", "scores"))
        from_recipe = callbacks_of(given["callbacks"])
        shows_progress = given["enable_progress_bar"] is not False
        has_progress_bar = any(isinstance(callback, ProgressBar) for callback in from_recipe)
        of_library = [
            StallWatch(health.stall_minutes),
            health,
            ema,
            MetricsLogger(health, ema, self.model.config, given["log_every_n_steps"], scores.every_steps > 0),
            self.config_init["preview"],
            scores,
            self.config_init["checkpoint"],
            SaveRecipe(self.recipe_text()),
        ]
        check_repeated(from_recipe, of_library)
        return [
            *of_library,
            *([StepProgress()] if shows_progress and not has_progress_bar else []),
            *from_recipe,
        ]

    def recipe_text(self) -> str:
        """Return the resolved recipe as YAML: it needs no other file and can be used with another `--run_dir`."""
        recipe = self.config.clone()
        recipe.base = []  # already merged
        for spec in logger_specs(recipe.trainer.logger):
            save_dir = str(spec.init_args.get("save_dir") if spec.get("init_args") else "")
            if Path(save_dir).is_relative_to(recipe.run_dir):
                spec.init_args.save_dir = "${run_dir}" + save_dir.removeprefix(recipe.run_dir)
        return self.parser.dump(recipe, skip_none=False, skip_validation=True)


class ParsedRecipe(RecipeCLI):
    """Parses and checks a recipe, and constructs nothing from it."""

    def instantiate_classes(self) -> None:
        """Construct nothing."""


class ParserOnly(RecipeCLI):
    """Builds the parser of recipes, and parses nothing."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Leave the configuration empty."""
        self.config = Namespace(seed_everything=False)

    def instantiate_classes(self) -> None:
        """Construct nothing."""


def recipe_parser() -> LightningArgumentParser:
    """Return the parser of recipes, from which their help is made."""
    return _command_line(ParserOnly, "fit", []).parser


def parse_recipe(verb: str, arguments: Sequence[str]) -> Namespace:
    """Return a resolved recipe.

    Args:
        verb: the name of the command, for messages.
        arguments: the command line after the verb.

    Raises:
        InputError: the recipe is invalid.
    """
    return _command_line(ParsedRecipe, verb, arguments).config


def recipe_text(verb: str, arguments: Sequence[str]) -> str:
    """Return a resolved recipe as the YAML that a run saves; arguments and errors as in :func:`parse_recipe`."""
    return _command_line(ParsedRecipe, verb, arguments).recipe_text()


def build_recipe(verb: str, arguments: Sequence[str]) -> RecipeCLI:
    """Construct a recipe's model, data and trainer; arguments and errors as in :func:`parse_recipe`."""
    return _command_line(RecipeCLI, verb, arguments)


def find_resumed(cli: RecipeCLI) -> Path | None:
    """Find and verify the checkpoint from which a run resumes; None for a new run.

    A process that trains holds the lock of the run folder, so that no other one replaces the checkpoint meanwhile.

    Raises:
        InputError: as :func:`last_checkpoint`, or the initial weights are a pipe or a device.
    """
    resumed = last_checkpoint(Path(cli.trainer.default_root_dir), verify=True)
    if resumed is not None and cli.model.initial_weights:
        check_kind(cli.model.initial_weights)
        cli.model.initial_weights = None  # replaced by the checkpoint's; their file may have been removed
    return resumed


def _command_line(kind: type[RecipeCLI], verb: str, arguments: Sequence[str]) -> RecipeCLI:
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_is_shown)
    words = without_earlier_manifests(with_bases(arguments))
    if outside := outside_classes(words):
        with imports_of({}, WHERE_CODE_IS_NAMED):
            _parse(ParsedRecipe, verb, without_options(words, outside))
    with imports_of(outside, WHERE_CODE_IS_NAMED):
        return _parse(kind, verb, words)


def _parse(kind: type[RecipeCLI], verb: str, arguments: Sequence[str]) -> RecipeCLI:
    """Parse the arguments of `fit`, with the bases of recipes, by a LightningCLI of some class."""
    try:
        return kind(
            GPDiTStage,
            LatentDataModule,
            subclass_mode_model=True,
            save_config_callback=None,
            seed_everything_default=0,
            parser_class=TrainingParser,
            parser_kwargs={"parser_mode": PARSER_MODE, "prog": f"python -m gpdit_lightning {verb}"},
            args=list(arguments),
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
    except InputError as error:
        for field, cure in RECIPES_OF_OTHER_VERBS.items():
            if re.search(rf"Option '{field}\b", str(error)):
                words = [word.partition("=") for word in arguments]
                files = [Path(value) for name, _, value in words if name == "--config" and not value.startswith("{")]
                named = next((path for path in files if field in read_yaml(path)), "the recipe")
                raise InputError(f"{named} is {cure}.") from None
        if PREFIX in str(error):
            check_classes(arguments)
        raise
    except ModuleNotFoundError as error:  # a logger whose package is optional
        raise InputError(f"a class in the recipe needs a missing package: {_on_one_line(error)}") from None
    except ValueError as error:  # from the constructor of a class in the recipe, wrapped by jsonargparse
        if isinstance(error, InputError) or "Does not validate" not in str(error):
            raise
        raise InputError(PREFIX + relevant_part(str(error))) from None


def _is_shown(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in HIDDEN_MESSAGES)


def _on_one_line(error: Exception) -> str:
    return re.sub(r"<(?:class ')?([\w.]+)(?:'| object at 0x\w+)>", r"\1", " ".join(str(error).split()))
