"""`chain`: train the stages of a chain in turn, each from the averaged weights of its predecessor."""

import gc
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed
from jsonargparse import Namespace
from lightning import Trainer
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities import rank_zero_only

from gpdit_lightning.checkpoints.facts import Origin
from gpdit_lightning.checkpoints.files import CHECKPOINTS, damaged_checkpoints, last_checkpoint, open_checkpoint
from gpdit_lightning.checkpoints.marks import checkpoint_sha256
from gpdit_lightning.cli import fit
from gpdit_lightning.cli.failures import DEBUG
from gpdit_lightning.cli.recipe_cli import parse_recipe, recipe_text
from gpdit_lightning.cli.recipe_files import read_yaml, recipe_path
from gpdit_lightning.cli.saved_recipe import log_changes
from gpdit_lightning.cli.trainer_settings import check_steps
from gpdit_lightning.data.selection import (
    Selection,
    and_list,
    how_to_prepare,
    load_manifest,
    select_from_recipe,
)
from gpdit_lightning.data.source import KINDS, SourceConfig
from gpdit_lightning.errors import InputError
from gpdit_lightning.options.chain import ChainOptions
from gpdit_lightning.options.shared import RecipeOptions
from gpdit_lightning.training.callbacks.stopping import shut_down_process_group
from gpdit_lightning.training.internals import launched_processes
from gpdit_lightning.training.run_folder import RECIPE

PRINT_CONFIG = "--print_config"


class StageState(NamedTuple):
    """The state of a stage's run.

    Attributes:
        last: the last complete checkpoint; None if there is none.
        step: the optimizer step of `last`; 0 if there is none.
        origin: the initial weights of the run; None if they were random or if there is no checkpoint.
        sha256: hash of `last`; None if there is none.
    """

    last: Path | None
    step: int
    origin: Origin | None
    sha256: str | None


class Stage(NamedTuple):
    """One stage of a chain.

    Attributes:
        name: its number and run folder, for messages.
        recipe: the options of `fit`.
        run_dir: its run folder.
        steps: its number of optimizer steps.
        sources: the sources that it trains on, by name, with their manifests.
        state: the state of its run.
    """

    name: str
    recipe: RecipeOptions
    run_dir: str
    steps: int
    sources: dict[str, SourceConfig]
    state: StageState


class Chain(NamedTuple):
    """The stages of a chain for which there are data.

    Attributes:
        stages: the stages in their order.
        notes: sentences on the stages that are left out, and on run folders other than those of the recipes.
    """

    stages: list[Stage]
    notes: list[str]


def chain(options: ChainOptions) -> None:
    """Train the stages that are not finished.

    Raises:
        InputError: the file is no chain, a recipe is invalid, there are no data, or a stage began from other weights
            than its predecessor's; raised before any stage is trained.
    """
    printing = [word for word in options.overrides if word.startswith(PRINT_CONFIG)]
    stages, notes = read_stages(options.config, [word for word in options.overrides if word not in printing])
    if printing:
        print_recipes(stages, notes, printing)
        return
    has_other_data = check_data(stages)
    check(stages)
    for note in notes:
        print_once(note)
    environment = dict(os.environ)
    for stage, changed in zip(stages, has_other_data, strict=True):
        step = stage.state.step
        if step >= stage.steps:
            other = ", on other data (to train on these, give --runs NEW)" if changed else ""
            print_once(f"{stage.name}: finished at step {step}{other}")
            log_unused_changes(stage)
            continue
        print_once(f"{stage.name}: {f'resumes from step {step}' if step else 'begins'}")
        trainer = fit.fit(stage.recipe)
        if is_launched(trainer):
            return
        if trainer.global_step < stage.steps:  # ended by trainer.max_time
            print_once(f"{stage.name}: ended at step {trainer.global_step} of {stage.steps}; the same command resumes")
            return
        if stage is not stages[-1]:
            release(trainer, ("chain", *options.fit_arguments, *([DEBUG] if DEBUG in sys.argv else [])), environment)


def read_stages(configs: Sequence[str], others: Sequence[str]) -> Chain:
    """Return the stages of a chain, each with the run folder of its predecessor as initial weights.

    Args:
        configs: the chain file, then overlays that apply to each stage.
        others: further options that apply to each stage.

    Raises:
        InputError: a recipe is invalid, or there are no data for any stage.
    """
    path, *overlays = map(recipe_path, configs)
    recipes = stages_of(path)
    stages, notes = list[Stage](), list[str]()
    for number, recipe in enumerate(recipes, start=1):
        before = stages[-1] if stages else None
        weights = [f"--model.init_args.initial_weights={before.run_dir}"] if before else []
        options = RecipeOptions(config=[str(path) for path in (recipe, *overlays)], overrides=[*others, *weights])
        settings = parse_stage(options, recipe)
        steps = settings.trainer.max_steps
        check_steps(f"{recipe}: trainer.max_steps", steps)
        name = f"stage {number} of {len(recipes)}"
        selection = select_from_recipe(settings.data)
        reason = reason_to_leave_out(selection, before.sources if before else {})
        if reason:
            notes.append(f"{name} ({recipe.stem}) is left out: {reason}")
            continue
        if before and settings.run_dir == before.run_dir:
            raise InputError(
                f"several stages of {path} have the run folder {settings.run_dir}: give --runs, not --run_dir."
            )
        run_dir, state, note = run_folder_of(settings.run_dir, before)
        if note:
            notes.append(f"{name}: {note}")
            options = replace(options, overrides=[*options.overrides, f"--run_dir={run_dir}"])
        stages.append(Stage(f"{name}, {run_dir}", options, run_dir, steps, selection.configs, state))
    if not stages:
        raise InputError(f"{path} has no stage with data ({'; '.join(notes)}): {how_to_prepare(KINDS)}.")
    return Chain(stages, notes)


def parse_stage(options: RecipeOptions, recipe: Path) -> Namespace:
    """Return the resolved recipe of a stage.

    Args:
        options: the options of `fit`.
        recipe: the file of the stage, for messages.

    Raises:
        InputError: the recipe is invalid.
    """
    try:
        return parse_recipe("fit", options.fit_arguments)
    except InputError as error:
        if str(recipe) in str(error):
            raise
        raise InputError(f"{recipe}: {error}") from error


def reason_to_leave_out(selection: Selection, before: Collection[str]) -> str:
    """Return why a stage is left out; empty if it is trained.

    Args:
        selection: the sources of the stage.
        before: names of the sources of the preceding stage that is trained.
    """
    reasons = "; ".join(dict.fromkeys(selection.left_out.values()))
    if not selection.configs:
        return f"{reasons} ({selection.cure})"
    if selection.left_out and {*selection.configs} == {*before}:
        return f"{reasons}, and the preceding stage trains on the {and_list(list(selection.configs))}"
    return ""


def run_folder_of(run_dir: str, before: Stage | None) -> tuple[str, StageState, str]:
    """Return the run folder of a stage, its state, and a note if it is not the recipe's.

    A run in the recipe's folder that began from other weights than those of the preceding stage, such as a run that
    `fit` trained from random weights, is left as it is: the chain trains in a folder beside it.

    Args:
        run_dir: the run folder in the recipe.
        before: the preceding stage that is trained.
    """
    state = read_state(run_dir)
    origin = state.origin
    beside = f"{run_dir}_chain"
    in_use = last_checkpoint(Path(beside)) is not None
    if before is None or (state.last is None and not in_use):
        return run_dir, state, ""
    if not in_use and origin is not None and (origin.path == before.run_dir or origin.sha256 == before.state.sha256):
        return run_dir, state, ""
    note = f"{run_dir} has a run that did not begin from {before.run_dir}: the chain trains in {beside}"
    return beside, read_state(beside), note


def print_recipes(stages: Sequence[Stage], notes: Sequence[str], words: Sequence[str]) -> None:
    """Print the resolved recipe of each stage, as YAML documents, after the notes as comments.

    Args:
        stages: the stages.
        notes: the notes of the chain.
        words: the `--print_config` option of the command line.
    """
    for note in notes:
        print(f"# {note}")
    for stage in stages:
        print("---")
        with suppress(SystemExit):  # raised after printing
            parse_recipe("fit", [*stage.recipe.fit_arguments, *words])


def check_data(stages: Sequence[Stage]) -> list[bool]:
    """Check that the data of all stages exist.

    Returns:
        For each stage, whether its run was trained on other data than it has now.

    Raises:
        InputError: a manifest does not exist or cannot be used.
    """
    changed = []
    for stage in stages:
        trained_on = data_of_checkpoint(stage.state.last) if stage.state.last else None
        now = {}
        for name, source in stage.sources.items():
            option = f"data.{name}.manifests"
            manifests = [load_manifest(path, option, stage.sources) for path in source.manifests]
            now[option] = [manifest.fingerprint()[:16] for manifest in manifests]
        changed.append(trained_on not in (None, now))
    return changed


def data_of_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Return the fingerprints of the manifests that a checkpoint was trained on, by option."""
    settings = open_checkpoint(checkpoint).facts("raw")["data"] or {}
    return {name: value for name, value in settings.items() if name.endswith(".manifests")}


def read_state(run_dir: str) -> StageState:
    """Find and verify the last checkpoint of a stage's run."""
    last = last_checkpoint(Path(run_dir), verify=True)
    if last is None:
        return StageState(None, 0, None, None)
    checkpoint = open_checkpoint(last)
    return StageState(last, checkpoint.step, checkpoint.origin, checkpoint_sha256(last))


def check(stages: Sequence[Stage]) -> None:
    """Check that every stage that has begun started from the final weights of its predecessor.

    Raises:
        InputError: it started from other weights, or its predecessor is not finished.
    """
    for stage, following in pairwise(stages):
        if following.state.last is None:
            continue
        origin, step = following.state.origin, stage.state.step
        cure = f"remove {following.run_dir} to train that stage again"
        damaged = next(damaged_checkpoints(Path(stage.run_dir, CHECKPOINTS), step), None)
        reason = f", since {damaged[0]} is not complete ({damaged[1]})" if damaged else ""
        if origin is None or stage.state.sha256 is None or origin.sha256 != stage.state.sha256:
            began = f"from the weights of {origin.path} (step {origin.step})" if origin else "from random weights"
            raise InputError(
                f"{following.run_dir} began {began}, not from the current weights of {stage.run_dir} (step "
                f"{step}{reason}): {cure}, restore those weights, or give --runs NEW for a new chain."
            )
        if step < stage.steps:
            raise InputError(
                f"{stage.run_dir} is at step {step} of {stage.steps}{reason}, but {following.run_dir} has begun from "
                f"it: {cure}, or set trainer.max_steps to {step}."
            )


@rank_zero_only
def log_unused_changes(stage: Stage) -> None:
    """Log the settings of a finished stage that have changed since it was trained, on the first rank only."""
    recipe = recipe_text("fit", stage.recipe.fit_arguments)
    log_changes(Path(stage.run_dir, RECIPE), recipe, is_finished=True)


@rank_zero_only
def print_once(message: str) -> None:
    """Print on the first rank only."""
    print(message, flush=True)


def stages_of(chain: Path) -> list[Path]:
    """Return the recipes that a chain lists, relative to its file.

    Raises:
        InputError: it lists none or another chain, a recipe cannot be read, or it has other fields.
    """
    content = read_yaml(chain)
    stages = content.get("stages")
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, str) for stage in stages):
        raise InputError(
            f"{chain} is not a chain: it needs a list of recipes under `stages`; for one recipe use `fit`."
        )
    if others := sorted(str(name) for name in content.keys() - {"stages"}):
        raise InputError(
            f"{chain} has {', '.join(others)} beside stages, which no stage uses: give the settings of all stages in "
            "an overlay (--config) or as options."
        )
    recipes = [chain.parent / recipe_path(stage, f"a stage of {chain}") for stage in stages]
    if inner := next((recipe for recipe in recipes if "stages" in read_yaml(recipe)), None):
        raise InputError(f"{chain} lists {inner}, which is a chain itself: list its recipes instead.")
    return recipes


def is_launched(trainer: Trainer) -> bool:
    """Return whether Lightning launched this process for the current stage: it must end with the stage."""
    return launches_ranks(trainer) and trainer.local_rank > 0


def launches_ranks(trainer: Trainer) -> bool:
    """Return whether Lightning launches the other ranks; torchrun or SLURM start them before, and keep them."""
    return isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)


def release(trainer: Trainer, command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Free the resources of a finished run, such as a stage, before the next one.

    If Lightning launches the other ranks, it launches new ones for each run, because runs may differ in their
    number of devices. The first rank must then be in the same state as the new ranks (DeepSpeed numbers parameters
    consecutively over models), so the process replaces itself by the same command.

    Args:
        trainer: the trainer of the run.
        command: the verb and its arguments.
        environment: the environment in which the command was started.
    """
    if launches_ranks(trainer) and torch.distributed.is_initialized():
        for process in launched_processes(trainer.strategy) or []:
            process.wait()
        restart(command, environment)
    gc.collect()
    torch.cuda.empty_cache()


def restart(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Replace the process by a command of the package; otherwise as :func:`release`."""
    shut_down_process_group()  # its sockets would stay open
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, "-m", "gpdit_lightning", *command], environment)
