"""`chain`: stage after stage, each from the averaged weights of the one before, going on where it was interrupted."""

import argparse
import gc
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed
from lightning import Trainer
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities import rank_zero_only

from gpdit_lightning.cli import fit
from gpdit_lightning.cli.recipes import read_yaml
from gpdit_lightning.errors import InputError
from gpdit_lightning.training.checkpoints import last_checkpoint, read_checkpoint


def parser() -> argparse.ArgumentParser:
    """The verb's options."""
    options = argparse.ArgumentParser(
        prog="python -m gpdit_lightning chain",
        description="Trains the stages of a chain one after another, each from the averaged weights of the one before. "
        "Finished stages are skipped; interrupted anywhere, the same command goes on. All other options are those of "
        "`fit` and count for every stage.",
    )
    options.add_argument(
        "--config",
        action="append",
        required=True,
        type=Path,
        help="first the chain, a YAML file with the recipes of its `stages`; then overlays for all of them",
    )
    return options


def run(verb: str, arguments: Sequence[str]) -> None:
    """Train what is not finished yet.

    Raises:
        InputError: no chain, or a stage that began from other weights than its predecessor now has.
    """
    options, others = parser().parse_known_args(arguments)
    chain, *overlays = options.config
    stages = stages_of(chain)
    environment = dict(os.environ)
    predecessor = ""
    for place, recipe in enumerate(stages, start=1):
        stage = [f"--config={path}" for path in (recipe, *overlays)] + others
        if predecessor:
            stage.append(f"--model.init_args.initial_weights={predecessor}")
        settings = fit.parse("fit", stage)
        name = f"stage {place} of {len(stages)}, {settings.run_dir}"
        step = finished_step(Path(settings.run_dir), predecessor)
        if step >= settings.trainer.max_steps > 0:
            tell(f"{name}: finished at step {step}")
        else:
            tell(f"{name}: {f'goes on from step {step}' if step else 'begins'}")
            if not leave(fit.run("fit", stage), environment):
                return
        predecessor = settings.run_dir


@rank_zero_only
def tell(message: str) -> None:
    """Say it once, however many processes there are."""
    print(message, flush=True)


def stages_of(chain: Path) -> list[Path]:
    """The recipes that a chain names, relative to its file; raises `InputError` if it names none."""
    stages = read_yaml(chain).get("stages")
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, str) for stage in stages):
        raise InputError(f"{chain} is no chain: it needs a list of recipes under `stages`; for one recipe use `fit`.")
    return [chain.parent / stage for stage in stages]


def finished_step(run_dir: Path, predecessor: str) -> int:
    """The step that a stage's run stands at, 0 if it has not begun.

    Raises:
        InputError: it began from other weights than its predecessor's present ones.
    """
    last = last_checkpoint(run_dir)
    if last is None:
        return 0
    checkpoint = read_checkpoint(last)
    if predecessor:
        origin, present = checkpoint["gpdit"]["origin"] or {"step": 0}, read_checkpoint(predecessor)["global_step"]
        if origin["step"] != present:
            raise InputError(
                f"{run_dir} began from step {origin['step']} of its predecessor, but {predecessor} stands at step "
                f"{present} now: remove {run_dir} to train the stage again, or restore the old trainer.max_steps."
            )
    return int(checkpoint["global_step"])


def leave(trainer: Trainer, environment: dict[str, str]) -> bool:
    """Free what a finished stage holds; False in a process that was launched for this stage alone.

    Where Lightning launches the other ranks by itself, it launches them anew for each stage, because stages may differ
    in their number of devices; under torchrun or SLURM the processes stay.
    """
    launched_here = isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)
    if launched_here and trainer.local_rank > 0:
        return False
    for process in getattr(trainer.strategy.launcher, "procs", []):
        process.wait()
    if launched_here:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)
    gc.collect()
    torch.cuda.empty_cache()
    return True
