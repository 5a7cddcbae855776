"""GPDiT: a transformer that generates video latents frame by frame, each denoised given the clean frames before it."""

from gpdit_lightning.errors import InputError
from gpdit_lightning.model import GPDiT, GPDiTConfig

__version__ = "0.1.0"
__all__ = ["GPDiT", "GPDiTConfig", "InputError", "__version__"]
