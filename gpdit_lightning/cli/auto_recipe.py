"""The recipe `gpdit:auto` of `fit`: planned at the first start of a run, and kept in its run folder."""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from gpdit_lightning.checkpoints.files import last_checkpoint
from gpdit_lightning.cli.bounded_yaml import load_yaml
from gpdit_lightning.cli.plan import default_run_dir, plan
from gpdit_lightning.cli.recipe_cli import parse_recipe
from gpdit_lightning.cli.recipe_files import AUTO
from gpdit_lightning.devices import rank_of_process
from gpdit_lightning.errors import InputError
from gpdit_lightning.options.plan import PlanOptions
from gpdit_lightning.options.shared import RecipeOptions, names_of
from gpdit_lightning.training.run_folder import RECIPE

PLANNED_RECIPE = "planned.yaml"  # in the run folder


@contextmanager
def planned_recipe(options: RecipeOptions, verb: str = "fit") -> Iterator[RecipeOptions]:
    """Replace the recipe `gpdit:auto` by the file of the run folder that `plan` writes for the data and this machine.

    The file is written at the first start of a run and kept, so that the run resumes with the same recipe. A start that
    fails before the first checkpoint removes the file that it has written.

    Args:
        options: recipes and overrides.
        verb: the command; only `fit` plans.

    Raises:
        InputError: there is no `--data_dir`, the data or the overrides cannot be used, several processes started at
            once, or the run folder has no planned recipe although it has a checkpoint or the command is not `fit`.
    """
    if AUTO not in options.config:
        yield options
        return
    check_no_plan_options(options)
    data_dir, run_dir = _folders(options)
    recipe = Path(run_dir, PLANNED_RECIPE)
    planned = replace(options, config=tuple(str(recipe) if name == AUTO else name for name in options.config))
    if recipe.exists():
        if verb == "fit" and last_checkpoint(Path(run_dir)) is None and rank_of_process()[1] == 1:
            print(f"training uses {recipe}, which an earlier start has planned (remove it to plan again)", flush=True)
        yield planned
        return
    check_can_plan(Path(run_dir), verb)
    missing_folders = [folder for folder in recipe.parents if not folder.exists()]
    try:
        plan(
            PlanOptions(data_dir=data_dir, out=recipe, run_dir=run_dir),
            lambda path: check_overrides(options, path),
        )
        yield planned
    except BaseException:
        if last_checkpoint(Path(run_dir)) is None:
            recipe.unlink(missing_ok=True)
            for folder in missing_folders:
                with suppress(OSError):  # a folder with other content
                    folder.rmdir()
        raise


def check_no_plan_options(options: RecipeOptions) -> None:
    """Raise an InputError if an option of `plan` is given to `fit`."""
    given = [re.sub("^--(no_)?|=.*", "", word) for word in options.overrides if word.startswith("--")]
    names = [name for name in given if name in set(names_of(PlanOptions)) - {"data_dir", "run_dir"}]
    if names:
        raise InputError(
            f"--{names[0]} is an option of `plan`, not of `fit`: write a recipe, with `python -m gpdit_lightning plan "
            f"--{names[0]} ... --out RECIPE.yaml`, and give --config RECIPE.yaml instead of {AUTO}."
        )


def check_can_plan(run_dir: Path, verb: str) -> None:
    """Raise an InputError if a command must not plan a recipe for a run folder without a planned one."""
    if last_checkpoint(run_dir) is not None:
        raise InputError(
            f"the run in {run_dir} was not planned by {AUTO}: give --config {run_dir / RECIPE} to use its recipe, or "
            "another --run_dir."
        )
    if verb != "fit":
        raise InputError(f"{run_dir} has no checkpoint to {verb}: run `fit` first, or give --run_dir.")
    if rank_of_process()[1] > 1:  # started by torchrun, SLURM or Lightning, which starts the others after the first
        raise InputError(
            f"{AUTO} plans a recipe in one process, but several were started: write one first, with `python -m "
            "gpdit_lightning plan`, and give its path."
        )


def check_overrides(options: RecipeOptions, recipe: Path) -> None:
    """Raise an InputError if the overlays and overrides cannot be used with a planned recipe."""
    config = tuple(str(recipe) if name == AUTO else name for name in options.config)
    overrides = [word for word in options.overrides if not word.startswith("--print_config")]
    parse_recipe("fit", replace(options, config=config, overrides=overrides).fit_arguments)


def _folders(options: RecipeOptions) -> tuple[list[str], str]:
    """Return the folders of data and the run folder that the overrides give."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data_dir", nargs="+", default=[])
    parser.add_argument("--run_dir")
    given, _ = parser.parse_known_args(options.overrides)
    data_dir = list(given.data_dir)
    if len(data_dir) == 1 and data_dir[0].startswith("["):  # a list, as the command line and Python write it
        data_dir = load_yaml(data_dir[0])
    if not data_dir:
        raise InputError(f"{AUTO} plans a recipe for prepared data: give --data_dir, such as --data_dir latents/mine.")
    return data_dir, given.run_dir or default_run_dir(data_dir)
