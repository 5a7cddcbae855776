"""The interface of an attention backend: it computes a layer as the plan describes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from gpdit_lightning.model.attention.gather import KV, QKV, attention_calls, collect_outputs
from gpdit_lightning.model.attention.plan import AttentionPlan

AttentionOperator = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention without a mask: query (batch, M, heads, head width), key and value (batch, N, heads, head width), all of
one dtype, to softmax(query key^T / sqrt(head width)) value, shaped like the query. This is the layout of xformers."""


class AttentionBackend(ABC):
    """Computes the attention of a layer.

    Attributes:
        kernel: the kernel that computes it, if PyTorch's dispatcher cannot tell; else None.
    """

    kernel: ClassVar[str | None] = None

    def obstacle(self, device_type: str, dtype: torch.dtype, gradient: bool) -> str | None:
        """Return the reason why the backend cannot be used, if one is known without a call; else None.

        Args:
            device_type: `cpu`, `cuda`, ...
            dtype: precision of queries, keys and values.
            gradient: whether a backward pass is needed.
        """
        return None

    def prepare(self, plan: AttentionPlan, device: torch.device) -> Any:
        """Return what `attend` needs besides the plan, such as a mask; called once per pass, outside compiled code."""
        return None

    @abstractmethod
    def attend(self, plan: AttentionPlan, prepared: Any, context: KV | None, parts: Sequence[QKV]) -> list[Tensor]:
        """Compute the attention of a layer.

        Args:
            plan: which tokens attend to which.
            prepared: the result of `prepare` for this plan.
            context: keys and values of the context, of any precision; None: there is none.
            parts: queries, keys and values of each part of the plan.

        Returns:
            the outputs of each part, with shape and precision of its queries.
        """


class Sliced(AttentionBackend):
    """One call of an operator per segment, on slices of the keys.

    Args:
        operator: attention without a mask.
    """

    def __init__(self, operator: AttentionOperator) -> None:
        self.operator = operator

    def attend(self, plan: AttentionPlan, prepared: Any, context: KV | None, parts: Sequence[QKV]) -> list[Tensor]:
        """Compute the attention of a layer."""
        return collect_outputs(plan, [self.operator(*call) for call in attention_calls(plan, context, parts)])


@dataclass(frozen=True)
class PlannedAttention:
    """A backend with a plan.

    Attributes:
        backend: the backend.
        plan: the plan.
        prepared: what the backend prepared for the plan.
    """

    backend: AttentionBackend
    plan: AttentionPlan
    prepared: Any

    @classmethod
    def of(cls, backend: AttentionBackend, plan: AttentionPlan, device: torch.device) -> Self:
        """Prepare a backend for a plan on a device."""
        return cls(backend, plan, backend.prepare(plan, device))

    def __call__(self, context: KV | None, parts: Sequence[QKV]) -> list[Tensor]:
        """Compute the attention; see :meth:`AttentionBackend.attend`."""
        return self.backend.attend(self.plan, self.prepared, context, parts)
