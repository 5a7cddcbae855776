"""Frame-causal attention: what sees what (`plan`), who computes it (`backends`), both joined (`frame_causal`)."""

from gpdit_lightning.model.attention.backends import AttentionOperator, precision_of, select_backend
from gpdit_lightning.model.attention.frame_causal import frame_causal_attention
from gpdit_lightning.model.attention.plan import Segment, attention_plan

__all__ = ["AttentionOperator", "Segment", "attention_plan", "frame_causal_attention", "precision_of", "select_backend"]
