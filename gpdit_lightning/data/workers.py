"""How loader processes live through a signal that is meant for the training process."""

import os
import signal
import threading


def outlive_signals(worker: int) -> None:
    """A `worker_init_fn`: a terminal and a scheduler signal all processes, but only the training decides when to end.

    It may still need batches to finish its step. A worker ends when that process says so, by the loader's queue or by
    SIGTERM, or is gone, which the loader looks after.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_the_training_says_so, daemon=True).start()


def _end_when_the_training_says_so() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
