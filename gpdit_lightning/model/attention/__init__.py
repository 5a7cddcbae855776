"""Block-causal attention: which tokens attend to which (`plan`), and the backends that compute it."""

from gpdit_lightning.model.attention.backends import (
    find_backend,
    register_attention_backend,
    select_backend,
)
from gpdit_lightning.model.attention.base import AttentionBackend, AttentionOperator, PlannedAttention, Sliced
from gpdit_lightning.model.attention.gather import KV, QKV
from gpdit_lightning.model.attention.plan import AttentionPlan, BlockSizes, RowsPlan, Segment, plan_attention

__all__ = [
    "KV",
    "QKV",
    "AttentionBackend",
    "AttentionOperator",
    "AttentionPlan",
    "BlockSizes",
    "PlannedAttention",
    "RowsPlan",
    "Segment",
    "Sliced",
    "find_backend",
    "plan_attention",
    "register_attention_backend",
    "select_backend",
]
