"""The progress bar of the training, in a terminal and in a file."""

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from gpdit_lightning import progress
from gpdit_lightning.training.callbacks.progress import StepProgress
from tests.test_progress import Terminal, screen


def train(bar: StepProgress, first: int, last: int, max_steps: int) -> None:
    """Two micro-batches per step."""
    trainer: Any = SimpleNamespace(global_step=first, max_steps=max_steps, progress_bar_metrics={"mine": 0.5})
    module: Any = None
    bar.on_train_start(trainer, module)
    for half in range(2 * first + 1, 2 * last + 1):
        trainer.global_step = half // 2
        bar.show("loss/train", 0.3121)
        bar.show("loss/val", 0.3022)
        bar.show_pace(41.29, 133.0 if max_steps > 0 else None)
        bar.on_train_batch_end(trainer, module)
    bar.on_train_end(trainer, module)


def test_the_line_fits_into_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "_size", lambda: {"ncols": 80, "nrows": 24, "mininterval": 0})
    train(StepProgress(), 600, 602, 1400)
    *_, line, end = screen(sys.stderr.getvalue())  # type: ignore[attr-defined]
    assert line.startswith("step 602 of 1400 |")
    assert "| 02:13 left, loss 0.3121, val loss 0.3022, mine 0.5000, 41." in line
    assert len(line) <= 80
    assert end == ""


@pytest.mark.parametrize(("max_steps", "line"), [(1400, "step 602 of 1400, 02:13 left, "), (-1, "step 602, ")])
def test_lines_of_a_file(monkeypatch: pytest.MonkeyPatch, max_steps: int, line: str) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    train(StepProgress(), 600, 602, max_steps)
    first, last, end = sys.stderr.getvalue().split("\n")  # type: ignore[attr-defined]
    assert first.startswith("training: step 600")
    assert last == f"training: {line}loss 0.3121, val loss 0.3022, mine 0.5000, 41.3 samples/s"
    assert end == ""
