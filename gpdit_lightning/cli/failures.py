"""The last line and the exit status of a command that an exception ends."""

import errno
import linecache
import os
import re
import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from gpdit_lightning.errors import InputError, file_of, message_line
from gpdit_lightning.files import DISK_FULL_ERRORS

DEBUG = "--debug"  # shows the traceback of an error; every verb has it

# Errors of the file system that a user can correct, and their cures.
CURES: dict[int, str] = {
    **dict.fromkeys(DISK_FULL_ERRORS, "free some space, or choose another location"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR), "choose another location"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "use fewer workers, or raise the limit of open files (ulimit -n)"),
    **dict.fromkeys((errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP), "give another path"),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ETIMEDOUT), "check its disk or the network"),
    **dict.fromkeys((errno.EAGAIN, errno.ENOMEM), "use fewer workers, or raise the limits of memory and processes"),
}

# How a command needs less memory.
SMALLER_TRAINING = (
    "set model.init_args.backbone.activation_checkpointing true, trainer.precision bf16-mixed or a strategy that "
    "shards the model (zero2, fsdp2), or raise data.SOURCE.micro_batches (of images, videos or sequences) to divide a "
    "step into smaller passes"
)
SMALLER_BATCHES = "lower --batch_size or --workers"
LESS_MEMORY = {
    **dict.fromkeys(("fit", "chain", "validate", "test"), SMALLER_TRAINING),
    "sample": "lower --batch_size or --window, or set --precision bf16",
    "app": "lower --max_seconds or --max_waiting, or set --precision bf16",
    "transform": "lower --batch_size or --pairs, or set --precision bf16",
    "evaluate": "lower --chunk or --window, or set --precision bf16",
    **dict.fromkeys(("probe", "features"), f"{SMALLER_BATCHES} or --frames"),
    "prepare": f"{SMALLER_BATCHES} or --clip_frames, or give smaller --video_sizes and --image_sizes",
    "prepare-pairs": "give a smaller --size",
    "inspect": "lower --samples, --show or --workers",
    "export": "give --no_samples",
    "plan": "give --no_trial",
    "attention": "lower --frames or --frame_tokens",
    "diagnose": "give fewer runs as --reference",
}

# Errors of torch's process groups after another rank has ended.
LOST_RANK = re.compile("^Dist(Store|Network|Backend)Error|Connection (closed|reset) by peer|gloo/transport")

# Errors of the dynamic linker.
LACKS_MEMORY = re.compile("failed to map segment|[Cc]annot allocate memory")

CONSTANT = re.compile(r"\b[A-Z][A-Z0-9]*_[A-Z0-9_]+\b")  # a word that may be the name of an environment variable
LONGEST_WORD, LONGEST_LINE = 300, 1200  # characters of a message
PACKAGE = Path(__file__).parents[1]
INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def describe(error: Exception, verb: str) -> tuple[str, int]:
    """Return the last line of a command that an exception ends, and its exit status.

    Args:
        error: the exception.
        verb: the verb of the command.

    Returns:
        one sentence; 2 for an error that the user can correct, 1 for an unexpected one.
    """
    known = known_cause(error, LESS_MEMORY.get(verb))
    return (shortened(known), 2) if known is not None else (shortened(unexpected(error)), 1)


def known_cause(error: Exception, less_memory: str | None = None) -> str | None:
    """Return the sentence for an error that the user can correct; None for any other one.

    Args:
        error: the exception.
        less_memory: how the command needs less memory; None: as in `memory_error`.
    """
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.errno in CURES:
        if error.errno == errno.ENOENT and "temporary directory" in (error.strerror or ""):  # of `tempfile`
            return f"no folder for temporary files can be written ({error.strerror}): free some space, or set TMPDIR."
        path = file_of(error, "the output or a file of this command")
        return f"{path}: {error.strerror}: {CURES[error.errno]}."
    if isinstance(error, ImportError) and LACKS_MEMORY.search(str(error)):
        return f"memory ran out while the program started ({error}): raise the limit of memory (ulimit -v)."
    if isinstance(error, ValueError) and str(error).startswith("Key backend: "):  # matplotlib, at its import
        backend = os.environ.get("MPLBACKEND")
        return f"the environment variable MPLBACKEND is {backend!r}, which matplotlib does not know: unset it."
    if isinstance(error, ValueError) and (names := [n for n in CONSTANT.findall(str(error)) if n in os.environ]):
        value = os.environ[names[0]]
        return (
            f"the environment variable {names[0]} is {value!r}, which a package does not accept "
            f"({message_line(error)}): unset it."
        )
    if isinstance(error, Warning):
        warning = f"{type(error).__name__}: {message_line(error)}"
        return f"a warning is an error here ({warning}): leave PYTHONWARNINGS=error and Python's option -W error out."
    if type(error).__name__ == "MisconfigurationException":  # of Lightning, which most verbs do not import
        return f"the trainer cannot be used with these settings: {message_line(error)}"
    if isinstance(error, RuntimeError | MemoryError):
        from gpdit_lightning.retries import memory_error
        from gpdit_lightning.workers import thread_error, worker_error

        if LOST_RANK.search(f"{type(error).__name__}: {error}"):
            reason = message_line(error)
            return f"the connection to another rank was lost ({reason}): see the messages of the other ranks."
        known = worker_error(error) or thread_error(error) or memory_error(error, less_memory)
        return None if known is None else str(known)
    return None


def unexpected(error: BaseException) -> str:
    """Return the sentence for an exception that no part of the library expects, with its place in the code."""
    lines = str(error).strip().splitlines()
    in_other_process = any(line.startswith("Traceback (most recent call last)") for line in lines)
    message = " ".join(lines[-1:] if in_other_process else lines[:3]) or "no message"
    kind = type(error).__name__
    place, owner = _origin(error)
    named = message if in_other_process and message.startswith(f"{kind}:") else f"{kind}: {message}"
    return f"unexpected {named.rstrip('.')} ({place}): this is a fault of {owner}; {DEBUG} shows the traceback."


def _origin(error: BaseException) -> tuple[str, str]:
    """Return the line of code where an error arose, and whose fault it is.

    The line is the last one that belongs to no installed package: of the user's code if the error passed through it
    after the library's, else of the library.
    """
    lines = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if _is_of_program(frame)]
    if not lines:
        return "outside the package", "gpdit_lightning or of a package that it uses"
    frame, number = lines[-1]
    file = frame.f_code.co_filename
    owner = "gpdit_lightning" if Path(file).is_relative_to(PACKAGE) else f"the module {frame.f_globals.get('__name__')}"
    return f"{file}, line {number}", owner


def _is_of_program(frame: FrameType) -> bool:
    """Return whether a frame is of this package, or of code that is not installed, such as a class of a recipe."""
    file = frame.f_code.co_filename
    if Path(file).is_relative_to(PACKAGE):
        return file != __file__
    return bool(linecache.getlines(file)) and not file.startswith(INSTALLED)


def shortened(sentence: str) -> str:
    """Return a sentence with long words and long sentences cut in the middle, such as names of 5,000 characters."""
    words = [_cut(word, LONGEST_WORD) for word in sentence.split(" ")]
    return _cut(" ".join(words), LONGEST_LINE)


def _cut(text: str, longest: int) -> str:
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]}...{text[-half:]}"


@contextmanager
def one_line_reports(debug: bool) -> Iterator[None]:
    """Report exceptions of threads and finalizers in one line, without their tracebacks, unless `debug` is true."""
    if debug:
        yield
        return
    thread_hook, unraisable_hook = threading.excepthook, sys.unraisablehook

    def report(event: Any) -> None:
        if isinstance(event.exc_value, Exception):
            known = known_cause(event.exc_value)
            print(f"in the background: {shortened(known or unexpected(event.exc_value))}", file=sys.stderr)

    threading.excepthook = sys.unraisablehook = report
    try:
        yield
    finally:
        threading.excepthook, sys.unraisablehook = thread_hook, unraisable_hook
