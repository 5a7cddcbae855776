"""Datasets for spawned processes, in a module of their own, since such a process imports the module."""

import signal
import time
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset


class SlowSamples(Dataset[int]):
    """The numbers from 0 to 5, each after 0.2 s."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, number: int) -> int:
        time.sleep(0.2)
        return number


class SlowStart(SlowSamples):
    """Takes a second to arrive in a spawned process, which creates a file when it begins."""

    def __init__(self, started: Path) -> None:
        self.started = started

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.started.touch()
        time.sleep(1)


class InterruptedStart(SlowSamples):
    """Sends SIGINT to the main process while it starts a worker."""

    def __getstate__(self) -> dict[str, Any]:
        signal.raise_signal(signal.SIGINT)
        return {}
