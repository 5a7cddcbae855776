"""`plan`: write a training recipe that is fitted to prepared data and to a machine."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from gpdit_lightning.cli.estimate import known_gpu
from gpdit_lightning.cli.plan_trial import MAX_SECONDS, NO_MEASUREMENT, can_measure, measured_flops_per_s
from gpdit_lightning.cli.value_checks import check_folder
from gpdit_lightning.devices import Machine, this_machine
from gpdit_lightning.errors import InputError
from gpdit_lightning.estimation.units import GIB
from gpdit_lightning.files import atomic_write, check_writable
from gpdit_lightning.options.plan import PlannedMachineOptions, PlanOptions
from gpdit_lightning.planning.recipe_text import recipe_text, summary
from gpdit_lightning.planning.rules import Choice, Goal, choose
from gpdit_lightning.planning.training_data import TrainingData

DEFAULT_HOURS = {"cpu": 2.0, "mps": 24.0, "cuda": 24.0}
# Assumed of GPUs that this machine does not have: model and memory are the defaults of `estimate`, CPU cores and host
# memory those of common machines.
DEFAULT_GPU, DEFAULT_GPU_MEMORY, CORES_PER_GPU, HOST_MEMORY_PER_GPU = "H100", 80 * GIB, 8, 64 * GIB


def plan(options: PlanOptions, check: Callable[[Path], None] | None = None) -> Choice:
    """Write a recipe, print a summary of it, and return the choices.

    Args:
        options: the options.
        check: for a recipe that is used at once: is called with it in a temporary file before the speed is measured;
            what it raises is passed on.

    Raises:
        InputError: the data cannot be used, no backbone fits, or the recipe exists.
    """
    if options.out.exists() and not options.overwrite:
        raise InputError(f"{options.out} exists: give another --out, or --overwrite to replace it.")
    check_writable(options.out)
    data, here = TrainingData.load(options.data_dir), this_machine()
    machine = planned_machine(options, here)
    goal = Goal(options.hours or DEFAULT_HOURS[machine.accelerator], options.size)
    run_dir = options.run_dir or default_run_dir(options.data_dir)
    check_folder("--run_dir", run_dir)
    choice = choose(data, machine, goal)
    text = recipe_text(choice, run_dir, str(options.out))
    if check is not None:
        with TemporaryDirectory() as folder:
            (path := Path(folder, options.out.name)).write_text(text, encoding="utf-8")
            check(path)
    if options.trial and machine == here and can_measure(choice.run, choice.speed.cluster.flops_per_s):
        print(
            f"trial: training for up to {MAX_SECONDS:.0f} s to measure the speed (`plan --no_trial` omits it)",
            flush=True,
        )
        measured = measured_flops_per_s(text, choice.run)
        if measured:
            choice = choose_again(choice, measured)
        else:
            choice = replace(choice, speed=choice.speed._replace(trial_failure=NO_MEASUREMENT))
    with atomic_write(options.out) as path:
        path.write_text(recipe_text(choice, run_dir, str(options.out)), encoding="utf-8")
    print("\n".join(summary(choice)))
    command = f"python -m gpdit_lightning fit --config {shlex.quote(str(options.out))}"
    print(f"{options.out}: " + ("the recipe, which is used now" if check else f"read and edit it, then: {command}"))
    return choice


def default_run_dir(data_dir: Sequence[str]) -> str:
    """Return runs/ and the name of the first folder of data."""
    first = Path(data_dir[0])  # or its manifest.json
    return f"runs/{(first.parent if first.suffix == '.json' else first).name}"


def choose_again(choice: Choice, flops_per_s: float) -> Choice:
    """Return the choices with the measured FLOP/s of each device, for the same size of the backbone."""
    again = choose(choice.data, choice.machine, choice.goal._replace(size=choice.size), flops_per_s)
    return replace(again, goal=choice.goal, larger_size=choice.larger_size)


def planned_machine(options: PlannedMachineOptions, here: Machine) -> Machine:
    """Return the machine for which a recipe is planned: this one, with the values that options replace.

    Raises:
        InputError: the peak FLOP/s of the given model of GPU are unknown.
    """
    requests_gpus = options.gpus != 0 and (options.gpus, options.gpu, options.gpu_memory) != (None, None, None)
    machine = here
    if requests_gpus and here.accelerator != "cuda":
        machine = default_gpus(options.gpus or 1)
    host_memory = machine.host_memory if options.host_memory is None else int(options.host_memory * GIB)
    machine = replace(machine, cores=options.cores or machine.cores, host_memory=host_memory)
    if options.gpus == 0 or (machine.accelerator == "cpu" and not requests_gpus):
        return replace(machine, accelerator="cpu", devices=1, name="cpu", memory=host_memory, bf16=False)
    if options.gpu is not None:
        known_gpu(options.gpu)
    return replace(
        machine,
        devices=options.gpus or machine.devices,
        name=options.gpu or machine.name,
        bf16=machine.bf16 or options.gpu is not None,  # all known models have it
        memory=machine.memory if options.gpu_memory is None else int(options.gpu_memory * GIB),
    )


def default_gpus(count: int) -> Machine:
    """Return a machine with GPUs of which only the number is known."""
    cores, host_memory = CORES_PER_GPU * count, HOST_MEMORY_PER_GPU * count
    return Machine("cuda", count, DEFAULT_GPU, DEFAULT_GPU_MEMORY, cores, host_memory, bf16=True)
