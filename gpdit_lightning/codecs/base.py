"""What every codec is: pixels to latents and back, causal in time, with constants that whiten its latents.

The first latent frame covers one pixel frame and each later one covers four, so T = 1 + 4 (F - 1) pixel frames make F
latent frames (GPDiT, section 5.1: the WanVAE's geometry).
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

    Attributes:
        name: the codec's name, "pca" or "wan".
        source: the folder, file or hub name its weights came from; None for weights that ship with the package.
        latent_channels: C.
        spatial_factor: pixels along one side of a latent position.
        temporal_factor: pixel frames of a latent frame after the first.
        mean, std: float32 (C,), constants of the codec over all its latents, never of a data set; `(latents - mean) /
            std` is white.
        fingerprint: 16 hexadecimal digits that change with the weights.
        device: where `encode` and `decode` compute.
    """

    name: ClassVar[str]
    source: str | None
    mean: Tensor
    std: Tensor
    fingerprint: str
    device: torch.device = torch.device("cpu")

    @abstractmethod
    def _encode(self, values: Tensor) -> Tensor:
        """Values in [-1, 1] (B, T, 3, H, W) to latents (B, F, C, h, w)."""

    @abstractmethod
    def _decode_next(self, latent: Tensor, first: bool, features: list[Any]) -> Tensor:
        """The next latent frame (B, C, h, w) of a video to values around [-1, 1] (B, t, 3, H, W).

        Args:
            latent: float32, on `self.device`.
            first: whether the video begins with it; then t = 1, later t = 4.
            features: what the codec keeps of the frames before, for it to read and write; empty at the first frame.
        """

    @abstractmethod
    def to(self, device: str | torch.device) -> Self:
        """Move the weights; returns the codec itself."""

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels to raw latents, on `self.device`.

        Args:
            pixels: uint8 (B, T, 3, H, W), T = 1 + 4k.

        Returns:
            float32 (B, F, C, h, w), not whitened. The first latent frames of a clip are those of its beginning alone.

        Raises:
            InputError: for another type or number of axes, a T that is not 1 + 4k, or sides that 8 does not divide.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 5 or pixels.shape[2] != 3:
            raise InputError(
                f"The pixels are {pixels.dtype} {tuple(pixels.shape)} where a codec takes torch.uint8 (B, T, 3, H, W): "
                f"convert them."
            )
        self.latent_frames(pixels.shape[1])
        self.check_frame_size(*pixels.shape[3:])
        return self._encode(pixels.to(self.device, torch.float32) / 127.5 - 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Raw latents (B, F, C, h, w) to uint8 pixels (B, T, 3, H, W), on `self.device`.

        Raises:
            InputError: for another number of axes or channels.
        """
        return self.decoder()(latents)

    def decoder(self) -> "StreamingDecoder":
        """A decoder for videos too long to be in memory whole: it takes their latents piece after piece."""
        return StreamingDecoder(self)

    def whitened(self, raw: Tensor) -> Tensor:
        """Raw latents (..., C, h, w) as a model takes them: mean 0 and deviation 1 in each channel; on their device."""
        return (raw - self.mean.to(raw.device)[:, None, None]) / self.std.to(raw.device)[:, None, None]

    def unwhitened(self, white: Tensor) -> Tensor:
        """What a model gives (..., C, h, w) as raw latents, on its device."""
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
    """Takes the raw latents of the same clips piece after piece; the pixels together are those of `Codec.decode`.

    What it keeps between frames is its own and does not grow, so several decoders of one codec may take turns.

    Args:
        codec: whose latents they are.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._features: list[Any] = []
        self._frames = 0  # latent frames so far
        self._clips: tuple[int, int, int] | None = None  # (B, h, w)

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """The next latent frames (B, F, C, h, w) to their uint8 pixels (B, T, 3, H, W), on the codec's device.

        T = 4 F, less three in the call that brings the first latent frame. F may be 0.

        Raises:
            InputError: for another number of axes or channels, or clips that differ from the first call's in number or
                size.
        """
        codec = self._codec
        if latents.ndim != 5 or latents.shape[2] != codec.latent_channels:
            raise InputError(
                f"The latents have shape {tuple(latents.shape)} where codec {codec.name!r} takes "
                f"(B, F, {codec.latent_channels}, h, w): give it latents of its own."
            )
        B, F, _, h, w = latents.shape
        self._clips = self._clips or (B, h, w)
        if self._clips != (B, h, w):
            raise InputError(
                f"The latents have (B, h, w) = {(B, h, w)} where the decoder's first had {self._clips}: give it the "
                f"next frames of the same clips, or take a new decoder."
            )
        lengths = [codec.temporal_factor if number else 1 for number in range(self._frames, self._frames + F)]
        size = h * codec.spatial_factor, w * codec.spatial_factor
        pixels = torch.empty(B, sum(lengths), 3, *size, dtype=torch.uint8, device=codec.device)
        for latent, place in zip(latents.unbind(1), pixels.split(lengths, dim=1), strict=True):
            values = codec._decode_next(latent.to(codec.device, torch.float32), self._frames == 0, self._features)
            place.copy_(((values + 1) * 127.5).round().clamp(0, 255))
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
