"""The library on a simulated accelerator: no tensor on the wrong device, and no unnecessary waits of the host.

The tests are in on_sim/. They run in a process of their own, since the simulated device changes torch.
"""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).with_name("on_sim")
ROOT = FOLDER.parents[2]


def test_on_the_simulated_device() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "tests.device.enabled", "-p", "no:cacheprovider"]
    files = [str(file) for file in FOLDER.glob("*.py")]
    run = subprocess.run([*command, *files], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2_000:]
