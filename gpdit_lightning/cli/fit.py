"""`fit`, `validate` and `test`: a LightningCLI over recipes, with a run folder that resumes by itself."""

import inspect
import logging
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import omegaconf
from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gpdit_lightning.checkpoints.files import last_checkpoint, open_checkpoint
from gpdit_lightning.cli.messages import PREFIX, relevant_part
from gpdit_lightning.cli.recipe_files import with_bases
from gpdit_lightning.cli.recipe_parser import RecipeParser
from gpdit_lightning.data.datamodule import LatentDataModule
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import held_by_one_process, written_whole
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.stages import GPDiTStage
from gpdit_lightning.training.callbacks.ema import EMA
from gpdit_lightning.training.callbacks.health import Health
from gpdit_lightning.training.callbacks.metrics import MetricsLogger
from gpdit_lightning.training.callbacks.previews import Preview
from gpdit_lightning.training.callbacks.progress import StepProgress
from gpdit_lightning.training.callbacks.run_checkpoint import RunCheckpoint
from gpdit_lightning.training.callbacks.stopping import end_ranks_together
from gpdit_lightning.training.strategies import LIGHTNING_NAMES, register_strategies

log = logging.getLogger(__name__)


class SaveRecipe(Callback):
    """Writes the recipe as resolved to the run folder, once training has accepted it, and says what trains.

    Args:
        text: the YAML.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Everything is restored and checked by now."""
        if trainer.is_global_zero:
            with written_whole(Path(trainer.default_root_dir) / "config.yaml") as path:
                path.write_text(self.text, encoding="utf-8")
            parameters = sum(parameter.numel() for parameter in pl_module.parameters())
            log.info("%s trains %.1fM parameters", type(pl_module).__name__, parameters / 1e6)
            if trainer.world_size > 1:
                log.info(
                    "%d ranks train; rank 0 alone writes checkpoints, curves and previews, to %s",
                    trainer.world_size,
                    trainer.default_root_dir,
                )


def patch_size_of(model: Any) -> int:
    """The patch size of a stage's backbone, from its options; the default where a stage has no such option."""
    options = getattr(model, "init_args", Namespace())
    return int(options.get("backbone.patch_size", GPDiTConfig().patch_size))


class RecipeCLI(LightningCLI):
    """LightningCLI whose trainer writes into a run folder and accumulates as the data's plan says."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Where things lie, when to validate, and the callbacks that recipes configure."""
        parser.add_argument("--base", type=str | list[str], default=[], help="Recipes that this one builds on.")
        parser.add_argument("--runs", type=str, default="runs", help="Folder of all runs, as ${runs} in recipes.")
        parser.add_argument("--latents", type=str, default="latents", help="Folder of all latents, as ${latents}.")
        parser.add_argument(
            "--run_dir", type=str, default="${runs}/default", help="Folder for all that this run leaves."
        )
        parser.add_argument(
            "--validate_every_steps", type=int, default=0, help="Optimizer steps between validations; 0 for none."
        )
        parser.add_lightning_class_args(Health, "health")
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(Preview, "preview")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.link_arguments("model", "data.patch_size", compute_fn=patch_size_of)

    def instantiate_trainer(self, **_: Any) -> Trainer:
        """The recipe's trainer, with the run folder's logger and the callbacks that every run has."""
        register_strategies()
        run_dir = Path(self.config_init["run_dir"])
        settings = dict(self.config_init["trainer"])
        if settings["accumulate_grad_batches"] not in (1, self.datamodule.micro_batches_per_step):
            raise InputError(
                f"trainer.accumulate_grad_batches is {settings['accumulate_grad_batches']}, but the data's plan has "
                f"{self.datamodule.micro_batches_per_step} micro-batches in an optimizer step: leave it out and set "
                "data.images.micro_batches or data.videos.micro_batches."
            )
        for name, instead in REPLACED.items():
            if settings[name] != TRAINER_DEFAULTS.get(name, DEFAULTS_OF_LIGHTNING[name].default):
                raise InputError(f"trainer.{name} is {settings[name]}, which recipes leave alone: {instead}.")
        for name, value, least in (
            ("validate_every_steps", self.config_init["validate_every_steps"], 0),
            ("trainer.log_every_n_steps", settings["log_every_n_steps"], 1),
        ):
            if value is None or value < least:
                raise InputError(f"{name} is {value}: give a number of optimizer steps, at least {least}.")
        strategy = settings["strategy"]
        if isinstance(strategy, str) and strategy.startswith("deepspeed"):
            if strategy not in LIGHTNING_NAMES:
                raise InputError(f"trainer.strategy is {strategy}: take one of {', '.join(LIGHTNING_NAMES)}.")
            settings["strategy"] = LIGHTNING_NAMES[strategy]
        self.resumed = last_checkpoint(run_dir, verify=True)
        step = open_checkpoint(self.resumed).step if self.resumed else 0
        health, ema = self.config_init["health"], self.config_init["ema"]
        recipe = self.config.clone()
        recipe.base = []  # they are in it already, and do not lie beside the copy
        # Lightning counts micro-batches here, and knows no "never".
        every = self.config_init["validate_every_steps"] or NEVER
        settings |= {
            "val_check_interval": every * self.datamodule.micro_batches_per_step,
            "accumulate_grad_batches": self.datamodule.micro_batches_per_step,
            "default_root_dir": str(run_dir),
            # What a killed run logged after its last checkpoint is drawn again: purge it.
            "logger": TensorBoardLogger(run_dir, name="", version="tensorboard", purge_step=step + 1)
            if settings["logger"] is not False
            else False,
            "enable_checkpointing": True,
            "callbacks": [
                health,
                ema,
                MetricsLogger(health, ema, self.model.config, settings["log_every_n_steps"]),
                self.config_init["preview"],
                self.config_init["checkpoint"],  # after all that a checkpoint of this step must include
                SaveRecipe(self.parser.dump(recipe, skip_none=False)),
                *([StepProgress()] if settings["enable_progress_bar"] is not False else []),
                *(settings["callbacks"] or []),
            ],
        }
        try:
            return self.trainer_class(**settings)
        except (ValueError, TypeError, MisconfigurationException) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the trainer cannot be set up as asked: {' '.join(str(error).split())}") from None


# Settings of Lightning's trainer that would work against the batch plan or the run folder, and what to use instead.
REPLACED = {
    "val_check_interval": "set validate_every_steps, in optimizer steps",
    "limit_train_batches": "a step has all batches of its plan; set trainer.max_steps",
    "overfit_batches": "see recipes/debug/overfit_one_clip.yaml",
    "default_root_dir": "set run_dir",
    "enable_checkpointing": "set checkpoint.every_steps",
    "max_epochs": "set trainer.max_steps",
    "barebones": "leave it out",
    "fast_dev_run": "set trainer.max_steps and a run_dir of its own",
}
DEFAULTS_OF_LIGHTNING = inspect.signature(Trainer).parameters
NEVER = 2**40  # optimizer steps
LOCK = ".lock"
TRAINER_DEFAULTS: dict[str, Any] = {
    "max_steps": 1000,
    "log_every_n_steps": 50,
    "check_val_every_n_epoch": None,  # one epoch is the whole run
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,  # its count of FLOPs does not know this model
    "use_distributed_sampler": False,  # the plan gives each rank its share
}


class ParsedRecipe(RecipeCLI):
    """A recipe that is read and checked, and nothing built from it."""

    def instantiate_classes(self) -> None:
        """Build nothing."""


def parse(verb: str, arguments: Sequence[str]) -> Namespace:
    """A recipe as resolved.

    Raises:
        InputError: a recipe that cannot be used.
    """
    return _read(ParsedRecipe, verb, arguments).config


def build(verb: str, arguments: Sequence[str]) -> RecipeCLI:
    """A recipe with its model, data and trainer.

    Raises:
        InputError: a recipe that cannot be used.
    """
    return _read(RecipeCLI, verb, arguments)


def _read(kind: type[RecipeCLI], verb: str, arguments: Sequence[str]) -> RecipeCLI:
    # An epoch is the whole run here, so Lightning's advice on resuming inside one does not apply.
    warnings.filterwarnings("ignore", message=".*resuming from a checkpoint that ended before the epoch ended.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*across ranks is zero.*")  # there may be nothing to validate on
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")  # Lightning's own business with torch
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # what is logged is reduced already
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python.*")
    try:
        return kind(
            GPDiTStage,
            LatentDataModule,
            subclass_mode_model=True,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults=TRAINER_DEFAULTS,
            parser_class=RecipeParser,
            parser_kwargs={"parser_mode": "omegaconf+", "prog": f"python -m gpdit_lightning {verb}"},
            args=with_bases(arguments),
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
    except omegaconf.errors.OmegaConfBaseException as error:
        raise InputError(f"an interpolation in the recipe leads nowhere: {str(error).splitlines()[0]}") from None
    except ValueError as error:  # a value that its class refuses, wrapped by jsonargparse
        if isinstance(error, InputError) or "Does not validate" not in str(error):
            raise
        raise InputError(PREFIX + relevant_part(str(error))) from None


@contextmanager
def alone_in_its_folder(trainer: Trainer) -> Iterator[None]:
    """Let no two runs write to one folder; raises `InputError` if another process trains there."""
    with ExitStack() as stack:
        if trainer.is_global_zero:
            try:
                stack.enter_context(held_by_one_process(Path(trainer.default_root_dir) / LOCK))
            except BlockingIOError:
                raise InputError(
                    f"another process trains in {trainer.default_root_dir}: wait for it or stop it, or give another "
                    "--run_dir."
                ) from None
            except OSError:
                pass  # a folder that cannot be written: the checkpoints will say so, to all ranks
        yield


@contextmanager
def failures_of_files_told(trainer: Trainer) -> Iterator[None]:
    """Say of a file of the run that could not be written what is left; raises `InputError` instead of `OSError`."""
    told = threading.excepthook

    def tell(failure: threading.ExceptHookArgs) -> None:
        # TensorBoard writes in a thread; what fails there is raised again where the next curve is logged.
        if not issubclass(failure.exc_type, OSError):
            told(failure)

    threading.excepthook = tell
    try:
        yield
    except OSError as error:
        run_dir = Path(trainer.default_root_dir)
        last = last_checkpoint(run_dir)
        kept = f"{last.name} is whole and the same command goes on from it" if last else "there is no checkpoint yet"
        raise InputError(
            f"{error.filename or f'a file in {run_dir}'} could not be written or read ({error.strerror or error}): see "
            f"that it is there, with room and permission to write; {kept}."
        ) from None
    finally:
        threading.excepthook = told


def run(verb: str, arguments: Sequence[str]) -> Trainer:
    """Train, or evaluate a run's last checkpoint; returns the trainer that did."""
    cli = build(verb, arguments)
    resumed = cli.resumed
    if resumed is not None:
        cli.model.initial_weights = ""  # the run has weights of its own; the old ones may be gone
    if verb == "fit":
        with alone_in_its_folder(cli.trainer), end_ranks_together(cli.trainer), failures_of_files_told(cli.trainer):
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=resumed, weights_only=True)
        if cli.trainer.is_global_zero:
            step, folder = cli.trainer.global_step, f"{cli.trainer.default_root_dir}/checkpoints"
            nothing_done = resumed is not None and resumed.name == f"step-{step}.ckpt"
            print(f"finished at step {step}{' before: nothing was left to do' * nothing_done}: {folder}/last.ckpt")
        return cli.trainer
    if resumed is None:
        raise InputError(
            f"{cli.trainer.default_root_dir} holds no checkpoint to {verb}: `fit` first, or give --run_dir."
        )
    cli.trainer.loggers = []  # the curves belong to the training; the figures are printed
    getattr(cli.trainer, verb)(cli.model, cli.datamodule, ckpt_path=resumed, weights_only=True, verbose=False)
    if cli.trainer.is_global_zero:  # the figures are those of all ranks
        for name, value in sorted(cli.trainer.callback_metrics.items()):
            print(f"{name:<20}{float(value):.5f}")
    return cli.trainer
