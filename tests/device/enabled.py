"""Adds the simulated device to torch when it is imported: `pytest -p tests.device.enabled FILE`.

It must come before all modules that import functions of torch by name, such as those of torchmetrics.
"""

from tests.device.simulated import enable

enable()
