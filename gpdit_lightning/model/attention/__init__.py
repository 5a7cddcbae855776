"""Frame-causal attention: which frames attend to which (`plan`), operators (`backends`), and both (`frame_causal`)."""

from gpdit_lightning.model.attention.backends import (
    AttentionOperator,
    find_backend,
    register_attention_backend,
    select_backend,
)
from gpdit_lightning.model.attention.frame_causal import KV, QKV, frame_causal_attention
from gpdit_lightning.model.attention.plan import Segment, attention_plan

__all__ = [
    "KV",
    "QKV",
    "AttentionOperator",
    "Segment",
    "attention_plan",
    "find_backend",
    "frame_causal_attention",
    "register_attention_backend",
    "select_backend",
]
