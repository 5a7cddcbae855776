"""`chain`: train the stages of a chain in turn, each from the averaged weights of its predecessor."""

import gc
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed
from lightning import Trainer
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities import rank_zero_only

from gpdit_lightning.checkpoints.files import checkpoint_sha256, last_checkpoint, open_checkpoint
from gpdit_lightning.cli import fit
from gpdit_lightning.cli.recipe_cli import parse_recipe
from gpdit_lightning.cli.recipe_files import read_yaml, recipe_path
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.errors import InputError
from gpdit_lightning.options.chain import ChainOptions
from gpdit_lightning.options.shared import RecipeOptions
from gpdit_lightning.training.callbacks.stopping import shut_down_process_group
from gpdit_lightning.training.internals import launched_processes

PRINT_CONFIG = "--print_config"


class Stage(NamedTuple):
    """One stage of a chain.

    Attributes:
        name: its number and run folder, for messages.
        recipe: the options of `fit`.
        run_dir: its run folder.
        steps: its number of optimizer steps.
        manifests: the paths of its data.
    """

    name: str
    recipe: RecipeOptions
    run_dir: str
    steps: int
    manifests: list[str]


def chain(options: ChainOptions) -> None:
    """Train the stages that are not finished.

    Raises:
        InputError: the file is no chain, a recipe is invalid, or a stage began from other weights than its
            predecessor's; raised before any stage is trained.
    """
    printing = [word for word in options.overrides if word.startswith(PRINT_CONFIG)]
    stages = read_stages(options.config, [word for word in options.overrides if word not in printing])
    if printing:
        print_recipes(stages, printing)
        return
    check_data(stages)
    states = [read_state(stage) for stage in stages]
    check(stages, states)
    environment = dict(os.environ)
    for stage, (_, step) in zip(stages, states, strict=True):
        if step >= stage.steps:
            print_once(f"{stage.name}: finished at step {step}")
            continue
        print_once(f"{stage.name}: {f'resumes from step {step}' if step else 'begins'}")
        trainer = fit.fit(stage.recipe)
        if is_launched(trainer):
            return
        if trainer.global_step < stage.steps:  # ended by trainer.max_time
            print_once(f"{stage.name}: ended at step {trainer.global_step} of {stage.steps}; the same command resumes")
            return
        if stage is not stages[-1]:
            release(trainer, ("chain", *options.fit_arguments), environment)


def read_stages(configs: Sequence[str], others: Sequence[str]) -> list[Stage]:
    """Return the stages of a chain, each with the run folder of its predecessor as initial weights.

    Args:
        configs: the chain file, then overlays that apply to each stage.
        others: further options that apply to each stage.

    Raises:
        InputError: a recipe is invalid.
    """
    chain, *overlays = map(recipe_path, configs)
    recipes = stages_of(chain)
    stages: list[Stage] = []
    for number, recipe in enumerate(recipes, start=1):
        weights = [f"--model.init_args.initial_weights={stages[-1].run_dir}"] if stages else []
        options = RecipeOptions(config=[str(path) for path in (recipe, *overlays)], overrides=[*others, *weights])
        settings = parse_recipe("fit", options.fit_arguments)
        manifests = [path for name in ("images", "videos", "sequences") for path in settings.data[name].manifests]
        if settings.trainer.max_steps < 1:
            raise InputError(f"{recipe}: trainer.max_steps is {settings.trainer.max_steps}: set a number of steps.")
        name = f"stage {number} of {len(recipes)}, {settings.run_dir}"
        stages.append(Stage(name, options, settings.run_dir, settings.trainer.max_steps, manifests))
    return stages


def print_recipes(stages: Sequence[Stage], words: Sequence[str]) -> None:
    """Print the resolved recipe of each stage, as YAML documents.

    Args:
        stages: the stages.
        words: the `--print_config` option of the command line.
    """
    for stage in stages:
        print("---")
        with suppress(SystemExit):  # raised after printing
            parse_recipe("fit", [*stage.recipe.fit_arguments, *words])


def check_data(stages: Sequence[Stage]) -> None:
    """Raise `InputError` unless the data of all stages exist."""
    for stage in stages:
        for manifest in stage.manifests:
            Manifest.load(manifest)


class StageState(NamedTuple):
    """The state of a stage's run.

    Attributes:
        last: the last complete checkpoint; None if there is none.
        step: the optimizer step of `last`; 0 if there is none.
    """

    last: Path | None
    step: int


def read_state(stage: Stage) -> StageState:
    """Find and verify the last checkpoint of a stage's run."""
    last = last_checkpoint(Path(stage.run_dir), verify=True)
    return StageState(last, open_checkpoint(last).step if last else 0)


def check(stages: Sequence[Stage], states: Sequence[StageState]) -> None:
    """Check that every stage that has begun started from the final weights of its predecessor.

    Raises:
        InputError: it started from other weights, or its predecessor is not finished.
    """
    for (stage, (last, step)), (following, (begun, _)) in pairwise(zip(stages, states, strict=True)):
        if begun is None:
            continue
        origin = open_checkpoint(begun).origin
        cure = f"remove {following.run_dir} to train that stage again"
        if origin is None or last is None or origin.sha256 != checkpoint_sha256(last):
            began = f"from the weights of {origin.path} (step {origin.step})" if origin else "from random weights"
            raise InputError(
                f"{following.run_dir} began {began}, not from the current weights of {stage.run_dir} (step {step}): "
                f"{cure}, or restore those weights."
            )
        if step < stage.steps:
            raise InputError(
                f"{stage.run_dir} is at step {step} of {stage.steps}, but {following.run_dir} has begun from it: "
                f"{cure}, or set trainer.max_steps to {step}."
            )


@rank_zero_only
def print_once(message: str) -> None:
    """Print on the first rank only."""
    print(message, flush=True)


def stages_of(chain: Path) -> list[Path]:
    """Return the recipes that a chain lists, relative to its file.

    Raises:
        InputError: it lists none.
    """
    stages = read_yaml(chain).get("stages")
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, str) for stage in stages):
        raise InputError(
            f"{chain} is not a chain: it needs a list of recipes under `stages`; for one recipe use `fit`."
        )
    return [chain.parent / recipe_path(stage) for stage in stages]


def is_launched(trainer: Trainer) -> bool:
    """Return whether Lightning launched this process for the current stage: it must end with the stage."""
    return launches_ranks(trainer) and trainer.local_rank > 0


def launches_ranks(trainer: Trainer) -> bool:
    """Return whether Lightning launches the other ranks; torchrun or SLURM start them before, and keep them."""
    return isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)


def release(trainer: Trainer, command: Sequence[str], environment: dict[str, str]) -> None:
    """Free the resources of a finished stage.

    If Lightning launches the other ranks, it launches new ones for each stage, because stages may differ in their
    number of devices. The first rank must then be in the same state as the new ranks (DeepSpeed numbers parameters
    consecutively over models), so the process replaces itself by the same command.

    Args:
        trainer: the trainer of the stage.
        command: the verb and its arguments.
        environment: the environment in which the command was started.
    """
    if launches_ranks(trainer) and torch.distributed.is_initialized():
        for process in launched_processes(trainer.strategy) or []:
            process.wait()
        shut_down_process_group()  # its sockets would stay open
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, "-m", "gpdit_lightning", *command], environment)
    gc.collect()
    torch.cuda.empty_cache()
