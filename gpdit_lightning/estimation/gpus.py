"""Data sheets of GPUs: arithmetic, memory and links."""

import re
from typing import NamedTuple


class GPU(NamedTuple):
    """The figures of a GPU.

    Attributes:
        name: words that appear in the name of the device.
        flops: dense bf16 FLOP/s with float32 accumulation. Data sheets often print twice as much: the figure with
            structured sparsity.
        memory: bytes per second that its memory can read.
        link: bytes per second to the other GPUs of a node, in one direction: all links of NVLink or Infinity Fabric
            together, else PCIe.
    """

    name: str
    flops: float
    memory: float
    link: float


PCIE = 32e9  # bytes per second of PCIe 4.0 with 16 lanes, in one direction
# From the manufacturers' data sheets. The first entry whose words all appear in the name of the device is used.
GPUS = (
    GPU("GB200", 2500e12, 8.0e12, 900e9),
    GPU("B200", 2250e12, 8.0e12, 900e9),
    GPU("GH200", 989e12, 4.0e12, 450e9),
    GPU("H200 NVL", 835e12, 4.8e12, 450e9),
    GPU("H200", 989e12, 4.8e12, 450e9),
    GPU("H100 PCIe", 756e12, 2.0e12, 64e9),
    GPU("H100 NVL", 835e12, 3.9e12, 300e9),
    GPU("H100", 989e12, 3.35e12, 450e9),
    GPU("H800 PCIe", 756e12, 2.0e12, 64e9),
    GPU("H800", 989e12, 3.35e12, 200e9),
    GPU("A100 PCIe", 312e12, 1.9e12, PCIE),
    GPU("A100", 312e12, 2.0e12, 300e9),
    GPU("A800", 312e12, 2.0e12, 200e9),
    GPU("A40", 150e12, 0.696e12, PCIE),
    GPU("A30", 165e12, 0.933e12, PCIE),
    GPU("A10", 125e12, 0.6e12, PCIE),
    GPU("L40S", 362e12, 0.864e12, PCIE),
    GPU("L40", 181e12, 0.864e12, PCIE),
    GPU("L4", 121e12, 0.3e12, PCIE),
    GPU("RTX 6000 Ada", 364e12, 0.96e12, PCIE),
    GPU("RTX A6000", 155e12, 0.768e12, PCIE),
    GPU("RTX 5090", 209.5e12, 1.792e12, 64e9),
    GPU("RTX 4090", 165e12, 1.008e12, PCIE),
    GPU("RTX 3090", 71e12, 0.936e12, PCIE),
    GPU("MI325X", 1307e12, 6.0e12, 448e9),
    GPU("MI300X", 1307e12, 5.3e12, 448e9),
)
# Names with these words are of a part of a GPU (MIG), or of another chip of the same number.
OTHER_DEVICES = {"mig", "laptop", "mobile", "d", "ti"}


def find_gpu(device_name: str) -> GPU | None:
    """Return the figures of a GPU by its name in PyTorch; None if it is not in the table."""
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    if words & OTHER_DEVICES:
        return None
    return next((gpu for gpu in GPUS if words.issuperset(gpu.name.lower().split())), None)


def peak_bf16_flops(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a GPU by its name in PyTorch; None if it is not in the table."""
    gpu = find_gpu(device_name)
    return gpu.flops if gpu else None
