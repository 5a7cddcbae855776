"""What every codec is: pixels to latents and back, causal in time, with constants that whiten its latents.

T pixel frames make F latent frames: the first covers one pixel frame and each later one `temporal_factor`, so that
T = 1 + temporal_factor (F - 1) (GPDiT, section 5.1: the WanVAE's geometry). H x W pixels make h x w latent pixels.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.specs import CodecSpec, LatentGrid


class Codec(LatentGrid, ABC):
    """Turns uint8 pixels into float32 latents and back.

    A custom codec is a subclass that sets the attributes below, `name` and `device` excepted, and defines `load`, `to`,
    `encode_values` and `decode_frame`. It must be causal: a latent frame depends on no later pixel frame. Commands take
    its import path, or a name given by :func:`~gpdit_lightning.codecs.register_codec` (docs/extending.md).

    Attributes:
        name: its registered name, else the import path of the class; manifests and checkpoints record it.
        source: the folder, file or hub name that the weights came from; None for weights that ship with the package.
        latent_channels: C.
        spatial_factor: pixels along one side of a latent pixel.
        temporal_factor: pixel frames of each latent frame after the first.
        mean, std: float32 (C,), constants of the codec over all its latents, never of a data set; `(latents - mean) /
            std` is white.
        fingerprint: 16 hexadecimal digits that change with the weights, as :func:`fingerprint_of` computes them.
        device: where `encode` and `decode` compute.
    """

    name: ClassVar[str]
    source: str | None
    mean: Tensor
    std: Tensor
    fingerprint: str
    device: torch.device = torch.device("cpu")

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.name = f"{cls.__module__}.{cls.__qualname__}"

    @classmethod
    @abstractmethod
    def load(cls, source: str | None = None) -> Self:
        """Read the weights.

        Args:
            source: a folder, a file or a hub name, as the codec defines it; None for its default.

        Raises:
            InputError: the weights are not found, or are not of this codec.
        """

    @abstractmethod
    def to(self, device: str | torch.device) -> Self:
        """Move the weights and set `device`; returns the codec itself."""

    @abstractmethod
    def encode_values(self, values: Tensor) -> Tensor:
        """Values in [-1, 1] (B, T, 3, H, W), float32 on `device`, to raw latents (B, F, C, h, w)."""

    @abstractmethod
    def decode_frame(self, latent: Tensor, first: bool, state: list[Any]) -> Tensor:
        """The next latent frame (B, C, h, w) of a video to values around [-1, 1] (B, t, 3, H, W).

        Args:
            latent: raw, float32, on `device`.
            first: whether it is the first of the video; then t = 1, otherwise t = temporal_factor.
            state: what the codec keeps of the earlier frames of this video, to read and change; empty at the first.
        """

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels to raw latents, on `device`.

        Args:
            pixels: uint8 (B, T, 3, H, W), T = 1 + temporal_factor k.

        Returns:
            float32 (B, F, C, h, w), not whitened. The first latent frames of a clip depend on its beginning only.

        Raises:
            InputError: for another dtype or shape, or T, H or W that the codec's factors do not allow.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 5 or pixels.shape[2] != 3:
            raise InputError(
                f"The pixels are {pixels.dtype} {tuple(pixels.shape)} where a codec takes torch.uint8 (B, T, 3, H, W): "
                f"convert them."
            )
        self.latent_frames(pixels.shape[1])
        self.check_frame_size(*pixels.shape[3:])
        return self.encode_values(pixels.to(self.device, torch.float32) / 127.5 - 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Raw latents (B, F, C, h, w) to uint8 pixels (B, T, 3, H, W), on `device`.

        Raises:
            InputError: for another number of axes or channels.
        """
        return self.decoder()(latents)

    def decoder(self) -> "StreamingDecoder":
        """A decoder for videos that are too long for memory: it takes their latents in pieces."""
        return StreamingDecoder(self)

    def whitened(self, raw: Tensor) -> Tensor:
        """Raw latents (..., C, h, w) as a model takes them: mean 0 and deviation 1 in each channel; on their device."""
        return (raw - self.mean.to(raw.device)[:, None, None]) / self.std.to(raw.device)[:, None, None]

    def unwhitened(self, white: Tensor) -> Tensor:
        """A model's latents (..., C, h, w) as raw latents, on their device."""
        return white * self.std.to(white.device)[:, None, None] + self.mean.to(white.device)[:, None, None]

    def spec(self) -> CodecSpec:
        """What manifests and checkpoints record of this codec."""
        return CodecSpec(
            name=self.name,
            source=self.source,
            latent_channels=self.latent_channels,
            spatial_factor=self.spatial_factor,
            temporal_factor=self.temporal_factor,
            mean=tuple(self.mean.tolist()),
            std=tuple(self.std.tolist()),
            fingerprint=self.fingerprint,
        )


class StreamingDecoder:
    """Decodes the raw latents of the same clips piece after piece; together the pixels are those of `Codec.decode`.

    Its state does not grow, and several decoders of one codec do not affect each other.

    Args:
        codec: the codec of the latents.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._state: list[Any] = []
        self._frames = 0  # latent frames so far
        self._clips: tuple[int, int, int] | None = None  # (B, h, w)

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """The next latent frames (B, F, C, h, w) to their uint8 pixels (B, T, 3, H, W), on the codec's device.

        T = temporal_factor F, but the first latent frame of the clips has one pixel frame. F may be 0.

        Raises:
            InputError: for another number of axes or channels, or another number or size of clips than in the first
                call.
        """
        codec = self._codec
        if latents.ndim != 5 or latents.shape[2] != codec.latent_channels:
            raise InputError(
                f"The latents have shape {tuple(latents.shape)} where codec {codec.name!r} takes "
                f"(B, F, {codec.latent_channels}, h, w): give it latents of that codec."
            )
        B, F, _, h, w = latents.shape
        self._clips = self._clips or (B, h, w)
        if self._clips != (B, h, w):
            raise InputError(
                f"The latents have (B, h, w) = {(B, h, w)} where the decoder's first had {self._clips}: give it the "
                f"next frames of the same clips, or use a new decoder."
            )
        lengths = [codec.temporal_factor if number else 1 for number in range(self._frames, self._frames + F)]
        size = h * codec.spatial_factor, w * codec.spatial_factor
        pixels = torch.empty(B, sum(lengths), 3, *size, dtype=torch.uint8, device=codec.device)
        for latent, frames in zip(latents.unbind(1), pixels.split(lengths, dim=1), strict=True):
            values = codec.decode_frame(latent.to(codec.device, torch.float32), self._frames == 0, self._state)
            frames.copy_(((values + 1) * 127.5).round().clamp(0, 255))
            self._frames += 1
        return pixels


def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of a sha256 over named weights: names, shapes and float32 values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(values.shape)}".encode())
        digest.update(values.numpy().data)
    return digest.hexdigest()[:16]
