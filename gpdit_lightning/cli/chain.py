"""`chain`: train the stages of a chain in turn, each from the averaged weights of the one before."""

import gc
import os
import sys
from collections.abc import Sequence
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
from gpdit_lightning.cli.recipe_files import read_yaml, recipe_path
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.errors import InputError
from gpdit_lightning.options.chain import ChainOptions
from gpdit_lightning.training.callbacks.stopping import shut_down_process_group


class Stage(NamedTuple):
    """One stage of a chain.

    Attributes:
        name: for messages.
        arguments: of `fit`.
        run_dir: its run folder.
        steps: optimizer steps that it is to train.
    """

    name: str
    arguments: list[str]
    run_dir: str
    steps: int


def chain(options: ChainOptions) -> None:
    """Train the stages that are not finished.

    Raises:
        InputError: no chain, a stage that cannot be trained, or one that began from other weights than its
            predecessor's; all of it before anything is trained.
    """
    stages = read_stages(options.config, options.overrides)
    states = [read_state(stage) for stage in stages]
    check(stages, states)
    environment = dict(os.environ)
    for stage, (_, step) in zip(stages, states, strict=True):
        if step >= stage.steps:
            print_once(f"{stage.name}: finished at step {step}")
            continue
        print_once(f"{stage.name}: {f'resumes from step {step}' if step else 'begins'}")
        trainer = fit.run("fit", stage.arguments)
        if is_launched(trainer):
            return
        if trainer.global_step < stage.steps:  # by trainer.max_time
            print_once(f"{stage.name}: ended at step {trainer.global_step} of {stage.steps}; the same command resumes")
            return
        if stage is not stages[-1]:
            release(trainer, ("chain", *options.fit_arguments), environment)


def read_stages(configs: Sequence[str], others: Sequence[str]) -> list[Stage]:
    """The stages of a chain file with overlays and further options, each beginning where the one before ends.

    Raises:
        InputError: a recipe that cannot be used, or data that do not exist.
    """
    chain, *overlays = map(recipe_path, configs)
    recipes = stages_of(chain)
    stages: list[Stage] = []
    for place, recipe in enumerate(recipes, start=1):
        arguments = [f"--config={path}" for path in (recipe, *overlays)] + list(others)
        if stages:
            arguments.append(f"--model.init_args.initial_weights={stages[-1].run_dir}")
        settings = fit.parse("fit", arguments)
        for name in ("images", "videos", "sequences"):
            for manifest in settings.data[name].manifests:
                Manifest.load(manifest)
        if settings.trainer.max_steps < 1:
            raise InputError(f"{recipe}: trainer.max_steps is {settings.trainer.max_steps}: a chain needs a last step.")
        name = f"stage {place} of {len(recipes)}, {settings.run_dir}"
        stages.append(Stage(name, arguments, settings.run_dir, settings.trainer.max_steps))
    return stages


class StageState(NamedTuple):
    """The state of a stage's run.

    Attributes:
        last: its last complete checkpoint; None if it has not begun.
        step: the optimizer step of that one; 0 without.
    """

    last: Path | None
    step: int


def read_state(stage: Stage) -> StageState:
    """Find and verify the last checkpoint of a stage's run."""
    last = last_checkpoint(Path(stage.run_dir), verify=True)
    return StageState(last, open_checkpoint(last).step if last else 0)


def check(stages: Sequence[Stage], states: Sequence[StageState]) -> None:
    """Check that every stage that has begun did so from its predecessor's current weights, which will not change.

    Raises:
        InputError: the weights differ, or would after this command.
    """
    for (stage, (last, step)), (following, (begun, _)) in pairwise(zip(stages, states, strict=True)):
        if begun is None:
            continue
        origin = open_checkpoint(begun).origin
        remedy = f"remove {following.run_dir} to train that stage again"
        if origin is None or last is None or origin.sha256 != checkpoint_sha256(last):
            began = f"from the weights of {origin.path} (step {origin.step})" if origin else "at random"
            raise InputError(
                f"{following.run_dir} began {began}, which are not the current ones of {stage.run_dir} (step {step}): "
                f"{remedy}, or restore those weights."
            )
        if step < stage.steps:
            raise InputError(
                f"{stage.run_dir} is at step {step} of {stage.steps}, but {following.run_dir} has begun from it: "
                f"{remedy}, or set trainer.max_steps to {step}."
            )


@rank_zero_only
def print_once(message: str) -> None:
    """Print on the first rank only."""
    print(message, flush=True)


def stages_of(chain: Path) -> list[Path]:
    """The recipes that a chain names, relative to its file; raises `InputError` if it names none."""
    stages = read_yaml(chain).get("stages")
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, str) for stage in stages):
        raise InputError(
            f"{chain} is not a chain: it needs a list of recipes under `stages`; for one recipe use `fit`."
        )
    return [chain.parent / recipe_path(stage) for stage in stages]


def is_launched(trainer: Trainer) -> bool:
    """Whether Lightning launched this process for the stage only, so that it ends with it."""
    return launches_ranks(trainer) and trainer.local_rank > 0


def launches_ranks(trainer: Trainer) -> bool:
    """Whether Lightning launches the other ranks by itself; under torchrun or SLURM they exist already, and stay."""
    return isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)


def release(trainer: Trainer, command: Sequence[str], environment: dict[str, str]) -> None:
    """Free the resources of a finished stage.

    Where Lightning launches the other ranks, it launches them anew for each stage, because stages may differ in their
    number of devices. Then the first rank must be in the same state as they are (DeepSpeed numbers parameters
    consecutively over models): the command replaces this process.
    """
    if launches_ranks(trainer) and torch.distributed.is_initialized():
        for process in getattr(trainer.strategy.launcher, "procs", []):
            process.wait()
        shut_down_process_group()  # whose sockets would stay open
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, "-m", "gpdit_lightning", *command], environment)
    gc.collect()
    torch.cuda.empty_cache()
