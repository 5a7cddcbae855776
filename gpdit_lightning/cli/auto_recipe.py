"""The recipe `gpdit:auto` of `fit`: planned at the first start of a run, and kept in its run folder."""

import argparse
from dataclasses import replace
from pathlib import Path

import yaml

from gpdit_lightning.checkpoints.files import last_checkpoint
from gpdit_lightning.cli.plan import default_run_dir, plan
from gpdit_lightning.cli.recipe_files import AUTO
from gpdit_lightning.devices import rank_of_process
from gpdit_lightning.errors import InputError
from gpdit_lightning.options.plan import PlanOptions
from gpdit_lightning.options.shared import RecipeOptions

PLANNED_RECIPE = "planned.yaml"  # in the run folder


def with_planned_recipe(options: RecipeOptions) -> RecipeOptions:
    """Replace the recipe `gpdit:auto` by the file of the run folder that `plan` writes for the data and this machine.

    The file is written until the run has a checkpoint. Then it is kept, so that the run resumes with the same recipe.

    Raises:
        InputError: there is no `--data_dir`, the data cannot be used, or several processes started at once.
    """
    if AUTO not in options.config:
        return options
    data_dir, run_dir = _folders(options)
    recipe = Path(run_dir, PLANNED_RECIPE)
    if rank_of_process()[1] > 1:  # started by torchrun, SLURM or Lightning, which starts the others after the first
        if not recipe.exists():
            raise InputError(
                f"{AUTO} plans a recipe in one process, but several were started: write one first, with `python -m "
                "gpdit_lightning plan`, and give its path."
            )
    elif last_checkpoint(Path(run_dir)) is None:
        plan(PlanOptions(data_dir=data_dir, out=recipe, run_dir=run_dir, overwrite=True))
    return replace(options, config=tuple(str(recipe) if name == AUTO else name for name in options.config))


def _folders(options: RecipeOptions) -> tuple[list[str], str]:
    """Return the folders of data and the run folder that the overrides give."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data_dir", nargs="+", default=[])
    parser.add_argument("--run_dir")
    given, _ = parser.parse_known_args(options.overrides)
    data_dir = list(given.data_dir)
    if len(data_dir) == 1 and data_dir[0].startswith("["):  # a list, as the command line and Python write it
        data_dir = yaml.safe_load(data_dir[0])
    if not data_dir:
        raise InputError(f"{AUTO} plans a recipe for prepared data: give --data_dir, such as --data_dir latents/mine.")
    return data_dir, given.run_dir or default_run_dir(data_dir)
