"""SIGINT and SIGTERM: delayed in the main process, and ignored in the worker processes of data loaders."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def signals_delayed() -> Iterator[None]:
    """Delay SIGINT and SIGTERM to the end of the block, in this process and in processes that it starts.

    Wrap work in it that must not be interrupted, and the start of worker processes: an exception that is raised during
    a fork is lost, and a signal would end a new process before :func:`ignore_signals` runs in it. New processes inherit
    the blocked signals.
    """
    if multiprocessing.get_start_method() == "spawn":  # as on macOS
        resource_tracker.ensure_running()  # otherwise the first new process starts it, which unblocks these signals
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    if threading.current_thread() is not threading.main_thread():  # Python runs signal handlers in the main thread
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return
    received: list[int] = []
    wakeup_fd = signal.set_wakeup_fd(-1)  # the signal is raised again below, which must not be counted as another one
    handlers = {number: signal.signal(number, lambda number, _: received.append(number)) for number in SIGNALS}
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # runs the handlers of pending signals
        for name, handler in handlers.items():
            signal.signal(name, handler)
        signal.set_wakeup_fd(wakeup_fd, warn_on_full_buffer=False)
    for number in dict.fromkeys(received):
        signal.raise_signal(number)


def ignore_signals(worker: int) -> None:
    """Ignore SIGINT, and SIGTERM from any process but the main process; a `worker_init_fn`.

    A terminal and a scheduler signal all processes of a run, but the main process may need more batches to finish its
    step. It ends a worker through the loader's queue or by SIGTERM. The loader ends workers whose main process
    died. macOS has no `sigwaitinfo`, which gives the sender of a signal; there every SIGTERM ends the worker.

    Args:
        worker: number of the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_at_sigterm_of_parent, daemon=True).start()
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _exit_at_sigterm_of_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
