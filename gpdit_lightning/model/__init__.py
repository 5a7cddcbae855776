"""The backbone: configuration, positions, time conditioning, attention, blocks, KV cache."""

from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.model.gpdit import GPDiT
from gpdit_lightning.model.kv_cache import KVCache

__all__ = ["GPDiT", "GPDiTConfig", "KVCache"]
