"""GPDiT: an autoregressive diffusion transformer that denoises each video frame given the clean frames before it."""

import importlib
from typing import TYPE_CHECKING, Any

from gpdit_lightning.errors import InputError
from gpdit_lightning.version import __version__

if TYPE_CHECKING:
    from gpdit_lightning.checkpoints.hub import HubGPDiT as GPDiT
    from gpdit_lightning.generation.pipeline import GPDiTPipeline
    from gpdit_lightning.model import GPDiTConfig

__all__ = ["GPDiT", "GPDiTConfig", "GPDiTPipeline", "InputError", "__version__"]

# Imported at first use: the command line prints its help without importing torch.
_LAZY = {
    "GPDiT": ("checkpoints.hub", "HubGPDiT"),
    "GPDiTConfig": ("model", "GPDiTConfig"),
    "GPDiTPipeline": ("generation.pipeline", "GPDiTPipeline"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
