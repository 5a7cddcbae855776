"""What SIGTERM and SIGINT mean to a run that trains, and how all its ranks end when one does."""

import atexit
import ctypes
import gc
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch.distributed
from lightning import Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

SIGNALS = (signal.SIGTERM, signal.SIGINT)
LAUNCHER = "GPDIT_LIGHTNING_LAUNCHER"  # environment variable: the process that launched the other ranks
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Stopped(SystemExit):
    """All ranks have left the training after a step that is saved.

    Args:
        step: the optimizer step.
        signum: the signal that asked for it. The first rank's exit status is 128 plus that, as shells count; that of
            the others is 0, since Lightning's launcher kills the first rank when another one ends in any other way.
        first_rank: whether this is the first rank.
    """

    def __init__(self, step: int, signum: int, first_rank: bool) -> None:
        super().__init__(128 + signum if first_rank else 0)
        self.step, self.first_rank = step, first_rank


class StopSignals:
    """Remembers the first SIGTERM or SIGINT, for a loop that asks; the next one ends the process at once.

    Args:
        announce: whether to say on stderr that the first one was heard.

    Attributes:
        received: the signal's number; 0 before.
    """

    def __init__(self, announce: bool) -> None:
        self.announce = announce
        self.received = 0
        self._told = -1
        self._before: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Handle the signals from now on."""
        if threading.current_thread() is not threading.main_thread():  # no other may
            return
        self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        # Python's handlers wait while the main thread waits for a kernel or a rank, perhaps forever; a thread does not.
        heard, self._told = os.pipe()
        os.set_blocking(self._told, False)
        signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(heard,), daemon=True).start()

    def restore(self) -> None:
        """Put back what was there before."""
        if self._told < 0:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(self._told)
        self._told = -1

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.received = self.received or signum

    def _listen(self, heard: int) -> None:
        """Read the numbers of signals as they arrive, until `restore`."""
        is_first = True
        while number := os.read(heard, 1):
            if number[0] not in SIGNALS:
                continue
            if not is_first:
                os._exit(128 + number[0])
            is_first = False
            # `timeout` and schedulers signal a process and then its group: arrivals of one signal.
            while select.select([heard], [], [], 0.1)[0] and os.read(heard, 64):
                pass
            if self.announce:
                name = signal.Signals(number[0]).name
                print(f"\n{name}: finishing the step and saving; a second signal stops at once", file=sys.stderr)
        os.close(heard)


@contextmanager
def ranks_end_together(trainer: Trainer) -> Iterator[None]:
    """Around `trainer.fit`: no rank of this machine outlives the first, however that ends.

    If another rank fails while the first waits for it, Lightning's launcher ends the first within 5 seconds.

    Raises:
        KeyboardInterrupt: Ctrl-C before the training began, of which Lightning makes an exit status of 1.
        SystemExit: with the status of another rank, whose failure was the cause.
    """
    launcher = os.environ.get(LAUNCHER) if os.environ.get("LOCAL_RANK", "0") != "0" else None
    if launcher and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a first rank that is killed can tell nobody
        if os.getppid() != int(launcher):
            raise SystemExit(f"the process that launched this rank ({launcher}) is gone.")
    os.environ[LAUNCHER] = str(os.getpid())
    atexit.unregister(leave_process_group)
    atexit.register(leave_process_group)
    try:
        yield
    except Stopped as stop:
        if stop.first_rank:
            print(f"stopped at step {stop.step}, which is saved: the same command goes on.", file=sys.stderr)
        raise
    except BaseException as error:
        if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
            lost_another = isinstance(error, RuntimeError)  # or so it may be: torch's name for a broken connection
            failed = _end_other_ranks(trainer.strategy.launcher, patience=5.0 if lost_another else 0.0)
            if failed and lost_another:
                rank, status = failed[0]
                print(f"rank {rank} failed with status {status}, so all ranks were ended.", file=sys.stderr)
                raise SystemExit(status) from None
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        del os.environ[LAUNCHER]


def leave_process_group() -> None:
    """Leave torch's process group, if there is one, and let its threads end.

    A thread of gloo that still holds a tensor when Python shuts down aborts the process, after all its work is done.
    It ends with the last reference to the group, and a trainer, which lies in a reference cycle, has some; DeepSpeed
    keeps others, so its ranks also get a moment in which such a thread can let go. Lightning does this for NCCL alone.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()
        time.sleep(0.1)


def _end_other_ranks(launcher: _SubprocessScriptLauncher, patience: float) -> list[tuple[int, int]]:
    """Kill the ranks that the first one launched.

    Args:
        launcher: of the first rank.
        patience: seconds to wait for one that is failing: it breaks its connections before it is gone.

    Returns:
        (rank on this machine, exit status) of those that had failed by themselves.
    """
    processes = list(launcher.procs)
    launcher.procs.clear()  # else the launcher's observer takes their end for their failure and kills this process
    deadline = time.monotonic() + patience
    while not any(process.poll() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    ended = [(rank, process.poll()) for rank, process in enumerate(processes, start=1)]
    for process in processes:
        process.kill()
        process.wait()
    return [(rank, status if status > 0 else 128 - status) for rank, status in ended if status]
