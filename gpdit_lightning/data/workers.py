"""How loader processes survive a signal that is meant for the training process."""

import os
import signal
import threading


def keep_running_after_signals(worker: int) -> None:
    """A `worker_init_fn`: ignore SIGINT and SIGTERM unless the training process itself ends this worker.

    A terminal and a scheduler signal all processes, but the training process decides when to end: it may need more
    batches to finish its step. It ends a worker through the loader's queue or by SIGTERM; a worker whose training
    process has disappeared is ended by the loader. Without `sigwaitinfo` (macOS), which tells the sender, SIGTERM ends
    the worker whoever sends it.

    Args:
        worker: its number.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_at_sigterm_of_parent, daemon=True).start()


def _exit_at_sigterm_of_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
