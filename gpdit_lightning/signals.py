"""Signals that end a command: received or delayed in the main process, ignored in the worker processes of loaders.

SIGHUP (a closed terminal) and SIGUSR1 (SLURM's warning before a time limit) do what SIGTERM does.
"""

import atexit
import multiprocessing
import os
import select
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from typing import NoReturn, Self

TERMINATING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
SIGNALS = (signal.SIGINT, *TERMINATING)
REPEATED = (signal.SIGINT, signal.SIGTERM)  # another one of these ends a process at once
RAISES_WITHIN, ENDS_WITHIN = 5.0, 30.0  # seconds
CLOSES_WITHIN = 1.0  # seconds
PARENT_CHECK_SECONDS = 1.0
END = 0  # written to the pipe of a listener; no signal has this number


class SignalListener:
    """A thread that learns of signals at once, also while the main thread is blocked, where Python runs no handler.

    A further SIGINT or SIGTERM after the first one ends the process at once, except those within 0.1 s, since `timeout`
    and schedulers signal a process and then its group. SIGHUP and SIGUSR1 do not: a shell repeats SIGHUP when its
    terminal closes, and SLURM sends SIGTERM some time after SIGUSR1.

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
        reading_end, writing_end = os.pipe()
        thread = threading.Thread(target=self._listen, args=(reading_end,), daemon=True)
        thread.start()  # raises if there are too many threads or too little memory; then there is nothing to close
        self._thread, self._wakeup_fd = thread, writing_end
        os.set_blocking(self._wakeup_fd, False)
        self._previous_fd = signal.set_wakeup_fd(self._wakeup_fd, warn_on_full_buffer=False)

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
        first, is_repeated = 0, False
        while (number := os.read(reading_end, 1)) and number[0] != END:
            if number[0] not in self.numbers:
                continue
            if first and self._resent:
                self._resent -= 1
                continue
            if is_repeated and number[0] in REPEATED:
                os._exit(128 + number[0])
            is_repeated = is_repeated or number[0] in REPEATED
            if first:
                continue
            first = number[0]
            while select.select([reading_end], [], [], 0.1)[0] and os.read(reading_end, 64):
                pass
            self.on_first(first)
        os.close(reading_end)


class Termination:
    """Context manager in which the `TERMINATING` signals raise KeyboardInterrupt, as Ctrl-C does.

    If the main thread is blocked and cannot raise it within `RAISES_WITHIN` seconds, or does not leave the block within
    `ENDS_WITHIN`, a line is printed and the process ends with the status 128 + the number of the signal. The context
    manager has no effect outside the main thread, or on a signal that is already handled or ignored, as SIGHUP is by
    nohup.

    Args:
        lines: the line for each signal.

    Attributes:
        received: the number of the signal that was received; 0 if there was none.
    """

    def __init__(self, lines: Mapping[int, str]) -> None:
        self.lines, self.received = lines, 0
        self._is_inside = False
        self._numbers: tuple[int, ...] = ()
        self._listener = SignalListener(TERMINATING, self._set_deadlines)

    def __enter__(self) -> Self:
        self._is_inside = True
        if threading.current_thread() is threading.main_thread():
            self._numbers = tuple(number for number in TERMINATING if signal.getsignal(number) == signal.SIG_DFL)
        if self._numbers:
            self._listener.start()
            for number in self._numbers:
                signal.signal(number, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_inside = False
        for number in self._numbers:
            if signal.getsignal(number) == self._interrupt:
                signal.signal(number, signal.SIG_DFL)
        if self._numbers:
            self._listener.close()

    def _interrupt(self, number: int, _: object) -> None:
        if self.received:  # a signal that is repeated must not interrupt what ends the command
            return
        self.received = number
        if number == signal.SIGHUP:
            redirect_closed_outputs()
        raise KeyboardInterrupt

    def _set_deadlines(self, number: int) -> None:
        for seconds, is_over in ((RAISES_WITHIN, lambda: not self.received), (ENDS_WITHIN, lambda: True)):
            timer = threading.Timer(seconds, self._exit, (number, is_over))
            timer.daemon = True
            timer.start()

    def _exit(self, number: int, is_over: Callable[[], bool]) -> None:
        if self._is_inside and is_over():
            print_and_exit(self.lines, number)


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

    handlers = {number: signal.getsignal(number) for number in lines}
    handlers = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    for number in handlers:
        signal.signal(number, lambda number, _: print_and_exit(lines, number))
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def end_at_interrupts_while_exiting() -> None:
    """Let Ctrl-C end the process without a traceback while Python exits; call it when the command has ended.

    Until then Python handles SIGINT, so that an atexit callback, as one that waits for other ranks, prints a traceback.
    """
    atexit.unregister(_end_at_interrupts)  # the callback that is registered last is the first to run
    atexit.register(_end_at_interrupts)


def _end_at_interrupts() -> None:
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def is_ignored(number: int) -> bool:
    """Return whether a signal is ignored, as SIGHUP is by nohup."""
    return signal.getsignal(number) == signal.SIG_IGN


def print_and_exit(lines: Mapping[int, str], number: int) -> NoReturn:
    """Print the line for a signal, if the terminal is not closed, and end the process with the status 128 + number."""
    with suppress(OSError):
        os.write(2, f"{lines[number]}\n".encode())
    os._exit(128 + number)


def redirect_closed_outputs() -> bool:
    """Redirect standard outputs without a reader, such as a closed terminal, to nowhere.

    Any message would raise an error in them, also when Python flushes them at exit.

    Returns:
        whether there is one.
    """
    closed = False
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            closed = True
    return closed


@contextmanager
def signals_delayed() -> Iterator[None]:
    """Delay the signals that end a command to the end of the block, in this process and in processes that it starts.

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
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(wakeup_fd, warn_on_full_buffer=False)
    for number in dict.fromkeys(received):
        signal.raise_signal(number)


def ignore_signals(worker: int) -> None:
    """Ignore the signals that end a command, except SIGTERM from the main process; a `worker_init_fn`.

    A terminal and a scheduler signal all processes of a run, but the main process may need more batches to finish its
    step. It ends a worker through the loader's queue or by SIGTERM. A worker also ends when its main process has died,
    even if it waits for that process to receive an item. macOS has no `sigtimedwait`, which gives the sender of a
    signal; there every SIGTERM ends the worker.

    Args:
        worker: number of the worker.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
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
