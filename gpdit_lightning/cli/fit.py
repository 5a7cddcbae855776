"""`fit`, `validate` and `test`: a LightningCLI over recipes, with a run folder that resumes by itself."""

import dataclasses
import difflib
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import omegaconf
from jsonargparse import set_parsing_settings
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from gpdit_lightning.data.datamodule import LatentDataModule
from gpdit_lightning.diffusion import NoiseSchedule
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import written_whole
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.stages import GPDiTStage
from gpdit_lightning.training.checkpoints import RunCheckpoint, last_checkpoint, read_checkpoint
from gpdit_lightning.training.curves import Curves
from gpdit_lightning.training.ema import EMA
from gpdit_lightning.training.health import Health
from gpdit_lightning.training.optimizer import OptimizerConfig
from gpdit_lightning.training.progress import StepProgress

# Every field's docstring becomes its help.
set_parsing_settings(docstring_parse_attribute_docstrings=True)


PREFIX = "the recipe or the command line cannot be used: "
NESTED_OPTIONS = {"backbone": GPDiTConfig, "schedule": NoiseSchedule, "optimizer": OptimizerConfig}


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


class SaveRecipe(Callback):
    """Writes the recipe as resolved to the run folder, once training has accepted it.

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


class RecipeCLI(LightningCLI):
    """LightningCLI whose trainer writes into a run folder and accumulates as the data's plan says."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run folder and the two callbacks that recipes configure."""
        parser.add_argument("--run_dir", type=str, default="runs/default", help="Folder that holds all the run leaves.")
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")

    def instantiate_trainer(self, **_: Any) -> Trainer:
        """The recipe's trainer, with the run folder's logger and the callbacks that every run has."""
        run_dir = Path(self.config_init["run_dir"])
        settings = dict(self.config_init["trainer"])
        if settings["accumulate_grad_batches"] not in (1, self.datamodule.micro_batches_per_step):
            raise InputError(
                f"trainer.accumulate_grad_batches is {settings['accumulate_grad_batches']}, but the data's plan has "
                f"{self.datamodule.micro_batches_per_step} micro-batches in an optimizer step: leave it out and set "
                "data.images.micro_batches or data.videos.micro_batches."
            )
        resumed = last_checkpoint(run_dir)
        step = read_checkpoint(resumed)["global_step"] if resumed else 0
        health = Health()
        settings |= {
            "accumulate_grad_batches": self.datamodule.micro_batches_per_step,
            "default_root_dir": str(run_dir),
            # What a killed run logged after its last checkpoint is drawn again: purge it.
            "logger": TensorBoardLogger(run_dir, name="", version="tensorboard", purge_step=step + 1 if step else None)
            if settings["logger"] is not False
            else False,
            "enable_checkpointing": True,
            "callbacks": [
                health,
                self.config_init["ema"],
                Curves(health, settings["log_every_n_steps"], self.model.config.patch_size),
                self.config_init["checkpoint"],
                SaveRecipe(self.parser.dump(self.config, skip_none=False)),
                *([StepProgress()] if settings["enable_progress_bar"] is not False else []),
                *(settings["callbacks"] or []),
            ],
        }
        return self.trainer_class(**settings)


TRAINER_DEFAULTS: dict[str, Any] = {
    "max_steps": 1000,
    "log_every_n_steps": 50,
    "check_val_every_n_epoch": None,  # val_check_interval counts micro-batches of the whole run
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,  # the plan gives each rank its share
}


def build(verb: str, arguments: Sequence[str]) -> RecipeCLI:
    """Parse a recipe and build model, data and trainer.

    Raises:
        InputError: a recipe that cannot be used.
    """
    # An epoch is the whole run here, so Lightning's advice on resuming inside one does not apply.
    warnings.filterwarnings("ignore", message=".*resuming from a checkpoint that ended before the epoch ended.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")  # Lightning's own business with torch
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # what is logged is reduced already
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python.*")
    try:
        return RecipeCLI(
            GPDiTStage,
            LatentDataModule,
            subclass_mode_model=True,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults=TRAINER_DEFAULTS,
            parser_class=RecipeParser,
            parser_kwargs={"parser_mode": "omegaconf", "prog": f"python -m gpdit_lightning {verb}"},
            args=list(arguments),
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
    except omegaconf.errors.OmegaConfBaseException as error:
        raise InputError(f"an interpolation in the recipe leads nowhere: {str(error).splitlines()[0]}") from None
    except ValueError as error:  # a value that its class refuses, wrapped by jsonargparse
        if isinstance(error, InputError) or "Does not validate" not in str(error):
            raise
        raise InputError(PREFIX + essence(str(error))) from None


def run(verb: str, arguments: Sequence[str]) -> None:
    """Train, or evaluate a run's last checkpoint."""
    cli = build(verb, arguments)
    resumed = last_checkpoint(Path(cli.trainer.default_root_dir))
    if resumed is not None:
        cli.model.initial_weights = ""  # the run has weights of its own; the old ones may be gone
    if verb == "fit":
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=resumed, weights_only=True)
        if cli.trainer.is_global_zero:
            print(f"finished at step {cli.trainer.global_step}: {cli.trainer.default_root_dir}/checkpoints/last.ckpt")
        return
    if resumed is None:
        raise InputError(
            f"{cli.trainer.default_root_dir} holds no checkpoint to {verb}: `fit` first, or give --run_dir."
        )
    cli.trainer.loggers = []  # the curves belong to the training; the figures are printed
    getattr(cli.trainer, verb)(cli.model, cli.datamodule, ckpt_path=resumed, weights_only=True, verbose=False)
    for name, value in sorted(cli.trainer.callback_metrics.items()):
        print(f"{name:<20}{float(value):.5f}")
