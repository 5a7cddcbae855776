"""Keys and values of the clean frames so far: what makes frame-by-frame generation linear (GPDiT, section 4.1.1)."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.model.attention.frame_causal import Context
from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.model.positions import shifted


class Memory(NamedTuple):
    """One block's part of a cache, during a pass.

    Attributes:
        key, value: (B, room in tokens, heads, head width), positions applied to the keys.
        slots: (new tokens,) where the clean tokens of this pass belong; None if it has none.
        frames: how many frames are held once they are written.
    """

    key: Tensor
    value: Tensor
    slots: Tensor | None
    frames: int

    def write(self, key: Tensor, value: Tensor) -> None:
        """Put the keys and values (B, new tokens, heads, head width) of this pass's clean frames where they belong."""
        assert self.slots is not None
        with torch.no_grad():
            self.key.index_copy_(1, self.slots, key.to(self.key.dtype))
            self.value.index_copy_(1, self.slots, value.to(self.value.dtype))

    def context(self, tokens: int) -> Context | None:
        """All frames held, each of `tokens` tokens; None if there are none."""
        end = self.frames * tokens
        return Context(self.key[:, :end], self.value[:, :end]) if self.frames else None


class KVCache:
    """Preallocated keys and values per block; made by :meth:`GPDiT.new_cache`, filled by `extend` and `denoise`.

    A cache that rolls keeps the first frames of the video (the sinks) and its latest ones (the window): a new frame
    takes the place of the window's oldest, so that memory and time per frame stay the same for ever. Attention does not
    ask in which order keys lie. Positions are relative, and the sinks are turned along so that they always stand right
    before the window: no query ever sees a key at a distance beyond the cache's room (attention sinks: Xiao et al.,
    2023, section 3.2).

    Args:
        config: the architecture.
        batch_size: B, clips generated side by side.
        max_frames: room, in latent frames.
        height, width: of a latent frame, in latent pixels.
        device, dtype: of the buffers.
        sinks: how many of the first frames stay when the cache rolls; None: it does not roll, and refuses more than
            `max_frames`.

    Attributes:
        frames: clean frames taken in so far: the position of the next one.

    Raises:
        InputError: no room for a window of at least one frame.
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
        self._sink_keys: Tensor | None = None  # at their own positions: turned from there, rounding does not add up

    @property
    def fits(self) -> int:
        """How many frames can be taken in at once: before a cache rolls all there is room for, then one at a time."""
        room = self.max_frames - self.frames
        return room if self.sinks is None else max(room, 1)

    def held(self, new_frames: int) -> int:
        """How many frames it holds once `new_frames` more are in it."""
        return min(self.frames + new_frames, self.max_frames)

    def check(self, latents: Tensor, rows: int, new_frames: int) -> None:
        """Raise InputError unless `latents` (rows, ..., H, W) fit this cache with `new_frames` more frames."""
        given = (rows, *latents.shape[-2:])
        if given != (self.batch_size, self.height, self.width):
            raise InputError(
                f"the cache holds {self.batch_size} clips of {self.height}x{self.width} latent pixels, but {given[0]} "
                f"of {given[1]}x{given[2]} were given: make one with model.new_cache for these sizes."
            )
        if new_frames > self.fits:
            raise InputError(
                f"the cache has room for {self.max_frames} frames and holds {self.held(0)}: no "
                f"{new_frames} more fit at once; make it with a larger max_frames, or extend it before."
            )

    def memories(self, new_frames: int) -> Iterator[Memory]:
        """Each block's part, with room made for `new_frames` clean frames; they count once `frames` was raised."""
        slots = None
        if new_frames:
            self._turn_sinks(new_frames)
            first = self.frames
            if self.sinks is not None and first >= self.max_frames:
                first = self.sinks + (first - self.sinks) % (self.max_frames - self.sinks)
            slots = torch.arange(
                first * self.tokens, (first + new_frames) * self.tokens, device=self._buffer.device, dtype=torch.long
            )
        for key, value in self._buffer:
            yield Memory(key, value, slots, self.held(new_frames))

    def _turn_sinks(self, new_frames: int) -> None:
        """Let the sinks stand right before the window that ends with the new frames."""
        shift = self.frames + new_frames - self.max_frames
        if not self.sinks or shift <= 0:
            return
        keys = self._buffer[:, 0, :, : self.sinks * self.tokens]
        if self._sink_keys is None:
            self._sink_keys = keys.clone()
        keys.copy_(shifted(self.config, self._sink_keys, shift))
