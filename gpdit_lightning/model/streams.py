"""One pass through the backbone as its blocks see it: how tokens are packed, where they stand, what they may see."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gpdit_lightning.model.attention import AttentionOperator, frame_causal_attention
from gpdit_lightning.model.attention.frame_causal import Context, Queries
from gpdit_lightning.model.config import AttentionVariant
from gpdit_lightning.model.kv_cache import KVCache
from gpdit_lightning.model.positions import Rope
from gpdit_lightning.model.time_conditioning import TimeRotation


@dataclass(frozen=True)
class Streams:
    """The two streams of a pass, packed as one list of tokens: all clean tokens, then all noisy ones.

    Packing runs every Linear once per block whatever the mixture of clips with and without context, and keeps each
    stream a contiguous view.

    Attributes:
        variant: `of2` or `of`.
        operator: computes one unmasked attention call.
        tokens: N, tokens per frame.
        clean_shape: (B', clean frames); (0, 0) if there is no clean stream.
        noisy_shape: (noisy rows, noisy frames); (0, 0) if there is no noisy stream.
        first_frame: position of the first frame of either stream: the frames that `cache` held before.
        rope: positions from `first_frame` on.
        rotation: the time conditioning of every packed token.
        draws: K, noisy rows that share the context of a clip.
        cache: past keys and values, extended by the clean stream; None when everything is in this pass.
    """

    variant: AttentionVariant
    operator: AttentionOperator
    tokens: int
    clean_shape: tuple[int, int]
    noisy_shape: tuple[int, int]
    first_frame: int
    rope: Rope
    rotation: TimeRotation
    draws: int = 1
    cache: KVCache | None = None

    @property
    def clean_tokens(self) -> int:
        """Number of packed clean tokens."""
        clips, frames = self.clean_shape
        return clips * frames * self.tokens

    def _clean(self, packed: Tensor) -> Tensor:
        return packed[: self.clean_tokens].unflatten(0, (self.clean_shape[0], -1))

    def _noisy(self, packed: Tensor) -> Tensor:
        count = self.noisy_shape[0] * self.noisy_shape[1] * self.tokens
        return packed[len(packed) - count :].unflatten(0, (self.noisy_shape[0], -1))

    def remember(self, layer: int, key: Tensor, value: Tensor) -> Context | None:
        """The context of a block: this pass's clean keys (positions applied) behind the cached ones.

        Args:
            layer: index of the block.
            key, value: packed, (packed tokens, heads, head width).
        """
        clean = None
        if self.clean_tokens:
            clean = Context(self.rope(self._clean(key), value.dtype), self._clean(value))
        if self.cache is None:
            return clean
        if clean is not None:
            self.cache.write(layer, *clean)
        return self.cache.context(layer, self.first_frame + self.clean_shape[1])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Frame-causal attention of a block over packed tokens, shaped like `query`, in the precision of `value`.

        Args:
            layer: index of the block.
            query: (asking tokens, heads, head width): all packed tokens, or the noisy ones only.
            key, value: (packed tokens, heads, head width).
        """
        context = self.remember(layer, key, value)
        clean = noisy = None
        dtype = value.dtype
        if self.clean_tokens and len(query) == len(key):
            assert context is not None
            start = self.first_frame * self.tokens
            clean = Queries(self.rope(self._clean(query), dtype), context.key[:, start:], context.value[:, start:])
        if self.noisy_shape[0]:
            asking, own = (self.rope(self._noisy(x), dtype) for x in (query, key))
            noisy = Queries(asking, own, self._noisy(value))
        outputs = frame_causal_attention(
            self.operator, self.variant, self.tokens, context, clean, noisy, self.first_frame, self.draws
        )
        return torch.cat([out.flatten(0, 1) for out in outputs if out is not None])
