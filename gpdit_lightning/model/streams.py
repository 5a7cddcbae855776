"""Description of a pass through the backbone: how tokens are packed, their positions, and their attention."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gpdit_lightning.model.attention import (
    KV,
    QKV,
    AttentionOperator,
    frame_causal_attention,
    select_backend,
)
from gpdit_lightning.model.config import AttentionVariant, GPDiTConfig
from gpdit_lightning.model.kv_cache import LayerCache
from gpdit_lightning.model.positions import Rope, rope_table
from gpdit_lightning.model.time_conditioning import TimeRotation


class FrameLayout(NamedTuple):
    """Positions of the frames of a pass, and the context of its noisy frames.

    Attributes:
        first_frame: the position of the first clean frame.
        noisy_frames: the positions of the noisy frames.
        context_lengths: for each noisy frame, the number of context frames that it attends to, from the first.
        draws: K, number of noisy rows that share the context of a clip.
    """

    first_frame: int = 0
    noisy_frames: tuple[int, ...] = ()
    context_lengths: tuple[int, ...] = ()
    draws: int = 1


@dataclass(frozen=True)
class Streams:
    """The streams of a pass, packed as one list of tokens: the prefix, then all clean tokens, then all noisy ones.

    With packed tokens every Linear runs once per block for clips with and without context, and each stream is a
    contiguous view.

    The prefix is a condition such as a class label: a few tokens for each noisy row, which attend to each other. The
    noisy frames of the row attend to them, at the position of the frame's first token. Clean frames do not, so that the
    same context can be used with all labels and none, and a cache stays valid when the label changes.

    Attributes:
        variant: `of2` or `of`.
        operator: computes attention without a mask.
        rows, columns: tokens of a frame.
        prefix_shape: (noisy rows, prefix tokens); (0, 0) if there is no condition.
        clean_shape: (B', clean frames); (0, 0) if there is no clean stream.
        noisy_shape: (noisy rows, noisy frames); (0, 0) if there is no noisy stream.
        context_lengths: for each noisy frame, the number of context frames that it attends to, from the first.
        clean_rope, noisy_rope: the positions of the streams' frames.
        rotation: the time conditioning of every packed token.
        draws: K, number of noisy rows that share the context of a clip.
        product_dtype: precision of matrix products and attention.
    """

    variant: AttentionVariant
    operator: AttentionOperator
    rows: int
    columns: int
    prefix_shape: tuple[int, int]
    clean_shape: tuple[int, int]
    noisy_shape: tuple[int, int]
    context_lengths: tuple[int, ...]
    clean_rope: Rope
    noisy_rope: Rope
    rotation: TimeRotation
    draws: int
    product_dtype: torch.dtype

    @property
    def tokens(self) -> int:
        """Return N, the number of tokens per frame."""
        return self.rows * self.columns

    @property
    def noisy_start(self) -> int:
        """Return the number of packed tokens before the noisy ones."""
        clips, frames = self.clean_shape
        return self._prefix_tokens + clips * frames * self.tokens

    def product_input(self, normed: Tensor) -> Tensor:
        """Return the input of a product: the output of a norm, with time conditioning, in the products' precision."""
        return self.rotation.at_branch_input(normed).to(self.product_dtype)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer_cache: LayerCache | None = None) -> Tensor:
        """Compute frame-causal attention over packed tokens.

        Args:
            query: (query tokens, heads, head width): of all packed tokens, or of the noisy ones only.
            key, value: (packed tokens, heads, head width).
            layer_cache: the block's cache, if there is one; the clean frames of the pass are appended to it.

        Returns:
            the shape of `query`, in the precision of `value`.
        """
        new = self.clean_kv(key, value)
        context = new if layer_cache is None else layer_cache.update(new)
        outputs, clean, noisy = [], None, None
        all_have_queries, dtype = len(query) == len(key), value.dtype
        if self.prefix_shape[0] and all_have_queries:
            # Prefix tokens have the same position, so RoPE would cancel. They are copied, since for a view of them the
            # backward pass would store all tokens.
            prefix = (self._prefix(x).to(dtype, copy=True) for x in (query, key, value))
            outputs.append(self.operator(*prefix).flatten(0, 1))
        if new is not None and all_have_queries:
            clean = QKV(self.clean_rope(self._clean(query), dtype), *new)
        if self.noisy_shape[0]:
            noisy = QKV(self.noisy_rope(self._noisy(query), dtype), *self._noisy_kv(key, value))
        attended = frame_causal_attention(
            self.operator, self.variant, self.tokens, context, clean, noisy, self.context_lengths, self.draws
        )
        return torch.cat(outputs + [out.flatten(0, 1) for out in attended if out is not None])

    def clean_kv(self, key: Tensor, value: Tensor) -> KV | None:
        """Return the keys, with RoPE, and values of the clean frames; None if there are none."""
        if not self.clean_shape[0]:
            return None
        return KV(self.clean_rope(self._clean(key), value.dtype), self._clean(value))

    def _noisy_kv(self, key: Tensor, value: Tensor) -> KV:
        """Return the keys and values of each noisy frame: those of the prefix of its row, then those of the frame."""
        own_key, own_value = self.noisy_rope(self._noisy(key), value.dtype), self._noisy(value)
        if not self.prefix_shape[0]:
            return KV(own_key, own_value)
        frames = self.noisy_shape[1]
        prefix_key = self.noisy_rope.at_first_tokens(self._prefix(key), value.dtype)
        prefix_value = self._prefix(value)[:, None].expand(-1, frames, -1, -1, -1)
        pairs = (prefix_key, own_key), (prefix_value, own_value)
        return KV(*(torch.cat((first, own.unflatten(1, (frames, -1))), dim=2).flatten(1, 2) for first, own in pairs))

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


def describe_streams(
    config: GPDiTConfig,
    layout: FrameLayout,
    x: Tensor,
    product_dtype: torch.dtype,
    prefix: Tensor | None,
    clean: Tensor | None,
    noisy: Tensor | None,
    theta: Tensor | None,
) -> Streams:
    """Describe a pass.

    Args:
        config: the architecture.
        layout: the positions of the frames.
        x: (packed tokens, D), in the precision of the residual stream, which rotations have too.
        product_dtype: precision of matrix products and attention.
        prefix: (B, prefix tokens, D) or None.
        clean: (B', F', C, H, W) or None.
        noisy: (B, F, C, H, W) or None.
        theta: (B, F) radians if there are noisy frames, else None.
    """
    some = clean if clean is not None else noisy
    assert some is not None
    rows, columns = (side // config.patch_size for side in some.shape[-2:])
    clean_shape = _stream_shape(clean)
    angles = torch.zeros(len(x), device=x.device, dtype=x.dtype)
    if theta is not None:
        per_token = theta.to(x.device, x.dtype).flatten().repeat_interleave(rows * columns)
        angles[len(x) - len(per_token) :] = per_token
    table = partial(rope_table, config, rows=rows, columns=columns, device=x.device, dtype=x.dtype)
    return Streams(
        variant=config.attention,
        operator=select_backend(config.attention_backend, x.device.type, product_dtype, config.head_width),
        rows=rows,
        columns=columns,
        prefix_shape=_stream_shape(prefix),
        clean_shape=clean_shape,
        noisy_shape=_stream_shape(noisy),
        context_lengths=layout.context_lengths,
        clean_rope=table(frames=range(layout.first_frame, layout.first_frame + clean_shape[1])),
        noisy_rope=table(frames=layout.noisy_frames),
        rotation=TimeRotation(angles, config.time_site),
        draws=layout.draws,
        product_dtype=product_dtype,
    )


def _stream_shape(stream: Tensor | None) -> tuple[int, int]:
    return (stream.shape[0], stream.shape[1]) if stream is not None else (0, 0)
