"""`fit`, `validate` and `test`: a LightningCLI over recipes, with a run folder that resumes by itself."""

import difflib
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import omegaconf
from jsonargparse import set_parsing_settings
from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from gpdit_lightning.data.datamodule import LatentDataModule
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import written_whole
from gpdit_lightning.stages import GPDiTStage
from gpdit_lightning.training.checkpoints import RunCheckpoint, last_checkpoint, read_checkpoint
from gpdit_lightning.training.curves import Curves
from gpdit_lightning.training.ema import EMA
from gpdit_lightning.training.health import Health
from gpdit_lightning.training.progress import StepProgress

# Every field's docstring becomes its help.
set_parsing_settings(docstring_parse_attribute_docstrings=True)


class RecipeParser(LightningArgumentParser):
    """A parser whose complaints are one sentence and name the nearest key that exists."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise InputError instead of printing the usage."""
        sentence = " ".join(message.split())
        unknown = re.search(
            r"(?:Key|Option|option|key) '([\w.]+)' is not|does not accept (?:nested key|option) '([\w.]+)'", message
        )
        if unknown:
            key = next(group for group in unknown.groups() if group)
            known = [action.dest for action in self._actions]
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            sentence += f" Did you mean '{nearest[0]}'?" if nearest else ""
        raise InputError(f"the recipe or the command line cannot be used: {sentence}")


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
                *([StepProgress()] if settings["enable_progress_bar"] is not False else []),
                *(settings["callbacks"] or []),
            ],
        }
        return self.trainer_class(**settings)

    def save_recipe(self) -> None:
        """Write the recipe as resolved to the run folder."""
        with written_whole(Path(self.trainer.default_root_dir) / "config.yaml") as path:
            path.write_text(self.parser.dump(self.config, skip_none=False), encoding="utf-8")


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
    warnings.filterwarnings("ignore", message=".*`args` parameter is intended to run from within Python.*")
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
        raise InputError(f"an interpolation in the recipe leads nowhere: {' '.join(str(error).split())}") from None


def run(verb: str, arguments: Sequence[str]) -> None:
    """Train, or evaluate a run's last checkpoint."""
    cli = build(verb, arguments)
    resumed = last_checkpoint(Path(cli.trainer.default_root_dir))
    if verb == "fit":
        cli.save_recipe()
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=resumed, weights_only=True)
        print(f"finished at step {cli.trainer.global_step}: {cli.trainer.default_root_dir}/checkpoints/last.ckpt")
        return
    if resumed is None:
        raise InputError(
            f"{cli.trainer.default_root_dir} holds no checkpoint to {verb}: `fit` first, or give --run_dir."
        )
    getattr(cli.trainer, verb)(cli.model, cli.datamodule, ckpt_path=resumed, weights_only=True)
