"""`fit`, `validate` and `test`: train from a recipe, or evaluate; the same command resumes a run from its folder."""

import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from gpdit_lightning.checkpoints.files import last_checkpoint, open_checkpoint
from gpdit_lightning.cli.auto_recipe import planned_recipe
from gpdit_lightning.cli.classification_report import write_classification
from gpdit_lightning.cli.failures import CURES, SMALLER_TRAINING
from gpdit_lightning.cli.recipe_cli import RecipeCLI, build_recipe, find_resumed
from gpdit_lightning.errors import InputError, file_of
from gpdit_lightning.files import process_lock
from gpdit_lightning.imports import error_summary, import_path
from gpdit_lightning.options.shared import RecipeOptions
from gpdit_lightning.progress import messages_above_bars
from gpdit_lightning.retries import memory_error
from gpdit_lightning.training.callbacks.run_checkpoint import resume_advice
from gpdit_lightning.training.callbacks.stalls import watch_ranks
from gpdit_lightning.training.callbacks.stopping import end_ranks_together
from gpdit_lightning.training.loggers import continue_logs
from gpdit_lightning.training.run_folder import LOCK, RunFolderFiles, restored_without_a_step
from gpdit_lightning.workers import worker_error

LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")  # packages of Lightning


@contextmanager
def lock_run_folder(trainer: Trainer) -> Iterator[None]:
    """Hold the lock of a run folder: only one process at a time may write to it.

    Raises:
        InputError: another process holds the lock.
    """
    with ExitStack() as stack:
        if trainer.is_global_zero:
            try:
                stack.enter_context(process_lock(Path(trainer.default_root_dir) / LOCK))
            except BlockingIOError:
                raise InputError(
                    f"another process trains in {trainer.default_root_dir}: wait for it or stop it, or give another "
                    "--run_dir."
                ) from None
            except OSError:
                pass  # the folder is not writable: RunCheckpoint reports this on all ranks
        yield


def custom_part_of(error: Exception, trainer: Trainer) -> Any:
    """Return the logger, custom callback or custom stage whose method raised an error; None if none of them did."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    custom = [
        part
        for part in (*callbacks, trainer.lightning_module)
        if type(part).__module__.partition(".")[0] != "gpdit_lightning"
    ]
    parts = [*trainer.loggers, *custom]
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        caller = frame.f_locals.get("self")
        if any(caller is part for part in parts):
            return caller
    return None


@contextmanager
def report_file_errors(trainer: Trainer) -> Iterator[None]:
    """Replace an OSError by an InputError that names the file and the last complete checkpoint."""
    previous = threading.excepthook

    def ignore_file_errors(failure: threading.ExceptHookArgs) -> None:
        # TensorBoard writes in a thread; its errors are raised again when the next scalar is logged.
        if not issubclass(failure.exc_type, OSError):
            previous(failure)

    threading.excepthook = ignore_file_errors
    try:
        yield
    except BrokenPipeError:  # of the standard output, see cli/__init__.py
        raise
    except OSError as error:
        run_dir = Path(trainer.default_root_dir)
        part = custom_part_of(error, trainer)
        if part is not None and error.filename is None and error.errno not in CURES:
            summary = error_summary(error, type(part).__module__)
            raise InputError(f"{import_path(part)} failed ({summary}); {resume_advice(run_dir)}.") from error
        raise InputError(
            f"{file_of(error, f'a file in {run_dir}')} could not be written or read ({error.strerror or error}): "
            f"check that it exists, with free space and permission to write; {resume_advice(run_dir)}."
        ) from None
    finally:
        threading.excepthook = previous


@contextmanager
def report_memory_errors(trainer: Trainer) -> Iterator[None]:
    """Replace an exception for lack of memory by an InputError that names the options which need less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if worker_error(error) is not None or memory_error(error) is None:
            raise
        run_dir = Path(trainer.default_root_dir)
        smaller = SMALLER_TRAINING
        if last_checkpoint(run_dir) is not None:
            smaller += f", which needs a new run with --run_dir NEW --model.init_args.initial_weights {run_dir}"
        message = str(memory_error(error, smaller)).partition(", or free memory")[0]
        raise InputError(f"{message}; `estimate` computes the memory of a recipe.") from error


@contextmanager
def report_lightning_parts(trainer: Trainer) -> Iterator[None]:
    """Replace an exception of a callback or logger of Lightning by an InputError that names its class."""
    try:
        yield
    except Exception as error:
        part = custom_part_of(error, trainer)
        is_known = isinstance(error, InputError | OSError) or memory_error(error) or worker_error(error)
        if part is None or is_known or type(part).__module__.partition(".")[0] not in LIGHTNING:
            raise
        raise InputError(
            f"{import_path(part)} failed ({error_summary(error, type(part).__module__)}): correct its arguments, or "
            "remove it from the recipe."
        ) from error


@contextmanager
def report_restore_errors(trainer: Trainer, resumed: Path | None) -> Iterator[None]:
    """Replace an exception of the code that restores a checkpoint by an InputError that names the checkpoint."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        modules = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)]
        restores = "lightning.pytorch.trainer.connectors.checkpoint_connector" in modules
        if isinstance(error, InputError) or not restores or memory_error(error) or custom_part_of(error, trainer):
            raise
        raise InputError(
            f"{resumed} cannot be restored ({error_summary(error, 'gpdit_lightning')}): use another checkpoint of the "
            "run, or begin another run with its weights (--model.init_args.initial_weights)."
        ) from error


def fit(options: RecipeOptions) -> Trainer:
    """Train, from the run's last checkpoint if there is one; return the trainer.

    A training that fails before its first step leaves the run folder as it was.

    Raises:
        InputError: the recipe is invalid, or its data, initial weights or last checkpoint cannot be used.
    """
    with planned_recipe(options) as recipe:
        return _fit(recipe)


def _fit(options: RecipeOptions) -> Trainer:
    cli = build_recipe("fit", options.fit_arguments)
    trainer = cli.trainer
    files = RunFolderFiles(Path(trainer.default_root_dir))
    with lock_run_folder(trainer), restored_without_a_step(trainer, files):
        if trainer.is_global_zero:
            files.order_event_files()
        resumed = find_resumed(cli)
        files.step = open_checkpoint(resumed).step if resumed else 0
        _train(cli, resumed, files.step)
    if trainer.is_global_zero:
        step, last = trainer.global_step, last_checkpoint(Path(trainer.default_root_dir))
        was_finished = resumed is not None and resumed.name == f"step-{step}.ckpt"
        outcome = f"{'already ' * was_finished}finished at step {step}"
        if step < trainer.max_steps:  # by the time limit, or a callback of the recipe
            outcome = f"stopped at step {step} of {trainer.max_steps}; the same command resumes"
        print(f"{outcome}: {trainer.default_root_dir}/checkpoints/last.ckpt" if last else outcome)
        write_classification(trainer, last)
    return trainer


def _train(cli: RecipeCLI, resumed: Path | None, step: int) -> None:
    """Train, from a checkpoint of a step if there is one."""
    trainer = cli.trainer
    with (
        watch_ranks(trainer),
        end_ranks_together(trainer),
        report_file_errors(trainer),
        report_memory_errors(trainer),
        report_restore_errors(trainer, resumed),
        report_lightning_parts(trainer),
        messages_above_bars(),  # also if the recipe names another progress bar
    ):
        if trainer.is_global_zero:
            continue_logs(trainer.loggers, step)
        trainer.fit(cli.model, cli.datamodule, ckpt_path=resumed, weights_only=True)


def validate(options: RecipeOptions) -> Trainer:
    """Evaluate a run's last checkpoint on the held-out sources, print the results and return the trainer.

    Raises:
        InputError: as :func:`fit`, or the run has no checkpoint, or nothing is held out.
    """
    return _evaluate("validate", options)


def test(options: RecipeOptions) -> Trainer:
    """Do as :func:`validate`; results are named `test/...`."""
    return _evaluate("test", options)


def _evaluate(verb: str, options: RecipeOptions) -> Trainer:
    with planned_recipe(options, verb) as recipe:
        cli = build_recipe(verb, recipe.fit_arguments)
    trainer = cli.trainer
    resumed = find_resumed(cli)
    if resumed is None:
        raise InputError(f"{trainer.default_root_dir} has no checkpoint to {verb}: run `fit` first, or give --run_dir.")
    if cli.datamodule.validation_batches == 0:
        raise InputError(f"there is nothing to {verb}: data.validation_batches is 0; give a number of batches.")
    if cli.datamodule.validation_plan is None:
        raise InputError(f"there is nothing to {verb}: no samples of the data are held out (see `prepare --help`).")
    limit = "limit_val_batches" if verb == "validate" else "limit_test_batches"
    if getattr(trainer, limit) == 0:
        raise InputError(f"there is nothing to {verb}: trainer.{limit} is 0; leave it out, or give a number.")
    trainer.loggers = []  # the logs of the run are for training; the results are printed
    with watch_ranks(trainer):
        getattr(trainer, verb)(cli.model, cli.datamodule, ckpt_path=resumed, weights_only=True, verbose=False)
    if trainer.is_global_zero:  # the results are means over all ranks
        for name, value in sorted(trainer.callback_metrics.items()):
            print(f"{name:<20}{float(value):.5f}")
        write_classification(trainer, resumed)
    return trainer
