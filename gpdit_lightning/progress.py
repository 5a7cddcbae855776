"""Progress bars that log messages and warnings do not interrupt, and that are rare lines in a file or a pipe."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

LOG_INTERVAL = 15.0  # seconds between two updates in a file or a pipe, where each of them is a line


def progress_bar(iterable: Iterable[Any] | None = None, **settings: Any) -> "tqdm[Any]":
    """Return a bar of tqdm; in a file or a pipe it is a line at most every `LOG_INTERVAL` seconds.

    Log messages and warnings that are printed while the bar is open appear in lines above it.

    Args:
        iterable: items to iterate over; None if the bar is updated by calls.
        settings: other arguments of tqdm. With `disable=None` nothing is shown in a file or a pipe.
    """
    if sys.stderr.isatty():
        return _TerminalBar(iterable, **_size() | settings)
    return _LineBar(iterable, **settings | {"mininterval": LOG_INTERVAL, "maxinterval": LOG_INTERVAL})


def _size() -> dict[str, Any]:
    """Return settings of tqdm for the size of the terminal; without a size, as in some containers, it shows nothing."""
    try:
        known = all(os.get_terminal_size(sys.stderr.fileno()))
    except (OSError, ValueError):  # no terminal of the system
        known = True
    return {"dynamic_ncols": True} if known else {"ncols": 80, "nrows": 24}


def close_bars() -> None:
    """Close the bars that an exception has left open in a terminal, so that the next message starts on a new line."""
    for bar in list(_TerminalBar.open_bars):
        bar.close()


class _TerminalBar(tqdm):
    """A bar in a terminal, which redirects console messages while it is open."""

    open_bars: ClassVar[set["_TerminalBar"]] = set()
    _redirection: ClassVar = ExitStack()

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        if not self.disable:
            if not self.open_bars:
                self._redirection.enter_context(messages_above_bars())
            self.open_bars.add(self)

    def close(self) -> None:
        """Close the bar; the last open bar ends the redirection."""
        super().close()
        if self in self.open_bars:
            self.open_bars.remove(self)
            if not self.open_bars:
                self._redirection.close()


@contextmanager
def messages_above_bars() -> Iterator[None]:
    """Print warnings, and the messages of every logger that writes to the console, above all bars of tqdm.

    In a file or a pipe nothing is changed: there every update of a bar is a line.
    """
    if not sys.stderr.isatty():
        yield
        return
    loggers = [logging.getLogger(), *map(logging.getLogger, logging.Logger.manager.loggerDict)]
    consoles = (sys.stdout, sys.stderr)
    to_console = [
        logger
        for logger in loggers
        if any(isinstance(handler, logging.StreamHandler) and handler.stream in consoles for handler in logger.handlers)
    ]
    show_warning = warnings.showwarning

    def show_above(*arguments: Any, **options: Any) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            show_warning(*arguments, **options)

    warnings.showwarning = show_above
    try:
        with logging_redirect_tqdm(to_console):
            yield
    finally:
        if warnings.showwarning is show_above:
            warnings.showwarning = show_warning


class _LineBar(tqdm):
    """A bar in a file or a pipe: every update is a line, so that messages between them are lines too."""

    _displayed: Any = None

    @staticmethod
    def status_printer(file: Any) -> Any:
        """Return a function that writes a state as a line, unless it is the last one that was written."""
        written = ""

        def write_line(state: str) -> None:
            nonlocal written
            if state.strip() and state != written:
                file.write(f"{state.strip()}\n")
                file.flush()
                written = state

        return write_line

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write the state, unless only the elapsed time has changed: tqdm displays a bar again after each message."""
        state = (self.n, self.desc, self.postfix)
        if state != self._displayed:
            self._displayed = state
            super().display(msg, pos)
        return True

    def moveto(self, n: int) -> None:
        """Do nothing: lines of several bars follow each other."""

    def clear(self, nolock: bool = False) -> None:
        """Do nothing: lines stay."""

    def close(self) -> None:
        """Write the last state if the bar is to stay visible and has advanced since the last line."""
        if not self.disable and self.leave and self.n != self.last_print_n:
            self.refresh()
        self.fp = io.StringIO()  # tqdm would end the line of the bar
        self.sp = lambda state: None
        super().close()
