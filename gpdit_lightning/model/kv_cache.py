"""Cache of the keys and values of previous clean blocks, for generation in linear time (GPDiT, section 4.1.1)."""

from typing import NamedTuple

import torch
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.model.attention import KV
from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.model.layout import BlockLayout
from gpdit_lightning.model.positions import shift_frames


class LayerCache(NamedTuple):
    """The cache of one block during a pass.

    Attributes:
        key, value: (B, capacity in tokens, heads, head width); RoPE is already applied to the keys.
        slots: (new tokens,) indices at which the clean tokens of this pass are written; None if it has none.
        length: number of tokens in the cache, with the new ones.
    """

    key: Tensor
    value: Tensor
    slots: Tensor | None
    length: int

    def update(self, new: KV | None) -> KV | None:
        """Write the keys and values of this pass's clean blocks; return those of all blocks, or None if there are none.

        Args:
            new: each (B, new tokens, heads, head width); None if the pass has no clean blocks.
        """
        if new is not None:
            assert self.slots is not None
            with torch.no_grad():
                self.key.index_copy_(1, self.slots, new.key.to(self.key.dtype))
                self.value.index_copy_(1, self.slots, new.value.to(self.value.dtype))
        return KV(self.key[:, : self.length], self.value[:, : self.length]) if self.length else None


class KVCache:
    """Preallocated keys and values of all blocks; :meth:`GPDiT.new_cache` creates it, `extend` and `denoise` fill it.

    A pass calls `begin_pass`, gives each block of the transformer its `layer_cache`, and ends with `end_pass`.

    A rolling cache keeps the first frames of the video (the sinks) and its latest ones (the window): a new block
    overwrites the oldest of the window, so that memory and time per block stay constant. Attention does not depend on
    the order of the keys. Positions are relative, and the sinks are shifted so that they always immediately precede the
    window: no distance exceeds the length of the cache (attention sinks: Xiao et al., 2023, section 3.2).

    Args:
        config: the architecture.
        batch_size: B, number of clips.
        max_frames: capacity in latent frames.
        height, width: size of a latent frame, in latent pixels.
        device, dtype: device and precision of the buffers.
        sinks: number of first frames that a rolling cache keeps; None: the cache does not roll, and refuses more than
            `max_frames`.

    Attributes:
        layout: the blocks of a clip.
        blocks, appended_tokens: numbers of clean blocks and their tokens appended so far.
        tokens: N, tokens per frame.

    Raises:
        InputError: there is no capacity for a window of at least one block, or a rolling cache has other frames than
            those of whole blocks.
    """

    def __init__(
        self,
        config: GPDiTConfig,
        batch_size: int,
        max_frames: int,
        height: int,
        width: int,
        device: torch.device,
        dtype: torch.dtype,
        sinks: int | None = None,
    ) -> None:
        self.layout = BlockLayout.of(config, height, width)
        if sinks is not None:
            _check_rolling(config, max_frames, sinks)
        self.config, self.sinks = config, sinks
        self.batch_size, self.max_frames, self.height, self.width = batch_size, max_frames, height, width
        self.blocks = 0
        self.tokens = self.layout.frame_tokens
        self.appended_tokens = 0
        self.max_tokens = max_frames * self.tokens
        shape = (config.layers, 2, batch_size, self.max_tokens, config.heads, config.head_width)
        self._buffer = torch.empty(shape, device=device, dtype=dtype)
        self._sink_keys: Tensor | None = None  # at their original positions, from which all shifts start
        self._new = (0, 0)  # blocks and tokens of the current pass
        self._slots: Tensor | None = None  # of its tokens

    @property
    def device(self) -> torch.device:
        """Return the device of the buffers."""
        return self._buffer.device

    @property
    def frames(self) -> int:
        """Return the number of frames appended so far, without a frame of which only some blocks were."""
        return self.appended_tokens // self.tokens

    @property
    def max_new_tokens(self) -> int:
        """Return the number of tokens that one pass can append: the free capacity, or a block if the cache rolls."""
        free = max(self.max_tokens - self.appended_tokens, 0)
        return free if self.sinks is None else free or self.layout.frames * self.tokens

    def stored_tokens(self, new_tokens: int = 0) -> int:
        """Return the number of tokens in the cache after `new_tokens` more are appended."""
        return min(self.appended_tokens + new_tokens, self.max_tokens)

    def tokens_before(self, new_tokens: int) -> tuple[int, int]:
        """Return the number of clips, and of their tokens that remain in the cache before `new_tokens` more."""
        return self.batch_size, self.stored_tokens(new_tokens) - new_tokens

    def begin_pass(self, new_blocks: int, new_tokens: int) -> None:
        """Prepare a pass with clean blocks: shift the sinks, and choose the slots of the new tokens."""
        self._new, self._slots = (new_blocks, new_tokens), None
        if not new_tokens:
            return
        self._shift_sinks(new_tokens)
        first = self.appended_tokens
        if self.sinks is not None and first >= self.max_tokens:
            sink_tokens = self.sinks * self.tokens
            first = sink_tokens + (first - sink_tokens) % (self.max_tokens - sink_tokens)
        self._slots = torch.arange(first, first + new_tokens, device=self.device, dtype=torch.long)

    def layer_cache(self, layer: int) -> LayerCache:
        """Return the cache of block `layer` of the transformer, from 0, during a pass."""
        key, value = self._buffer[layer]
        return LayerCache(key, value, self._slots, self.stored_tokens(self._new[1]))

    def end_pass(self) -> None:
        """Count the clean blocks of the pass, after all blocks of the transformer have appended them."""
        self.blocks += self._new[0]
        self.appended_tokens += self._new[1]
        self._new, self._slots = (0, 0), None

    def _shift_sinks(self, new_tokens: int) -> None:
        """Move the sinks to the positions before the window that ends with the new frames."""
        shift = (self.appended_tokens + new_tokens - self.max_tokens) // self.tokens
        if not self.sinks or shift <= 0:
            return
        keys = self._buffer[:, 0, :, : self.sinks * self.tokens]
        if self._sink_keys is None:
            self._sink_keys = keys.clone()
        keys.copy_(shift_frames(self.config, self._sink_keys, shift))


def _check_rolling(config: GPDiTConfig, max_frames: int, sinks: int) -> None:
    """Raise InputError unless a rolling cache can keep `sinks` first frames and a window of blocks in `max_frames`."""
    if not 0 <= sinks < max_frames:
        raise InputError(
            f"a rolling cache of {max_frames} frames has no room for {sinks} sinks and a window of at least one "
            "frame: give it more frames or fewer sinks."
        )
    first, frames = config.block_frames
    if not config.whole_frames or not frames:
        raise InputError(
            f"a rolling cache needs blocks of a number of whole frames, but block_shape is {config.block_shape}: "
            "generate without a window."
        )
    aligned = (sinks - first) % frames == 0 if sinks else first == frames
    if (max_frames - sinks) % frames or not aligned:
        raise InputError(
            f"a rolling cache of {max_frames} frames with {sinks} sinks would cut blocks of {frames} frames, the first "
            f"of which has {first}: choose sinks that end with a block, and a window of a multiple of {frames} frames."
        )
