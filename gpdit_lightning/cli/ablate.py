"""`ablate`: train the arms of an ablation with several seeds within equal budgets, and compare them."""

import json
import os
import traceback
from collections.abc import Mapping
from pathlib import Path

import torch

from gpdit_lightning.cli import fit
from gpdit_lightning.cli.ablation import LOCK, Ablation, Arm, read_ablation, record_ablation
from gpdit_lightning.cli.ablation_report import ArmResults, dry_run_text, write_report
from gpdit_lightning.cli.chain import is_launched, print_once, release, restart
from gpdit_lightning.devices import rank_of_process, this_machine
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write, process_lock
from gpdit_lightning.options.ablate import AblateOptions
from gpdit_lightning.planning.rules import expected_flops_per_s
from gpdit_lightning.progress import progress_bar
from gpdit_lightning.regular_files import read_bounded
from gpdit_lightning.schema import MAX_JSON_BYTES, OBJECT, check, parse_json

FAILURES = "failures.json"
CONTINUES = "GPDIT_LIGHTNING_ABLATION"  # set for the processes that this command starts, or that replace it


def ablate(options: AblateOptions) -> int:
    """Train the runs that are not finished, write the table and the curves, and print the table.

    A run that fails is reported with the reason, and the others are trained; the same command tries it again.

    Returns:
        1 if a run failed, else 0.

    Raises:
        InputError: the base recipe cannot be used; an arm has an unknown option, or the settings of another arm; or
            --out has another ablation. Nothing was trained.
    """
    environment = dict(os.environ)
    ablation = read_ablation(options)
    if options.dry_run:
        print(dry_run_text(ablation, expected_flops_per_s(this_machine())))
        return 1 if any(arm.failure for arm in ablation.arms) else 0
    if rank_of_process()[0] > 0:
        return train_runs(record_ablation(ablation, writes=False), environment)
    try:
        with process_lock(options.out / LOCK):
            return train_runs(record_ablation(ablation), environment)
    except BlockingIOError:
        raise InputError(f"another process trains the ablation in {options.out}: wait for it, or stop it.") from None


def train_runs(ablation: Ablation, environment: Mapping[str, str]) -> int:
    """Train the runs that are not finished, seed after seed; the other results are as in :func:`ablate`.

    Args:
        ablation: the ablation.
        environment: the environment in which the command was started.
    """
    failures = earlier_failures(ablation.options.out)
    runs = [(arm, seed) for seed in ablation.options.seeds for arm in ablation.arms]
    first_rank = rank_of_process()[0] == 0
    with progress_bar(total=len(runs), desc="runs", disable=not first_rank) as bar:
        for arm, seed in runs:
            name = f"{arm.name}, seed {seed}"
            if arm.failure:
                failures[name] = arm.failure
            elif name not in failures and ablation.result(arm, seed) is None:
                print_once(f"{name}:")
                if not train(ablation, arm, seed, failures, environment):
                    return 0
                if first_rank:
                    write_report(ablation, results_of(ablation, failures))
            bar.update()
    if first_rank:
        print(write_report(ablation, results_of(ablation, failures)))
        print(
            f"{ablation.options.out}: ablation.md, curves.png, results.json, results.csv, and a run folder of each run"
        )
    return 1 if failures else 0


def train(ablation: Ablation, arm: Arm, seed: int, failures: dict[str, str], environment: Mapping[str, str]) -> bool:
    """Train a run, or add the reason to the failures; return whether this process continues with the next run.

    If Lightning launches the other ranks, it launches new ones for each run, see :func:`release`.
    """
    command = ("ablate", *ablation.options.command_line)
    continued = {**environment, CONTINUES: str(ablation.options.out)}
    try:
        trainer = fit.fit(ablation.recipe(arm, seed))
    except OSError:
        raise
    except Exception as error:  # of a custom part too, whose error must not end the other arms
        if rank_of_process()[0] > 0:
            raise
        if not isinstance(error, InputError):
            traceback.print_exc()
        failures[f"{arm.name}, seed {seed}"] = " ".join(str(error).split()) or type(error).__name__
        with atomic_write(ablation.options.out / FAILURES) as path:
            path.write_text(json.dumps(failures, indent=1), encoding="utf-8")
        print(f"{arm.name}, seed {seed}: failed: {error}", flush=True)
        if torch.distributed.is_initialized():  # the process group of the run, whose other ranks have ended
            restart(command, continued)
        return True
    if is_launched(trainer):
        return False
    release(trainer, command, continued)
    return True


def earlier_failures(folder: Path) -> dict[str, str]:
    """Return the runs that failed since the command was started, with the reasons; earlier ones are tried again."""
    path = folder / FAILURES
    if os.environ.get(CONTINUES) != str(folder):
        path.unlink(missing_ok=True)
        os.environ[CONTINUES] = str(folder)  # for the ranks that Lightning launches
    if not path.exists():
        return {}
    cure = "remove it"
    return dict(check(parse_json(read_bounded(path, MAX_JSON_BYTES), str(path), cure), OBJECT, "", str(path), cure))


def results_of(ablation: Ablation, failures: Mapping[str, str]) -> list[ArmResults]:
    """Return the results of all arms so far."""
    results = []
    for arm in ablation.arms:
        seeds = ablation.options.seeds
        records = {seed: ablation.result(arm, seed) for seed in seeds}
        runs = {seed: record for seed, record in records.items() if record is not None}
        failed = {seed: failures[name] for seed in seeds if (name := f"{arm.name}, seed {seed}") in failures}
        results.append(ArmResults(arm, runs, failed))
    return results
