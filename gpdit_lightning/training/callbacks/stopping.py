"""Handling of signals that end the training, and of the end of other ranks."""

import atexit
import ctypes
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from subprocess import Popen, TimeoutExpired
from types import FrameType
from typing import Any

import torch.distributed
from lightning import Trainer

from gpdit_lightning.signals import (
    ENDS_WITHIN,
    REPEATED,
    SIGNALS,
    SignalListener,
    is_ignored,
    redirect_closed_outputs,
)
from gpdit_lightning.training.internals import launched_processes

LAUNCHER = "GPDIT_LIGHTNING_LAUNCHER"  # environment variable: the id of the process that launched the other ranks
POLL_SECONDS = 0.25  # between two looks at whether training waits for data
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Stopped(SystemExit):
    """Ends the training on all ranks after an optimizer step.

    Args:
        step: the optimizer step.
        signum: the signal that was received. The first rank's exit status is 128 plus its number, as in a shell; that
            of the others is 0, since Lightning's launcher kills the first rank if another one ends with any other.
        first_rank: whether this is the first rank.
        saved: whether the step is saved.
    """

    def __init__(self, step: int, signum: int, first_rank: bool, saved: bool = True) -> None:
        super().__init__(128 + signum if first_rank else 0)
        self.step, self.first_rank, self.saved = step, first_rank, saved


class StopSignals:
    """Records the first of `SIGNALS` for a loop that polls `received`; a second SIGINT or SIGTERM ends the process.

    A loop that waits for data does not poll: if it does so for `patience` seconds after the signal, an exception is
    raised in it.

    Args:
        announce: whether to print on stderr that the first one was received.
        patience: seconds to wait for data.
        waits: returns whether the loop waits for data.
        give_up: returns the exception to raise, for the number of the signal.

    Attributes:
        received: the number of the first signal; 0 before.
    """

    def __init__(
        self, announce: bool, patience: float, waits: Callable[[], bool], give_up: Callable[[int], BaseException]
    ) -> None:
        self.announce, self.patience, self.waits, self.give_up = announce, patience, waits, give_up
        self.received = 0
        self._gives_up = False
        self._listener = SignalListener(SIGNALS, self._announce)
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Handle the signals from now on."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
            return
        numbers = [number for number in SIGNALS if not (number == signal.SIGHUP and is_ignored(number))]  # by nohup
        self._previous_handlers = {number: signal.signal(number, self._record) for number in numbers}
        self._listener.start()

    def restore(self) -> None:
        """Restore the handlers that were installed before."""
        if self._previous_handlers:
            for number, handler in self._previous_handlers.items():
                signal.signal(number, handler)
            self._previous_handlers = {}
            self._listener.close()

    def _record(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGHUP:
            redirect_closed_outputs()
        self.received = self.received or signum
        if self._gives_up and self.waits():
            self._gives_up = False
            raise self.give_up(self.received)

    def _announce(self, number: int) -> None:
        if number == signal.SIGHUP:
            redirect_closed_outputs()
        if self.announce:
            second = "; a second signal stops at once" if number in REPEATED else ""
            print(f"\n{signal.Signals(number).name}: finishing the step and saving{second}", file=sys.stderr)
        threading.Thread(target=self._watch, args=(number,), daemon=True).start()

    def _watch(self, number: int) -> None:
        """Interrupt the loop when it has waited for data for `patience` seconds without a pause."""
        waited = 0.0
        while self._previous_handlers:
            waited = waited + POLL_SECONDS if self.waits() else 0.0
            if waited >= self.patience:
                self._gives_up, waited = True, 0.0
                self._listener.resend(number)
            time.sleep(POLL_SECONDS)


def launcher_of_rank() -> int | None:
    """Return the id of the process of the first rank if it has launched this one; call it before the training."""
    launcher = os.environ.get(LAUNCHER)
    return int(launcher) if launcher and os.environ.get("LOCAL_RANK", "0") != "0" else None


@contextmanager
def end_ranks_together(trainer: Trainer) -> Iterator[None]:
    """End the other ranks of this machine when the first rank ends for any reason; wrap `trainer.fit` in it.

    At the end of the training the process of the first rank waits for the others, which may still write files. If
    another rank fails while the first one waits for it, the first one ends within 5 seconds.

    Raises:
        KeyboardInterrupt: Ctrl-C before the training has started; Lightning raises SystemExit(1) instead.
        SystemExit: another rank failed; with its exit status.
    """
    launcher = launcher_of_rank()
    if launcher and sys.platform == "linux":
        # The kernel kills this rank when the first one is killed.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:
            raise SystemExit(f"the process that launched this rank ({launcher}) has ended.")
    os.environ[LAUNCHER] = str(os.getpid())
    launched = list[Popen[bytes]]()
    atexit.register(wait_for, launched)
    atexit.unregister(shut_down_process_group)  # is then the first to run: the others may wait for it before they end
    atexit.register(shut_down_process_group)
    try:
        yield
    except Stopped as stop:
        if stop.first_rank:
            saved = "which is saved" if stop.saved else "which is not saved, while it waited for data"
            print(f"stopped at step {stop.step}, {saved}: the same command resumes.", file=sys.stderr)
        raise
    except BaseException as error:
        processes = launched_processes(trainer.strategy)
        if processes is not None:
            may_be_lost_connection = isinstance(error, RuntimeError)  # as torch raises when another rank has ended
            failed = kill_other_ranks(processes, patience=5.0 if may_be_lost_connection else 0.0)
            if failed and may_be_lost_connection:
                rank, status = failed[0]
                print(f"rank {rank} failed with status {status}, so all ranks were ended.", file=sys.stderr)
                raise SystemExit(status) from None
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        del os.environ[LAUNCHER]
        launched += launched_processes(trainer.strategy) or ()


def wait_for(launched: list[Popen[bytes]]) -> None:
    """Wait, 30 s at most, until the ranks that this process has launched have ended: the kernel kills them with it."""
    end = time.monotonic() + ENDS_WITHIN
    for process in launched:
        with suppress(TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))


def shut_down_process_group() -> None:
    """Destroy torch's process group, if there is one, and let its threads end.

    A gloo thread that still holds a tensor when Python shuts down aborts the process. The thread ends with the last
    reference to the group. A trainer is part of a reference cycle with such a reference, so garbage is collected here;
    DeepSpeed keeps other references, so the thread gets 0.1 s to release its tensor. It gets as much before, since
    DDP's reducer waits for it while it holds Python's lock, which the thread needs to release the result of a
    communication hook. Lightning destroys the group for NCCL only.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(0.1)
        gc.collect()
        time.sleep(0.1)


def kill_other_ranks(launched: list[Popen[bytes]], patience: float = 0.0) -> list[tuple[int, int]]:
    """Kill the ranks that the first one launched.

    Args:
        launched: the launcher's list of their processes, which is emptied.
        patience: seconds to wait for the failure of one, since a rank closes its connections before its process ends.

    Returns:
        (rank on this machine, exit status) of the ranks that had failed before.
    """
    processes = list(launched)
    launched.clear()  # otherwise the launcher treats their end as a failure and kills this process
    deadline = time.monotonic() + patience
    while not any(process.poll() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    ended = [(rank, process.poll()) for rank, process in enumerate(processes, start=1)]
    for process in processes:
        process.kill()
    for process in processes:
        with suppress(TimeoutExpired):  # it waits for a file server that does not respond
            process.wait(ENDS_WITHIN)
    return [(rank, status if status > 0 else 128 - status) for rank, status in ended if status]
