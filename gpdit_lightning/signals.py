"""SIGINT and SIGTERM: received or delayed in the main process, and ignored in the worker processes of data loaders."""

import multiprocessing
import os
import select
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
RAISES_WITHIN, ENDS_WITHIN = 5.0, 30.0  # seconds
CLOSES_WITHIN = 1.0  # seconds
PARENT_CHECK_SECONDS = 1.0
END = 0  # written to the pipe of a listener; no signal has this number


class SignalListener:
    """A thread that learns of signals at once, also while the main thread is blocked, where Python runs no handler.

    Further signals after the first one end the process at once, except those within 0.1 s, since `timeout` and
    schedulers signal a process and then its group.

    Args:
        numbers: the signals.
        on_first: called in the thread with the number of the first signal.
    """

    def __init__(self, numbers: Collection[int], on_first: Callable[[int], None]) -> None:
        self.numbers, self.on_first = numbers, on_first
        self._wakeup_fd = self._previous_fd = -1  # Python writes the number of each signal to it
        self._thread: threading.Thread | None = None
        self._resent = 0

    def start(self) -> None:
        """Start the thread; call it in the main thread."""
        reading_end, self._wakeup_fd = os.pipe()
        os.set_blocking(self._wakeup_fd, False)
        self._previous_fd = signal.set_wakeup_fd(self._wakeup_fd, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, args=(reading_end,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, if it was started, so that it holds no references; call it in the main thread."""
        if self._thread is not None:
            signal.set_wakeup_fd(self._previous_fd, warn_on_full_buffer=False)
            os.write(self._wakeup_fd, bytes([END]))  # a forked process may keep the pipe open
            os.close(self._wakeup_fd)
            self._thread.join(CLOSES_WITHIN)
            self._wakeup_fd, self._thread = -1, None

    def resend(self, number: int) -> None:
        """Send a signal to the main thread, so that a blocking call returns and the handler runs; it is not counted."""
        self._resent += 1
        signal.pthread_kill(threading.main_thread().ident or 0, number)

    def _listen(self, reading_end: int) -> None:
        is_first = True
        while (number := os.read(reading_end, 1)) and number[0] != END:
            if number[0] not in self.numbers:
                continue
            if not is_first and self._resent:
                self._resent -= 1
                continue
            if not is_first:
                os._exit(128 + number[0])
            is_first = False
            while select.select([reading_end], [], [], 0.1)[0] and os.read(reading_end, 64):
                pass
            self.on_first(number[0])
        os.close(reading_end)


class Termination:
    """Context manager in which SIGTERM raises KeyboardInterrupt, as Ctrl-C does.

    If the main thread is blocked and cannot raise it within `RAISES_WITHIN` seconds, or does not leave the block within
    `ENDS_WITHIN`, a line is printed and the process ends with status 143. The context manager has no effect outside the
    main thread, or if SIGTERM is already handled or ignored.

    Args:
        line: the line.

    Attributes:
        received: whether SIGTERM was received.
    """

    def __init__(self, line: str) -> None:
        self.line, self.received = line, False
        self._is_inside = False
        self._listener = SignalListener((signal.SIGTERM,), self._set_deadlines)

    def __enter__(self) -> Self:
        self._is_inside = True
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            self._listener.start()
            signal.signal(signal.SIGTERM, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_inside = False
        if signal.getsignal(signal.SIGTERM) == self._interrupt:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._listener.close()

    def _interrupt(self, *_: object) -> None:
        self.received = True
        raise KeyboardInterrupt

    def _set_deadlines(self, number: int) -> None:
        for seconds, is_over in ((RAISES_WITHIN, lambda: not self.received), (ENDS_WITHIN, lambda: True)):
            timer = threading.Timer(seconds, self._exit, (number, is_over))
            timer.daemon = True
            timer.start()

    def _exit(self, number: int, is_over: Callable[[], bool]) -> None:
        if self._is_inside and is_over():
            os.write(2, f"{self.line}\n".encode())
            os._exit(128 + number)


@contextmanager
def exit_at_signals(lines: Mapping[int, str]) -> Iterator[None]:
    """Print a line and end the process at a signal, with the status 128 + its number; ignored signals stay ignored.

    Wrap imports in it: an exception that a signal handler raises while an extension module is initialised may be lost,
    or replaced by an ImportError. The context manager has no effect outside the main thread.

    Args:
        lines: the line for each signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def print_and_exit(number: int, _: object) -> None:
        os.write(2, f"{lines[number]}\n".encode())
        os._exit(128 + number)

    handlers = {number: signal.getsignal(number) for number in lines}
    handlers = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    for number in handlers:
        signal.signal(number, print_and_exit)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


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
    step. It ends a worker through the loader's queue or by SIGTERM. A worker also ends when its main process has died,
    even if it waits for that process to receive an item. macOS has no `sigtimedwait`, which gives the sender of a
    signal; there every SIGTERM ends the worker.

    Args:
        worker: number of the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _exit_with_parent(parent: int) -> None:
    """End this process when its parent sends SIGTERM or has died."""
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, PARENT_CHECK_SECONDS)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)
