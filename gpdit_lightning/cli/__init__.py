"""The command line: `python -m gpdit_lightning VERB`."""

import difflib
import importlib
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple, TextIO

from gpdit_lightning.cli.failures import DEBUG, describe, one_line_reports, shortened
from gpdit_lightning.devices import rank_of_process
from gpdit_lightning.errors import InputError
from gpdit_lightning.names import ESCAPING, printable
from gpdit_lightning.signals import (
    TERMINATING,
    Termination,
    end_at_interrupts_while_exiting,
    exit_at_signals,
    redirect_closed_outputs,
)
from gpdit_lightning.version import __version__


class Verb(NamedTuple):
    """A verb of the command line.

    Attributes:
        function: the function that the verb calls with its record of options, as `module:name` in this package.
        summary: one line for the list of verbs and for the verb's help.
        record: the dataclass of the options, as `module:name` in `gpdit_lightning.options`.
        when_stopped: what a stopped command has kept, for its last line.
    """

    function: str
    summary: str
    record: str
    when_stopped: str = ""


RESUMES = "the same command resumes"
RECIPE = "shared:RecipeOptions"  # of the verbs whose options are those of a training recipe

VERBS = {
    "demo": Verb(
        "demo:demo",
        "Train a small model on synthetic videos within minutes, and generate with it.",
        "demo:DemoOptions",
        RESUMES,
    ),
    "fit": Verb("fit:fit", "Train from a recipe; the same command resumes.", RECIPE, RESUMES),
    "chain": Verb(
        "chain:chain", "Train the stages of a chain in turn; the same command resumes.", "chain:ChainOptions", RESUMES
    ),
    "ablate": Verb(
        "ablate:ablate",
        "Compare variants of a recipe, with several seeds and equal budgets; the same command resumes.",
        "ablate:AblateOptions",
        RESUMES,
    ),
    "validate": Verb("fit:validate", "Evaluate a run's last checkpoint on the held-out sources.", RECIPE),
    "test": Verb("fit:test", "The same as validate, logged as loss/test.", RECIPE),
    "diagnose": Verb(
        "diagnose:diagnose", "Compare the curves of a run with those of healthy runs.", "diagnose:DiagnoseOptions"
    ),
    "sample": Verb(
        "sample:sample",
        "Continue videos with a trained model, or generate them from noise alone.",
        "sample:SampleOptions",
    ),
    "app": Verb("app:app", "Serve a web page on which a trained model continues videos and images.", "app:AppOptions"),
    "transform": Verb(
        "transform:transform", "Transform images as a few example pairs show.", "transform:TransformOptions"
    ),
    "evaluate": Verb(
        "evaluate:evaluate",
        "Score continued videos, or samples of classes: FVD, FID, IS, precision, recall, PSNR, SSIM.",
        "evaluate:EvaluateOptions",
        f"complete chunks are kept, and {RESUMES}",
    ),
    "probe": Verb(
        "probe:probe",
        "Measure how well each layer's features predict a video's class, by a linear probe.",
        "probe:ProbeOptions",
        f"computed features are kept, and {RESUMES}",
    ),
    "features": Verb(
        "features:features",
        "Write the features of videos for another model to train on.",
        "features:FeaturesOptions",
        f"written features are kept, and {RESUMES}",
    ),
    "plan": Verb(
        "plan:plan",
        "Write a training recipe that is fitted to prepared data and to this machine.",
        "plan:PlanOptions",
    ),
    "estimate": Verb(
        "estimate:estimate",
        "Estimate the memory, FLOPs and days of a recipe, and the nearest one that fits.",
        "estimate:EstimateOptions",
    ),
    "attention": Verb(
        "attention:attention", "Draw which tokens attend to which in a recipe's model.", "attention:AttentionOptions"
    ),
    "export": Verb("export:export", "Write the model of a checkpoint to a folder for sharing.", "export:ExportOptions"),
    "prepare": Verb(
        "prepare:run",
        "Encode videos, images and tars of images as latent shards.",
        "prepare:PrepareOptions",
        f"complete shards are kept, and {RESUMES}",
    ),
    "prepare-pairs": Verb(
        "prepare_pairs:run", "Encode pairs of images as few-shot sequences.", "prepare_pairs:PreparePairsOptions"
    ),
    "inspect": Verb(
        "inspect:inspect", "Show what prepared data hold, verify them, or explain them.", "inspect:InspectOptions"
    ),
    "recipes": Verb("recipes:recipes", "List the shipped recipes, or copy them to edit.", "recipes:RecipesOptions"),
}

# Names that other libraries use for verbs.
OTHER_NAMES = {"train": "fit", "generate": "sample"}


def usage() -> str:
    """Return the help of the command: one line for each verb."""
    lines = [f"  {name:<15}{verb.summary}" for name, verb in VERBS.items()]
    return (
        "usage: python -m gpdit_lightning VERB [options]\n\n"
        + "\n".join(lines)
        + "\n\n  VERB --help      The options of a verb.\n  VERB --debug     Show the traceback of an error."
        + "\n  --version        The version of the package."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verb that the first word names.

    An error ends it with one sentence; the option `--debug` of every verb shows its traceback too.

    Returns:
        the exit status: 0; 1 if `inspect` found faults, if runs of `ablate` failed, or after an unexpected error; 2
        after an error that the user can correct; 130 after Ctrl-C; 143 after SIGTERM, 129 after SIGHUP, 138 after
        SIGUSR1; 141 if the reader of the output has ended, as in `... | head`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG in words
    _open_closed_output()
    status = 0
    try:
        with one_line_reports(debug):
            try:
                status = _main([word for word in words if word != DEBUG], debug)
            finally:
                end_at_interrupts_while_exiting()
                sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not redirect_closed_outputs():
            raise
        return 128 + signal.SIGPIPE
    except OSError as error:  # of the standard output, such as a file on a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not status:  # else the line of that error is printed already
            print(f"error: the output cannot be written ({error.strerror}): free some space.", file=sys.stderr)
        return status or 2


def _main(words: Sequence[str], debug: bool) -> int:
    name, *rest = words or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name in ("-V", "--version"):
        print(f"gpdit_lightning {__version__}")
        return 0
    if name not in VERBS:
        names = difflib.get_close_matches(name, [*VERBS, *OTHER_NAMES], n=1, cutoff=0.5)
        near = [OTHER_NAMES.get(other, other) for other in names]
        advice = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(VERBS)}."
        print(f"error: there is no verb '{shortened(name)}': {advice}", file=sys.stderr)
        return 2
    if sys.flags.optimize > 1:
        print(
            "error: Python's option -OO removes the texts of options: leave it and PYTHONOPTIMIZE=2 out.",
            file=sys.stderr,
        )
        return 2
    try:
        os.getcwd()
    except OSError as error:  # MKL cannot be loaded there, and ends the process with another message
        print(f"error: the working directory cannot be used ({error.strerror}): change to another.", file=sys.stderr)
        return 2
    try:
        rank = _rank_prefix()  # read here, since Lightning removes WORLD_SIZE from the environment after an error
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _show_log(rank)
    _configure_output()
    lines = _lines_when_stopped(name, rank)
    termination = Termination(lines)
    try:
        with termination:
            return run(name, rest)
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        sentence, status = describe(error, name)
        _print_last_line(f"{rank}error: {printable(sentence)}")
        return status
    except KeyboardInterrupt:
        number = termination.received or signal.SIGINT
        _print_last_line(lines[number])
        return 128 + number


def _print_last_line(line: str) -> None:
    """Print the last line of a verb that did not finish, below the progress bars that are still open."""
    from gpdit_lightning.progress import close_bars

    close_bars()
    print(line, file=sys.stderr)


def _lines_when_stopped(name: str, rank: str) -> dict[int, str]:
    """Return the last line of a verb that a signal ends, for each signal, with the prefix of the rank."""
    kept = f": {VERBS[name].when_stopped}." if VERBS[name].when_stopped else "."
    lines = {int(number): f"{rank}stopped by {number.name}{kept}" for number in TERMINATING}
    return {int(signal.SIGINT): f"{rank}stopped{kept}"} | lines


def _open_closed_output() -> None:
    """Open standard outputs that the shell has closed, as in `>&-`, to nowhere: Python sets their streams to None."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _configure_output() -> None:
    """Print names of files that the terminal cannot show with escapes, and lines in their order in files too."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ESCAPING, line_buffering=True)


def run(name: str, arguments: Sequence[str]) -> int:
    """Parse the options of a verb, then import and call its function; return the exit status."""
    verb = VERBS[name]
    if verb.record == RECIPE and {"-h", "--help"} & set(arguments):
        from gpdit_lightning.cli.fit_help import print_help

        print_help(name)
        return 0
    with exit_at_signals(_lines_when_stopped(name, _rank_prefix())):
        from gpdit_lightning.cli.parsing import parse

        options = parse(name, verb.summary, record_of(name), arguments)
        function = _import(f"gpdit_lightning.cli.{verb.function}")
    result = function(options)
    return result if isinstance(result, int) else 0


def record_of(name: str) -> type[Any]:
    """Return the dataclass of a verb's options."""
    return _import(f"gpdit_lightning.options.{VERBS[name].record}")


def _import(path: str) -> Any:
    """Import `module:name`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _show_log(rank: str) -> None:
    """Print this library's log messages as plain lines; other libraries keep their handlers.

    The first rank prints messages from level INFO, the others from level WARNING.

    Args:
        rank: prefix of the lines; empty on the first rank.
    """
    log = logging.getLogger("gpdit_lightning")
    if not log.handlers:
        handler = _StandardError()
        handler.setFormatter(_OneLine(f"{rank}%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.WARNING if rank else logging.INFO)
        log.propagate = False


class _StandardError(logging.StreamHandler):
    """Handler that writes to the present `sys.stderr`, which programs that call `main` may replace between calls."""

    @property
    def stream(self) -> TextIO:
        """The present standard error."""
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        """Ignore the stream of the constructor."""


class _OneLine(logging.Formatter):
    """Formatter of messages on one line, whatever the names of files in them."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the message without its traceback."""
        return printable(super().formatMessage(record))


def _rank_prefix() -> str:
    """Return a prefix for messages that names the rank; empty on the first rank."""
    rank, _, _ = rank_of_process()
    return f"[rank {rank}] " if rank else ""
