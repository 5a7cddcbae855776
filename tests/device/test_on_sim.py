"""The library on a simulated accelerator: no tensor on the wrong device, and no unnecessary waits of the host.

The tests are in on_sim/. Each file runs in its own process, since the simulated device changes torch.
"""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("on_sim")
ROOT = FOLDER.parents[2]


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("*.py")))
def test_on_the_simulated_device(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "tests.device.enabled", "-p", "no:cacheprovider", FOLDER / file]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2_000:]
