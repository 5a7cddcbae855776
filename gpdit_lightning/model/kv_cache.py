"""Cache of the keys and values of previous clean frames, for generation in linear time (GPDiT, section 4.1.1)."""

from typing import NamedTuple

import torch
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.model.attention import KV
from gpdit_lightning.model.config import GPDiTConfig
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
        """Write the keys and values of this pass's clean frames; return those of all frames, or None if there are none.

        Args:
            new: each (B, new tokens, heads, head width); None if the pass has no clean frames.
        """
        if new is not None:
            assert self.slots is not None
            with torch.no_grad():
                self.key.index_copy_(1, self.slots, new.key.to(self.key.dtype))
                self.value.index_copy_(1, self.slots, new.value.to(self.value.dtype))
        return KV(self.key[:, : self.length], self.value[:, : self.length]) if self.length else None


class KVCache:
    """Preallocated keys and values of all blocks; :meth:`GPDiT.new_cache` creates it, `extend` and `denoise` fill it.

    A pass calls `begin_pass`, gives each block its `layer_cache`, and ends with `end_pass`.

    A rolling cache keeps the first frames of the video (the sinks) and its latest ones (the window): a new frame
    overwrites the oldest of the window, so that memory and time per frame stay constant. Attention does not depend on
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
        frames: number of clean frames appended so far, which is the position of the next one.

    Raises:
        InputError: there is no capacity for a window of at least one frame.
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
        if sinks is not None and not 0 <= sinks < max_frames:
            raise InputError(
                f"a rolling cache of {max_frames} frames has no room for {sinks} sinks and a window of at least one "
                "frame: give it more frames or fewer sinks."
            )
        self.config, self.sinks = config, sinks
        self.batch_size, self.max_frames, self.height, self.width = batch_size, max_frames, height, width
        self.frames = 0
        self.tokens = (height // config.patch_size) * (width // config.patch_size)
        shape = (config.layers, 2, batch_size, max_frames * self.tokens, config.heads, config.head_width)
        self._buffer = torch.empty(shape, device=device, dtype=dtype)
        self._sink_keys: Tensor | None = None  # at their original positions, from which all shifts start
        self._new_frames = 0  # of the current pass, as are the slots
        self._slots: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Return the device of the buffers."""
        return self._buffer.device

    @property
    def max_new_frames(self) -> int:
        """Return the number of frames that one pass can append: the free capacity, or one if the cache rolls."""
        free = self.max_frames - self.frames
        return free if self.sinks is None else max(free, 1)

    def stored_frames(self, new_frames: int = 0) -> int:
        """Return the number of frames in the cache after `new_frames` more are appended."""
        return min(self.frames + new_frames, self.max_frames)

    def begin_pass(self, new_frames: int) -> None:
        """Prepare a pass with `new_frames` clean frames: shift the sinks, and choose the slots of the new tokens."""
        self._new_frames, self._slots = new_frames, None
        if not new_frames:
            return
        self._shift_sinks(new_frames)
        first = self.frames
        if self.sinks is not None and first >= self.max_frames:
            first = self.sinks + (first - self.sinks) % (self.max_frames - self.sinks)
        self._slots = torch.arange(
            first * self.tokens, (first + new_frames) * self.tokens, device=self.device, dtype=torch.long
        )

    def layer_cache(self, layer: int) -> LayerCache:
        """Return the cache of block `layer`, from 0, during a pass."""
        key, value = self._buffer[layer]
        return LayerCache(key, value, self._slots, self.stored_frames(self._new_frames) * self.tokens)

    def end_pass(self) -> None:
        """Count the clean frames of the pass, after all blocks have appended them."""
        self.frames += self._new_frames
        self._new_frames, self._slots = 0, None

    def _shift_sinks(self, new_frames: int) -> None:
        """Move the sinks to the positions before the window that ends with the new frames."""
        shift = self.frames + new_frames - self.max_frames
        if not self.sinks or shift <= 0:
            return
        keys = self._buffer[:, 0, :, : self.sinks * self.tokens]
        if self._sink_keys is None:
            self._sink_keys = keys.clone()
        keys.copy_(shift_frames(self.config, self._sink_keys, shift))
