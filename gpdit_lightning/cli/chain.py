"""`chain`: stage after stage, each from the averaged weights of the one before, going on where it was interrupted."""

import argparse
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
from gpdit_lightning.training.callbacks.stopping import shut_down_process_group


def parser() -> argparse.ArgumentParser:
    """The verb's options."""
    options = argparse.ArgumentParser(
        prog="python -m gpdit_lightning chain",
        description="Trains the stages of a chain one after another, each from the averaged weights of the one before. "
        "Finished stages are skipped; interrupted anywhere, the same command goes on. All other options are those of "
        "`fit` (see `fit --help`) and count for every stage.",
    )
    options.add_argument(
        "-c",
        "--config",
        action="append",
        required=True,
        type=Path,
        help="first the chain, a YAML file with the recipes of its `stages`; then overlays for all of them",
    )
    return options


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


def run(verb: str, arguments: Sequence[str]) -> None:
    """Train what is not finished yet.

    Raises:
        InputError: no chain, a stage that cannot be trained, or one that began from other weights than its
            predecessor's; all of it before anything is trained.
    """
    options, others = parser().parse_known_args(arguments)
    stages = read_stages(options.config, others)
    stands = [standing_of(stage) for stage in stages]
    check(stages, stands)
    environment = dict(os.environ)
    for stage, (_, step) in zip(stages, stands, strict=True):
        if step >= stage.steps:
            tell(f"{stage.name}: finished at step {step}")
            continue
        tell(f"{stage.name}: {f'goes on from step {step}' if step else 'begins'}")
        trainer = fit.run("fit", stage.arguments)
        if is_launched(trainer):
            return
        if trainer.global_step < stage.steps:  # by trainer.max_time
            tell(f"{stage.name}: ended at step {trainer.global_step} of {stage.steps}; the same command goes on")
            return
        if stage is not stages[-1]:
            leave(trainer, (verb, *arguments), environment)


def read_stages(configs: Sequence[Path], others: Sequence[str]) -> list[Stage]:
    """The stages of a chain file with overlays and further options, each beginning where the one before ends.

    Raises:
        InputError: a recipe that cannot be used, or data that are not there.
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
            raise InputError(f"{recipe}: trainer.max_steps is {settings.trainer.max_steps}: a chain must know its end.")
        name = f"stage {place} of {len(recipes)}, {settings.run_dir}"
        stages.append(Stage(name, arguments, settings.run_dir, settings.trainer.max_steps))
    return stages


class Standing(NamedTuple):
    """How far a stage's run has come.

    Attributes:
        last: its last whole checkpoint; None if it has not begun.
        step: the optimizer step of that one; 0 without.
    """

    last: Path | None
    step: int


def standing_of(stage: Stage) -> Standing:
    """Hash what a stage's run has left, so that the next stage sees the same checkpoint as the last one."""
    last = last_checkpoint(Path(stage.run_dir), verify=True)
    return Standing(last, open_checkpoint(last).step if last else 0)


def check(stages: Sequence[Stage], stands: Sequence[Standing]) -> None:
    """See that every stage that has begun did so from its predecessor's present weights, and that those stay.

    Raises:
        InputError: they are others, or would be after this command.
    """
    for (stage, (last, step)), (following, (begun, _)) in pairwise(zip(stages, stands, strict=True)):
        if begun is None:
            continue
        origin = open_checkpoint(begun).origin
        remedy = f"remove {following.run_dir} to train that stage again"
        if origin is None or last is None or origin.sha256 != checkpoint_sha256(last):
            began = f"from the weights of {origin.path} (step {origin.step})" if origin else "at random"
            raise InputError(
                f"{following.run_dir} began {began}, which are not the present ones of {stage.run_dir} (step {step}): "
                f"{remedy}, or put back what it began from."
            )
        if step < stage.steps:
            raise InputError(
                f"{stage.run_dir} stands at step {step} of {stage.steps}, but {following.run_dir} has begun from it: "
                f"{remedy}, or ask for {step} steps."
            )


@rank_zero_only
def tell(message: str) -> None:
    """Say it once, however many processes there are."""
    print(message, flush=True)


def stages_of(chain: Path) -> list[Path]:
    """The recipes that a chain names, relative to its file; raises `InputError` if it names none."""
    stages = read_yaml(chain).get("stages")
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, str) for stage in stages):
        raise InputError(f"{chain} is no chain: it needs a list of recipes under `stages`; for one recipe use `fit`.")
    return [chain.parent / recipe_path(stage) for stage in stages]


def is_launched(trainer: Trainer) -> bool:
    """Whether this process was launched by Lightning for the stage alone, and is to end with it."""
    return launches_ranks(trainer) and trainer.local_rank > 0


def launches_ranks(trainer: Trainer) -> bool:
    """Whether Lightning launches the other ranks by itself; under torchrun or SLURM they are there, and stay."""
    return isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)


def leave(trainer: Trainer, command: Sequence[str], environment: dict[str, str]) -> None:
    """Free what a finished stage holds.

    Where Lightning launches the other ranks, it launches them anew for each stage, because stages may differ in their
    number of devices. Then the first rank must be as new as they are (DeepSpeed numbers parameters on, from model to
    model): the command begins anew in its place, as the same process.
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
