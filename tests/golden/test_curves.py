"""The numerics of every stage are those that were recorded (see `curves.py`)."""

import subprocess
import sys
from pathlib import Path


def test_training_curves_are_as_recorded() -> None:
    # A process of its own: the number of threads is set before torch is imported.
    command = [sys.executable, "-m", "tests.golden.curves"]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
