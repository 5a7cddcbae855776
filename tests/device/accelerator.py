"""The simulated device as an accelerator of Lightning, for whole runs; see enabled.py."""

from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy

from tests.device import simulated


class SimAccelerator(Accelerator):
    """One simulated device: `trainer.accelerator: sim`."""

    @staticmethod
    def name() -> str:
        return simulated.NAME

    def setup_device(self, device: torch.device) -> None:
        """Do nothing."""

    def teardown(self) -> None:
        """Do nothing."""

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> int:
        return 1

    @staticmethod
    def get_parallel_devices(devices: int) -> list[torch.device]:
        return [torch.device(simulated.NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True


AcceleratorRegistry.register(simulated.NAME, SimAccelerator, override=True)


class SimStrategy(SingleDeviceStrategy):
    """Training on the simulated device; Lightning chooses a device for known accelerators only."""

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        super().__init__(torch.device(simulated.NAME, 0), accelerator)


class Waits(Callback):
    """Counts the waits of every optimizer step, from its first micro-batch until that of the next step.

    Attributes:
        of_step: waits by cause and line, for each optimizer step from 1.
        random: operations that drew random numbers on the device.
    """

    def __init__(self) -> None:
        self.of_step: dict[int, Counter[str]] = {}
        self._block = ExitStack()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Assign the waits since the last optimizer step to the next one."""
        step = trainer.global_step + 1
        if step not in self.of_step:
            self._block.close()
            self.of_step[step] = self._block.enter_context(simulated.recording()).waits

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop counting."""
        self._block.close()
