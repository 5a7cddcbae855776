"""Commands in forked processes with limits on time and memory."""

import contextlib
import faulthandler
import importlib.util
import json
import os
import resource
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gpdit_lightning.estimation.units import MIB

POLL_INTERVAL = 0.01  # seconds
PAGE = resource.getpagesize()
HARNESS_ERROR = 99  # exit status if the command ended well but its result could not be read


class Limits(NamedTuple):
    """Limits of one process."""

    seconds: float
    """Wall time."""
    mebibytes: int
    """Growth of the resident memory since the fork; the address space may grow by eight times as much."""


class Job(NamedTuple):
    """A command that is run in a process, with the folder in which it runs.

    Attributes:
        key: identifies the job.
        prepare: fills the folder, in the parent.
        arguments: verb and options.
        result: reads the result from the folder when the command has ended with status 0.
        command: called with the arguments; returns the exit status.
        limits_factor: multiplies the limits on time and memory.
    """

    key: Any
    prepare: Callable[[Path], object]
    arguments: Sequence[str]
    result: Callable[[], Any]
    command: Callable[[Sequence[str]], int]
    limits_factor: int = 1


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        key: that of the job.
        status: exit status; negative for a signal.
        output: standard output and standard error.
        result: what `Job.result` returned; None unless the status is 0.
        seconds: wall time.
        mebibytes: largest growth of the resident memory.
        exceeded: the limit that ended the process, `seconds` or `mebibytes`; empty if none did.
    """

    key: Any
    status: int
    output: str
    result: Any
    seconds: float
    mebibytes: float
    exceeded: str


def run_jobs(jobs: Iterable[Job], folder: Path, limits: Limits, processes: int) -> Iterator[Ended]:
    """Run jobs in forked processes, and yield how each ended.

    Args:
        jobs: the jobs, which are started in order.
        folder: working folder; each process has its folder in it, which is emptied by `Job.prepare`.
        limits: limits of every process.
        processes: number of processes at the same time.
    """
    waiting, running = iter(jobs), dict[int, _Process]()
    try:
        while True:
            for slot in range(processes):
                if slot not in running and (job := next(waiting, None)) is not None:
                    running[slot] = _Process(job, folder / f"process-{slot}", limits)
            if not running:
                return
            time.sleep(POLL_INTERVAL)
            for slot, process in list(running.items()):
                if ended := process.poll():
                    del running[slot]
                    yield ended
    finally:
        for process in running.values():
            process.kill()


class _Process:
    """A forked process that runs a job."""

    def __init__(self, job: Job, folder: Path, limits: Limits) -> None:
        limits = Limits(limits.seconds * job.limits_factor, limits.mebibytes * job.limits_factor)
        self.job, self.folder, self.limits = job, folder, limits
        job.prepare(folder)
        self.started, self.largest, self.exceeded = time.perf_counter(), 0.0, ""
        self.log, self.answer = folder.with_suffix(".log"), folder.with_suffix(".json")
        self.answer.unlink(missing_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _run_and_exit(job, folder, self.log, self.answer, limits)
        self.base = _resident(self.pid)

    def poll(self) -> Ended | None:
        """Return how the process ended; None if it still runs."""
        self.largest = max(self.largest, (_resident(self.pid) - self.base) / MIB)
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        seconds = time.perf_counter() - self.started
        if pid == 0:
            over = {"seconds": seconds > self.limits.seconds, "mebibytes": self.largest > self.limits.mebibytes}
            exceeded = next((name for name, is_over in over.items() if is_over), "")
            if not exceeded:
                return None
            self.exceeded = exceeded
            status = self.kill()
        _kill_group(self.pid)  # processes that it has left behind
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        result = json.loads(self.answer.read_text()) if self.answer.exists() else None
        code = os.waitstatus_to_exitcode(status)
        return Ended(self.job.key, code, text, result, seconds, self.largest, self.exceeded)

    def kill(self) -> int:
        """Kill the process and those that it has started; return its status as `os.waitpid` does."""
        os.kill(self.pid, signal.SIGKILL)
        status = os.waitpid(self.pid, 0)[1]
        _kill_group(self.pid)
        return status


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _resident(pid: int) -> int:
    """Return the resident bytes of a process and of its descendants in the same group; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (OSError, IndexError):
        return 0


def _run_and_exit(job: Job, folder: Path, log: Path, answer: Path, limits: Limits) -> None:
    """Run a job in the forked process; never returns."""
    status = 1
    try:
        os.setsid()
        faulthandler.disable()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = os.fdopen(output, "w", 1, "utf-8", "backslashreplace")
        os.chdir(folder)
        os.environ["HOME"] = str(folder / "home")
        _imitate_command(job.arguments)
        space = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE + 8 * limits.mebibytes * MIB
        resource.setrlimit(resource.RLIMIT_AS, (space, space))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        status = _status(job)
        if status == 0:
            status = HARNESS_ERROR
            answer.write_text(json.dumps(job.result()))
            status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _status(job: Job) -> int:
    """Return the exit status of a command; a traceback is printed for an exception."""
    try:
        return job.command(job.arguments)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)


def _imitate_command(arguments: Sequence[str]) -> None:
    """Make programs that restart the command, as launchers of several ranks do, restart this one and not the suite."""
    main = types.ModuleType("__main__")
    main.__spec__ = importlib.util.find_spec("gpdit_lightning.__main__")
    main.__file__ = main.__spec__.origin if main.__spec__ else None
    sys.modules["__main__"] = main
    sys.argv = [str(main.__file__), *arguments]
