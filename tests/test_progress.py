"""Progress bars in terminals, and in files and pipes."""

import io
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable

import pytest

from gpdit_lightning import progress
from gpdit_lightning.progress import close_bars, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("output", "least", "most"), [(Terminal, 4, 30), (io.StringIO, 2, 3)])
def test_bars_are_rare_outside_a_terminal(
    monkeypatch: pytest.MonkeyPatch, output: Callable[[], io.StringIO], least: int, most: int
) -> None:
    """In a file: at the start, and at the end."""
    monkeypatch.setattr(sys, "stderr", output())
    for _ in progress_bar(range(30), desc="reading"):
        time.sleep(0.03)
    printed = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "reading: 100%" in printed
    assert least <= printed.count("reading:") <= most


def test_long_bars_are_updated_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress, "LOG_INTERVAL", 0.2)
    for _ in progress_bar(range(30)):
        time.sleep(0.03)
    assert 3 <= sys.stderr.getvalue().count("/30 ") <= 8  # type: ignore[attr-defined]


def test_a_message_does_not_repeat_the_line_of_a_bar_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar(total=3, desc="generating") as bar:
        for number in range(4):
            bar.write(f"message {number}", file=sys.stderr)
            monkeypatch.setattr(bar, "start_t", bar.start_t - 60)  # the elapsed time changes
            bar.update(number > 0)
    lines = sys.stderr.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line for line in lines if line.startswith("message")] == [f"message {number}" for number in range(4)]
    assert [re.search(r"(\d)/3", line)[1] for line in lines if "/3 " in line] == ["0", "1", "2", "3"]  # type: ignore[index]


def screen(output: str) -> list[str]:
    """Return the lines that a terminal shows: text after a carriage return replaces the line's beginning."""
    lines = []
    for line in output.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(re.sub(r"\x1b\[.", "", shown).rstrip())
    return lines


@pytest.mark.parametrize("output", [Terminal, io.StringIO])
def test_messages_are_lines_beside_the_bar(monkeypatch: pytest.MonkeyPatch, output: Callable[[], io.StringIO]) -> None:
    """Log messages of any library that writes to the console, and warnings; also with a bar in a bar."""
    stream = output()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: stream.write(f"{message}\n"))
    other = logging.getLogger("another_library")
    handler = logging.StreamHandler(stream)
    monkeypatch.setattr(other, "handlers", [handler])
    monkeypatch.setattr(other, "propagate", False)
    for outer in progress_bar(range(2), desc="outer"):
        for inner in progress_bar(range(2), desc="inner", leave=False):
            other.warning("a message %d", 2 * outer + inner)
            warnings.warn(f"a warning {2 * outer + inner}", stacklevel=1)
    assert other.handlers == [handler]
    lines = screen(stream.getvalue())
    messages = [line for line in lines if "a message" in line or "a warning" in line]
    assert messages == [f"a {kind} {number}" for number in range(4) for kind in ("message", "warning")]
    assert any("outer: 100%" in line for line in lines)


def test_bars_that_an_exception_left_open_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    shown = warnings.showwarning
    progress_bar(total=3, desc="reading").update(2)
    assert warnings.showwarning is not shown
    close_bars()
    stream.write("error: the last line\n")
    assert screen(stream.getvalue())[-2:] == ["error: the last line", ""]
    assert warnings.showwarning is shown
