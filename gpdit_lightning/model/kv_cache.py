"""Keys and values of the clean frames so far: what makes frame-by-frame generation linear (GPDiT, section 4.1.1)."""

import torch
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.model.attention.frame_causal import Context
from gpdit_lightning.model.config import GPDiTConfig


class KVCache:
    """Preallocated keys and values per block; made by :meth:`GPDiT.new_cache`, filled by :meth:`GPDiT.extend`.

    Args:
        config: the architecture.
        batch_size: B, clips generated side by side.
        max_frames: room, in latent frames.
        height, width: of a latent frame, in latent pixels.
        device, dtype: of the buffers.

    Attributes:
        frames: clean frames held so far.
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
    ) -> None:
        self.batch_size, self.max_frames, self.height, self.width = batch_size, max_frames, height, width
        self.frames = 0
        self.tokens = (height // config.patch_size) * (width // config.patch_size)
        shape = (config.layers, 2, batch_size, max_frames * self.tokens, config.heads, config.head_width)
        self._buffer = torch.empty(shape, device=device, dtype=dtype)

    def check(self, latents: Tensor, new_frames: int) -> None:
        """Raise InputError unless `latents` (B, ..., H, W) fit this cache with `new_frames` more frames."""
        given = (latents.shape[0], *latents.shape[-2:])
        if given != (self.batch_size, self.height, self.width):
            raise InputError(
                f"the cache holds {self.batch_size} clips of {self.height}x{self.width} latent pixels, but {given[0]} "
                f"of {given[1]}x{given[2]} were given: make one with model.new_cache for these sizes."
            )
        if self.frames + new_frames > self.max_frames:
            raise InputError(
                f"the cache has room for {self.max_frames} frames and holds {self.frames}: no {new_frames} more fit; "
                "make it with a larger max_frames."
            )

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Put the keys and values (B, k * N, heads, head width) of new frames behind the frames held so far."""
        start = self.frames * self.tokens
        self._buffer[layer, 0, :, start : start + key.shape[1]] = key
        self._buffer[layer, 1, :, start : start + key.shape[1]] = value

    def context(self, layer: int, frames: int) -> Context | None:
        """The first `frames` frames of a block's keys and values; None if there are none."""
        if frames == 0:
            return None
        key, value = self._buffer[layer, :, :, : frames * self.tokens]
        return Context(key, value)
