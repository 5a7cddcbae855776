"""The backbone: configuration, positions, time conditioning, attention, blocks, KV cache."""

from gpdit_lightning.model.attention import register_attention_backend
from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.model.gpdit import GPDiT
from gpdit_lightning.model.kv_cache import KVCache
from gpdit_lightning.model.prefix import NO_LABEL

__all__ = ["NO_LABEL", "GPDiT", "GPDiTConfig", "KVCache", "register_attention_backend"]
