"""Cases in a process of their own, within a time limit."""

import gc
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # takes seconds, once instead of in each process

from benchmarks.gpu_check.cases import Part, Row, Setup, completed, measured

# The parent does not use CUDA, so that its forks can, which have imported all packages already.
CONTEXT = multiprocessing.get_context("fork")


@contextmanager
def isolated(work: Callable[..., None], log: Path, *arguments: Any) -> Iterator[tuple[BaseProcess, Connection]]:
    """Run `work(connection, *arguments)` in a process; afterwards end it, and all processes that it has started.

    Args:
        work: the function.
        log: file to which its output is appended.
        arguments: of the function.

    Yields:
        the process, and the connection on which it sends.
    """
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_work, args=(work, log, sender, *arguments))
    process.start()
    sender.close()
    try:
        yield process, receiver
    finally:
        with suppress(ProcessLookupError):  # it has ended, or has not yet begun its process group
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()
        process.join()
        receiver.close()


def _work(work: Callable[..., None], log: Path, sender: Connection, *arguments: Any) -> None:
    """Call a function as the leader of a process group, with its output in a file."""
    os.setsid()
    gc.freeze()  # what the parent has imported needs no examination
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)  # a parent may have replaced them
    work(sender, *arguments)


def received(process: BaseProcess, receiver: Connection, seconds: float) -> Any:
    """Return the next object that a process sends; None if it ended or did not send one in time."""
    ready = wait([receiver, process.sentinel], timeout=max(0.0, seconds))
    if receiver in ready or receiver.poll():
        with suppress(EOFError):
            return receiver.recv()
    return None


def run_part(part: Part, setup: Setup, seconds: float, log: Path, add: Callable[[Row], None]) -> None:
    """Measure the cases of a part; a process that ends early is replaced by one for the cases after the failed one.

    Args:
        part: the part.
        setup: what all parts share.
        seconds: time limit of the part.
        log: file to which the output of the processes is appended.
        add: is called with the row of each case, as soon as it is measured.
    """
    deadline, cases, done = time.monotonic() + seconds, part.cases(setup), 0
    while done < len(cases) and time.monotonic() < deadline:
        with isolated(measure_cases, log, part, setup, done) as (process, receiver):
            first = done
            while done < len(cases):
                row = received(process, receiver, deadline - time.monotonic())
                if row is None:
                    break
                add(row)
                done += 1
            process.join(max(0.0, min(5.0, deadline - time.monotonic())))  # for its exit status
            status = process.exitcode
        if done < len(cases) and status is not None and (status or done == first):
            add(completed(cases[done], {"failure": f"its process ended by {_cause(status)}{_last_line(log)}"}))
            done += 1
    for number, case in enumerate(cases[done:]):
        cause = "not finished within" if number == 0 else "no time left of"
        add(completed(case, {"skipped": f"{cause} the {seconds:.0f} s of this part"}))


def measure_cases(sender: Connection, part: Part, setup: Setup, first: int) -> None:
    """Send the rows of a part's cases from the given one on, until an error of the device, which may spoil others."""
    if setup.smoke_test:
        torch._dynamo.config.disable = True  # compilation takes a minute on a CPU
    for case in part.cases(setup)[first:]:
        row, error = measured(case)
        if error is not None:
            traceback.print_exception(error)
        sender.send(row)
        if error is not None and is_of_device(error):
            return


def is_of_device(error: BaseException) -> bool:
    """Return whether an error, or one that caused it, is of the GPU or for lack of its memory."""
    cause = error.__cause__ or error.__context__
    of_device = isinstance(error, torch.AcceleratorError | torch.OutOfMemoryError) or "CUDA error" in str(error)
    return of_device or (cause is not None and is_of_device(cause))


def _cause(status: int) -> str:
    """Return how a process ended."""
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def _last_line(log: Path) -> str:
    """Return the last line of a log, to append to a sentence."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return f": {lines[-1]}" if lines else ""
