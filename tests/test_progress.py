"""Progress bars in terminals, and in files and pipes."""

import io
import sys
import time
from collections.abc import Callable

import pytest

from gpdit_lightning import progress
from gpdit_lightning.progress import progress_bar


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
