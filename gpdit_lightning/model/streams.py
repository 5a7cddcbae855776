"""One pass through the backbone as its blocks see it: how tokens are packed, where they stand, what they may see."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gpdit_lightning.model.attention import AttentionOperator, frame_causal_attention
from gpdit_lightning.model.attention.frame_causal import Context, Queries
from gpdit_lightning.model.config import AttentionVariant
from gpdit_lightning.model.kv_cache import Memory
from gpdit_lightning.model.positions import Rope
from gpdit_lightning.model.time_conditioning import TimeRotation


@dataclass(frozen=True)
class Streams:
    """The streams of a pass, packed as one list of tokens: the prefix, then all clean tokens, then all noisy ones.

    Packing runs every Linear once per block whatever the mixture of clips with and without context, and keeps each
    stream a contiguous view.

    The prefix is a condition such as a class label: a few tokens for each noisy row, which see each other and are seen
    by the frames of that row, each of them at the place of the frame's first token. Clean frames do not see it, so that
    one context serves all labels and none, and a cache outlives a change of label.

    Attributes:
        variant: `of2` or `of`.
        operator: computes one unmasked attention call.
        tokens: N, tokens per frame.
        prefix_shape: (noisy rows, prefix tokens); (0, 0) if there is no condition.
        clean_shape: (B', clean frames); (0, 0) if there is no clean stream.
        noisy_shape: (noisy rows, noisy frames); (0, 0) if there is no noisy stream.
        noisy_sees: for each noisy frame, how many frames of the context it sees, from the first.
        clean_rope, noisy_rope: where the frames of the streams stand.
        rotation: the time conditioning of every packed token.
        draws: K, noisy rows that share the context of a clip.
    """

    variant: AttentionVariant
    operator: AttentionOperator
    tokens: int
    prefix_shape: tuple[int, int]
    clean_shape: tuple[int, int]
    noisy_shape: tuple[int, int]
    noisy_sees: tuple[int, ...]
    clean_rope: Rope
    noisy_rope: Rope
    rotation: TimeRotation
    draws: int = 1

    @property
    def noisy_start(self) -> int:
        """Number of packed tokens before the noisy ones."""
        clips, frames = self.clean_shape
        return self._prefix_tokens + clips * frames * self.tokens

    @property
    def _prefix_tokens(self) -> int:
        rows, tokens = self.prefix_shape
        return rows * tokens

    def _prefix(self, packed: Tensor) -> Tensor:
        return packed[: self._prefix_tokens].unflatten(0, self.prefix_shape)

    def _clean(self, packed: Tensor) -> Tensor:
        return packed[self._prefix_tokens : self.noisy_start].unflatten(0, (self.clean_shape[0], -1))

    def _noisy(self, packed: Tensor) -> Tensor:
        count = self.noisy_shape[0] * self.noisy_shape[1] * self.tokens
        return packed[len(packed) - count :].unflatten(0, (self.noisy_shape[0], -1))

    def context(self, key: Tensor, value: Tensor, memory: Memory | None) -> tuple[Context | None, Context | None]:
        """The context of a block, and this pass's part of it, written to the cache if there is one.

        Args:
            key, value: packed, (packed tokens, heads, head width).
            memory: the block's part of the cache.
        """
        clean = None
        if self.clean_shape[0]:
            clean = Context(self.clean_rope(self._clean(key), value.dtype), self._clean(value))
        if memory is None:
            return clean, clean
        if clean is not None:
            memory.write(*clean)
        return memory.context(self.tokens), clean

    def attend(self, query: Tensor, key: Tensor, value: Tensor, memory: Memory | None = None) -> Tensor:
        """Frame-causal attention of a block over packed tokens, shaped like `query`, in the precision of `value`.

        Args:
            query: (asking tokens, heads, head width): all packed tokens, or the noisy ones only.
            key, value: (packed tokens, heads, head width).
            memory: the block's part of a cache.
        """
        context, written = self.context(key, value, memory)
        outputs, noisy, asking_clean = [], None, None
        all_ask, dtype = len(query) == len(key), value.dtype
        if self.prefix_shape[0] and all_ask:
            # All of them stand at one place, so that their own positions cancel. Copied: the backward pass would keep
            # all tokens for a view of a few.
            prefix = (self._prefix(x).to(dtype, copy=True) for x in (query, key, value))
            outputs.append(self.operator(*prefix).flatten(0, 1))
        if written is not None and all_ask:
            asking_clean = Queries(self.clean_rope(self._clean(query), dtype), *written)
        if self.noisy_shape[0]:
            noisy = Queries(self.noisy_rope(self._noisy(query), dtype), *self._own(key, value))
        attended = frame_causal_attention(
            self.operator, self.variant, self.tokens, context, asking_clean, noisy, self.noisy_sees, self.draws
        )
        return torch.cat(outputs + [out.flatten(0, 1) for out in attended if out is not None])

    def _own(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that each noisy frame has of its own, behind its row's prefix."""
        own_key, own_value = self.noisy_rope(self._noisy(key), value.dtype), self._noisy(value)
        if not self.prefix_shape[0]:
            return own_key, own_value
        frames = self.noisy_shape[1]
        prefix_key = self.noisy_rope.at_corners(self._prefix(key), value.dtype)
        prefix_value = self._prefix(value)[:, None].expand(-1, frames, -1, -1, -1)
        pairs = (prefix_key, own_key), (prefix_value, own_value)
        joined = (torch.cat((first, own.unflatten(1, (frames, -1))), dim=2).flatten(1, 2) for first, own in pairs)
        own_key, own_value = joined
        return own_key, own_value
