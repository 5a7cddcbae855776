"""The kernel that computes attention, as PyTorch's dispatcher calls it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.attention
from torch.utils._python_dispatch import TorchDispatchMode

# Parts of an operator's name, and the kernel that it stands for; the first that matches.
KERNELS = {
    "xformers_flash3": "FlashAttention 3",
    "xformers_flash": "FlashAttention 2",
    "flash_attn_3": "FlashAttention 3",
    "flash_attention_for_cpu": "PyTorch's for the CPU",
    "flash_attention": "FlashAttention 2",
    "efficient_attention": "CUTLASS",
    "cudnn_attention": "cuDNN",
}


class KernelRecorder(TorchDispatchMode):
    """Records the operators of attention that are called in its context.

    Attributes:
        kernels: names of kernels, in the order of their first call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        kernel = next((kernel for part, kernel in KERNELS.items() if part in name), None)
        if kernel is not None:
            active = torch.nn.attention.current_flash_attention_impl()
            if active and name.startswith("aten::") and kernel == "FlashAttention 2":
                kernel = f"FlashAttention {active.removeprefix('FA')}"
            text = f"{kernel}, {name}"
            if text not in self.kernels:
                self.kernels.append(text)
        return function(*args, **(kwargs or {}))


def kernels_of(run: Callable[[], Any]) -> str:
    """Return the kernels of attention in a computation, such as `FlashAttention 2, xformers_flash::flash_fwd`.

    On Hopper the text states that xformers runs FlashAttention 2 for want of the package of FlashAttention 3.
    """
    with KernelRecorder() as recorder:
        run()
    text = "; ".join(recorder.kernels) or "matrix products without a fused kernel"
    if "xformers_flash::" in text and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        text += ", since flash_attn_3 is not installed"
    return text
