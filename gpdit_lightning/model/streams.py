"""Description of a pass through the backbone: how tokens are packed, their positions, and their attention."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gpdit_lightning.model.attention import (
    KV,
    QKV,
    AttentionPlan,
    BlockSizes,
    PlannedAttention,
    plan_attention,
    select_backend,
)
from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.model.kv_cache import LayerCache
from gpdit_lightning.model.layout import BlockLayout, ClipBlocks
from gpdit_lightning.model.positions import Rope, rope_table
from gpdit_lightning.model.time_conditioning import Branch, TimeConditioning


class PassBlocks(NamedTuple):
    """The blocks of a pass, and the context of its noisy blocks.

    Attributes:
        layout: the blocks of a clip.
        frames: latent frames of the clip.
        clean: the numbers of the clean blocks.
        noisy: the numbers of the noisy blocks.
        contexts: for each noisy block, the number of context tokens that it attends to, from the first.
        draws: K, number of noisy rows that share the context of a clip.
        cached: number of clips in a cache, and of their tokens, which precede the clean blocks of the pass.
    """

    layout: BlockLayout
    frames: int
    clean: range = range(0)
    noisy: tuple[int, ...] = ()
    contexts: tuple[int, ...] = ()
    draws: int = 1
    cached: tuple[int, int] = (0, 0)

    @classmethod
    def of_clip(cls, clip: ClipBlocks, has_context: bool = True, draws: int = 1) -> "PassBlocks":
        """Return the blocks of a pass whose noisy blocks are those of a clip, each with all clean blocks before it.

        Args:
            clip: the noisy blocks.
            has_context: whether there are clean blocks.
            draws: K.
        """
        contexts = clip.layout.contexts(clip.blocks, clip.frames)
        clean = range(clip.blocks[-1] if has_context else 0)  # no block attends to the last clean block
        return cls(clip.layout, clip.frames, clean, clip.blocks, contexts, draws)

    def sizes(self, causal: bool) -> BlockSizes:
        """Return the tokens of the blocks, where a frame attends to no later frame of its block if `causal`."""
        clean, noisy = (self.layout.sizes(blocks, self.frames) for blocks in (self.clean, self.noisy))
        return BlockSizes(clean, noisy, self.contexts, self.layout.frame_tokens if causal else None)


class LayerPlans(NamedTuple):
    """The attention of the layers of a pass.

    Attributes:
        all_queries: of layers in which all tokens have queries.
        noisy_queries: of a last layer in which only noisy tokens have them, if there are any.
        within_frames: of every frame to itself, if attention is factorized and the others are along time.
    """

    all_queries: AttentionPlan
    noisy_queries: AttentionPlan
    within_frames: AttentionPlan | None


def plan_layers(config: GPDiTConfig, blocks: PassBlocks, clips: int, rows: int, prefix_tokens: int = 0) -> LayerPlans:
    """Plan the attention of a pass.

    Args:
        config: the architecture.
        blocks: the blocks of the pass.
        clips: number of clean clips in the pass, or 0.
        rows: number of noisy rows, or 0.
        prefix_tokens: number of tokens of the prefix of each row.
    """
    sizes, context_clips, within_frames = blocks.sizes(config.causal_in_block), clips or blocks.cached[0], None
    cached_tokens = blocks.cached[1]
    if config.factorized:  # along time: every place of a frame is a row
        tokens = blocks.layout.frame_tokens
        frames = (clips * sum(sizes.clean) + rows * sum(sizes.noisy)) // tokens
        within_frames = plan_attention(config.attention, BlockSizes(noisy=(tokens,)), clips=0, rows=frames)
        sizes, cached_tokens = sizes.along_time(tokens), cached_tokens // tokens
        context_clips, rows = context_clips * tokens, rows * tokens
    plan = partial(
        plan_attention,
        config.attention,
        sizes,
        context_clips,
        rows,
        draws=blocks.draws,
        prefix_tokens=prefix_tokens,
        cached_tokens=cached_tokens,
    )
    return LayerPlans(plan(all_queries=True), plan(all_queries=not rows), within_frames)


@dataclass(frozen=True)
class Streams:
    """The streams of a pass, packed as one list of tokens: the prefix, then all clean tokens, then all noisy ones.

    With packed tokens every Linear runs once per block of the transformer for clips with and without context, and each
    stream is a contiguous view. The tokens of a clip are packed block after block.

    The prefix is a condition such as a class label: a few tokens for each noisy row, which attend to each other. The
    noisy blocks of the row attend to them, at the position of the block's first token. Clean blocks do not, so that the
    same context can be used with all labels and none, and a cache stays valid when the label changes.

    Attributes:
        all_queries, noisy_queries, within_frames: the attention of the layers, see `LayerPlans`.
        sizes: tokens of the blocks of both streams.
        frame_tokens: N, tokens per frame.
        factorized: whether `attend` is along time, at each place of a frame.
        prefix_shape: (noisy rows, prefix tokens); (0, 0) if there is no condition.
        clips: B', number of clean clips; 0 if there is no clean stream.
        rows: number of noisy rows; 0 if there is no noisy stream.
        clean_rope, noisy_rope: the positions of the streams' tokens.
        time: the time conditioning of every packed token.
        product_dtype: precision of matrix products and attention.
    """

    all_queries: PlannedAttention
    noisy_queries: PlannedAttention
    within_frames: PlannedAttention | None
    sizes: BlockSizes
    frame_tokens: int
    factorized: bool
    prefix_shape: tuple[int, int]
    clips: int
    rows: int
    clean_rope: Rope
    noisy_rope: Rope
    time: TimeConditioning
    product_dtype: torch.dtype

    @property
    def noisy_start(self) -> int:
        """Return the number of packed tokens before the noisy ones."""
        return self._prefix_tokens + self.clips * sum(self.sizes.clean)

    def product_input(self, normed: Tensor, time: Branch) -> Tensor:
        """Return the input of a product: the output of a norm, with time conditioning, in the products' precision."""
        return time.at_branch_input(normed).to(self.product_dtype)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer_cache: LayerCache | None = None) -> Tensor:
        """Compute block-causal attention over packed tokens.

        Args:
            query: (query tokens, heads, head width): of all packed tokens, or of the noisy ones only.
            key, value: (packed tokens, heads, head width).
            layer_cache: the cache of the block of the transformer, if there is one; the clean blocks of the pass are
                appended to it.

        Returns:
            the shape of `query`, in the precision of `value`.
        """
        new = self.clean_kv(key, value)
        context = new if layer_cache is None else layer_cache.update(new)
        planned = self.all_queries if len(query) == len(key) else self.noisy_queries
        parts, dtype = [], value.dtype
        if planned is self.all_queries:
            if self.prefix_shape[0]:
                # Prefix tokens have the same position, so RoPE would cancel. They are copied, since for a view of them
                # the backward pass would store all tokens.
                parts.append(QKV(*(self._prefix(x).to(dtype, copy=True) for x in (query, key, value))))
            if new is not None:
                parts.append(QKV(self.clean_rope(self._clean(query), dtype), *new))
        if self.rows:
            noisy = QKV(self.noisy_rope(self._noisy(query), dtype), *self._noisy_kv(key, value))
            parts += self._by_context(noisy, planned.plan)
        if self.factorized:
            context = KV(*map(self._fold, context)) if context else None
            parts = [QKV(*map(self._fold, part)) for part in parts]
        outputs = planned(context, parts)
        return torch.cat([(self._unfold(out) if self.factorized else out).flatten(0, 1) for out in outputs])

    def attend_within_frames(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute the attention of every frame to itself, over packed tokens (packed tokens, heads, head width)."""
        parts = [(self._clean, self.clean_rope)] if self.clips else []
        parts += [(self._noisy, self.noisy_rope)] if self.rows else []
        query, key = (torch.cat([rope(of(x), value.dtype).flatten(0, 1) for of, rope in parts]) for x in (query, key))
        frames = QKV(*(x.unflatten(0, (-1, self.frame_tokens)) for x in (query, key, value)))
        assert self.within_frames is not None
        (attended,) = self.within_frames(None, [frames])
        return attended.flatten(0, 1)

    def clean_kv(self, key: Tensor, value: Tensor) -> KV | None:
        """Return the keys, with RoPE, and values of the clean blocks; None if there are none."""
        if not self.clips:
            return None
        return KV(self.clean_rope(self._clean(key), value.dtype), self._clean(value))

    def _noisy_kv(self, key: Tensor, value: Tensor) -> KV:
        """Return the keys and values of each noisy block: those of the prefix of its row, then those of the block."""
        own_key, own_value = self.noisy_rope(self._noisy(key), value.dtype), self._noisy(value)
        if not self.prefix_shape[0]:
            return KV(own_key, own_value)
        prefix_key = self.noisy_rope.at_first_tokens(self._prefix(key), value.dtype)
        prefix_value = self._prefix(value)[:, None].expand(-1, len(self.sizes.noisy), -1, -1, -1)
        pairs = (prefix_key, own_key), (prefix_value, own_value)
        return KV(*(torch.cat(list(self._interleave(*pair)), dim=1) for pair in pairs))

    def _by_context(self, noisy: QKV, plan: AttentionPlan) -> list[QKV]:
        """Return the noisy rows with and without context, which are the last parts of a plan."""
        rows = [part.rows for part in plan.parts if part.segments[0].stream == "noisy"]
        rows = [count // self.frame_tokens for count in rows] if self.factorized else rows
        return [noisy] if len(rows) == 1 else list(map(QKV, *(x.split(rows) for x in noisy)))

    def _interleave(self, prefix: Tensor, own: Tensor) -> Iterator[Tensor]:
        """Yield the prefix (R, blocks, L, ...) and the tokens (R, tokens, ...) of each block in turn."""
        for of_block, tokens in zip(prefix.unbind(1), own.split(self.sizes.noisy, dim=1), strict=True):
            yield from (of_block, tokens)

    def _fold(self, x: Tensor) -> Tensor:
        """(B, frames * N, ...) -> (B * N, frames, ...)."""
        return x.unflatten(1, (-1, self.frame_tokens)).transpose(1, 2).flatten(0, 1)

    def _unfold(self, x: Tensor) -> Tensor:
        """(B * N, frames, ...) -> (B, frames * N, ...)."""
        return x.unflatten(0, (-1, self.frame_tokens)).transpose(1, 2).flatten(1, 2)

    @property
    def _prefix_tokens(self) -> int:
        rows, tokens = self.prefix_shape
        return rows * tokens

    def _prefix(self, packed: Tensor) -> Tensor:
        return packed[: self._prefix_tokens].unflatten(0, self.prefix_shape)

    def _clean(self, packed: Tensor) -> Tensor:
        return packed[self._prefix_tokens : self.noisy_start].unflatten(0, (self.clips, -1))

    def _noisy(self, packed: Tensor) -> Tensor:
        count = self.rows * sum(self.sizes.noisy)
        return packed[len(packed) - count :].unflatten(0, (self.rows, -1))


def describe_streams(
    config: GPDiTConfig,
    blocks: PassBlocks,
    x: Tensor,
    product_dtype: torch.dtype,
    prefix: Tensor | None,
    clips: int,
    rows: int,
    time: TimeConditioning,
) -> Streams:
    """Describe a pass.

    Args:
        config: the architecture.
        blocks: the blocks of the pass.
        x: (packed tokens, D), in the precision of the residual stream, which rotations have too.
        product_dtype: precision of matrix products and attention.
        prefix: (rows, prefix tokens, D) or None.
        clips: number of clean clips, or 0.
        rows: number of noisy rows, or 0.
        time: the time conditioning of all tokens.
    """
    backend = select_backend(config.attention_backend, x.device.type, product_dtype, config.head_width)
    prefix_shape = (prefix.shape[0], prefix.shape[1]) if prefix is not None else (0, 0)
    plans = plan_layers(config, blocks, clips, rows, prefix_shape[1])
    planned = partial(PlannedAttention.of, backend, device=x.device)
    table = partial(rope_table, config, blocks.layout, frames=blocks.frames, device=x.device, dtype=x.dtype)
    return Streams(
        all_queries=planned(plans.all_queries),
        noisy_queries=planned(plans.noisy_queries),
        within_frames=planned(plans.within_frames) if plans.within_frames else None,
        sizes=blocks.sizes(config.causal_in_block),
        frame_tokens=blocks.layout.frame_tokens,
        factorized=config.factorized,
        prefix_shape=prefix_shape,
        clips=clips,
        rows=rows,
        clean_rope=table(blocks=blocks.clean),
        noisy_rope=table(blocks=blocks.noisy),
        time=time,
        product_dtype=product_dtype,
    )
