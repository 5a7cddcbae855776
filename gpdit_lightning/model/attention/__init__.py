"""Block-causal attention: which tokens attend to which (`plan`), operators (`backends`), and both (`block_causal`)."""

from gpdit_lightning.model.attention.backends import (
    AttentionOperator,
    find_backend,
    register_attention_backend,
    select_backend,
)
from gpdit_lightning.model.attention.block_causal import KV, QKV, BlockSizes, block_causal_attention
from gpdit_lightning.model.attention.plan import Segment, attention_plan

__all__ = [
    "KV",
    "QKV",
    "AttentionOperator",
    "BlockSizes",
    "Segment",
    "attention_plan",
    "block_causal_attention",
    "find_backend",
    "register_attention_backend",
    "select_backend",
]
