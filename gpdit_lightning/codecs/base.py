"""Interface of codecs: causal encoders and decoders between pixels and latents, with whitening constants.

T pixel frames are encoded to F latent frames: the first covers one pixel frame and each later one `temporal_factor`, so
that T = 1 + temporal_factor (F - 1) (GPDiT, section 5.1: the WanVAE's geometry). A frame of H x W pixels has h x w
latent pixels.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.imports import import_path, report_custom_errors
from gpdit_lightning.specs import CodecSpec, LatentGrid
from gpdit_lightning.whitening import unwhitened, whitened


class Codec(LatentGrid, ABC):
    """Encodes uint8 pixels to float32 latents and decodes them.

    A custom codec is a subclass that defines `load`, `to`, `encode_values` and `decode_frame`, and sets the attributes
    below except `name`, which is set automatically, and the optional `default_source`, `has_posterior` and
    `trial_size`. It must be causal: a latent frame depends on no later pixel frame. Commands accept its import path, or
    a name registered by :func:`~gpdit_lightning.codecs.register_codec` (docs/extending.md).

    Attributes:
        name: registered name, or else the import path of the class; recorded in manifests and checkpoints.
        source: folder, file or hub name of the weights; None for weights that ship with the package.
        latent_channels: C.
        spatial_factor: pixels along one side of a latent pixel.
        temporal_factor: pixel frames in each latent frame after the first.
        mean: (C,) float32. The whitened latents are (latents - mean) / std; both are constants of the codec, not of a
            data set.
        std: (C,) float32.
        fingerprint: 16 hexadecimal digits of a hash of the weights, as computed by :func:`fingerprint_of`.
        device: device of `encode` and `decode`.
        default_source: the `source` of a codec that is loaded without one.
        has_posterior: whether the encoder gives a Gaussian for each latent, by `posterior_values`.
        trial_size: (H, W) in pixels of the clips with which a custom codec is checked when it is loaded; None for 4 x 6
            latent pixels.
    """

    name: ClassVar[str]
    source: str | None
    mean: Tensor
    std: Tensor
    fingerprint: str
    device: torch.device = torch.device("cpu")
    default_source: ClassVar[str | None] = None
    has_posterior: ClassVar[bool] = False
    trial_size: tuple[int, int] | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.name = import_path(cls)

    @classmethod
    @abstractmethod
    def load(cls, source: str | None = None) -> Self:
        """Load the codec.

        Args:
            source: folder, file or hub name of the weights, as the codec defines it; None for its default.

        Raises:
            InputError: the weights are not found, or belong to another codec.
        """

    @abstractmethod
    def to(self, device: str | torch.device) -> Self:
        """Move the weights and set `device`; return the codec itself."""

    @abstractmethod
    def encode_values(self, values: Tensor) -> Tensor:
        """Encode values in [-1, 1] (B, T, 3, H, W), float32 on `device`, to raw latents (B, F, C, h, w)."""

    @abstractmethod
    def decode_frame(self, latent: Tensor, first: bool, state: list[Any]) -> Tensor:
        """Decode the next latent frame of a video.

        Args:
            latent: (B, C, h, w) raw, float32, on `device`.
            first: whether it is the first of the video.
            state: state of the decoder of this video, which the codec may read and change; empty at the first frame.

        Returns:
            Values around [-1, 1], (B, t, 3, H, W); t is 1 at the first frame and temporal_factor later.
        """

    def posterior_values(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Encode values, as `encode_values` does, to the means and standard deviations of the raw latents.

        The means are the result of `encode_values`. Only codecs with `has_posterior` define it.
        """
        raise NotImplementedError(f"codec {self.name!r} has no posterior")

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels to raw latents, on `device`.

        Args:
            pixels: uint8 (B, T, 3, H, W), T = 1 + temporal_factor k.

        Returns:
            float32 (B, F, C, h, w), not whitened. A latent frame depends on no later pixel frame.

        Raises:
            InputError: the dtype or shape is invalid, the factors of the codec do not fit T, H or W, or the result of
                `encode_values` has another type or shape than it must have.
        """
        values, shape = self._checked_values(pixels)
        with report_errors(type(self), "encode_values", f"it must encode values of shape {tuple(values.shape)}"):
            latents = self.encode_values(values)
        return check_result(self, "encode_values", latents, shape, "(B, F, C, h, w)")

    @torch.no_grad()
    def encode_posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pixels to the means and standard deviations of the raw latents, two tensors as `encode` returns.

        Raises:
            InputError: the codec has no posterior; otherwise as `encode`.
        """
        if not self.has_posterior:
            raise InputError(f"codec {self.name!r} has no posterior, only latents: leave out --posterior.")
        values, shape = self._checked_values(pixels)
        with report_errors(type(self), "posterior_values", f"it must encode values of shape {tuple(values.shape)}"):
            mean, std = self.posterior_values(values)
        mean = check_result(self, "posterior_values", mean, shape, "(B, F, C, h, w)")
        return mean, check_result(self, "posterior_values", std, shape, "(B, F, C, h, w)")

    def _checked_values(self, pixels: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return the values in [-1, 1] of pixels, on `device`, and the shape of their latents; raises as `encode`."""
        if pixels.dtype != torch.uint8 or pixels.ndim != 5 or pixels.shape[2] != 3:
            raise InputError(
                f"the pixels are {pixels.dtype} {tuple(pixels.shape)} where a codec takes torch.uint8 (B, T, 3, H, W): "
                "convert them."
            )
        self.latent_frames(pixels.shape[1])
        self.check_frame_size(*pixels.shape[3:])
        values = pixels.to(self.device, torch.float32) / 127.5 - 1
        return values, (len(pixels), *self.latent_shape(pixels.shape[1:]))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode raw latents (B, F, C, h, w) to uint8 pixels (B, T, 3, H, W), on `device`.

        Raises:
            InputError: the number of axes or channels is wrong.
        """
        return self.decoder()(latents)

    def decoder(self) -> "StreamingDecoder":
        """Return a decoder that takes latents in pieces, for videos that are too long for memory."""
        return StreamingDecoder(self)

    def whitened(self, raw: Tensor) -> Tensor:
        """Whiten raw latents (..., C, h, w), on their device, to mean 0 and standard deviation 1 in each channel."""
        return whitened(raw, self.mean, self.std)

    def unwhitened(self, white: Tensor) -> Tensor:
        """Convert whitened latents (..., C, h, w) to raw ones, on their device."""
        return unwhitened(white, self.mean, self.std)

    def spec(self) -> CodecSpec:
        """Return the record of this codec for manifests and checkpoints."""
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
    """Decodes raw latents of clips in consecutive pieces, with the same result as `Codec.decode` of the whole.

    Its state has constant size, and several decoders of one codec are independent.

    Args:
        codec: the codec of the latents.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._state: list[Any] = []
        self._frames = 0  # latent frames decoded so far
        self._clips: tuple[int, int, int] | None = None  # (B, h, w)

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Decode the next latent frames (B, F, C, h, w) to uint8 pixels (B, T, 3, H, W), on the codec's device.

        The first latent frame of the clips has one pixel frame, later ones temporal_factor. F may be 0.

        Raises:
            InputError: the number of axes or channels is wrong, B, h or w differ from the first call, or the result of
                `decode_frame` has another type or shape than it must have.
        """
        codec = self._codec
        if latents.ndim != 5 or latents.shape[2] != codec.latent_channels:
            raise InputError(
                f"the latents have shape {tuple(latents.shape)} where codec {codec.name!r} takes "
                f"(B, F, {codec.latent_channels}, h, w): give it latents of that codec."
            )
        B, F, _, h, w = latents.shape
        self._clips = self._clips or (B, h, w)
        if self._clips != (B, h, w):
            raise InputError(
                f"the latents have (B, h, w) = {(B, h, w)} where the decoder's first had {self._clips}: give it the "
                "next frames of the same clips, or use a new decoder."
            )
        lengths = [codec.temporal_factor if number else 1 for number in range(self._frames, self._frames + F)]
        size = h * codec.spatial_factor, w * codec.spatial_factor
        pixels = torch.empty(B, sum(lengths), 3, *size, dtype=torch.uint8, device=codec.device)
        for latent, frames in zip(latents.unbind(1), pixels.split(lengths, dim=1), strict=True):
            values = self.decode_frame(latent)
            frames.copy_(((values + 1) * 127.5).round().clamp(0, 255))
        return pixels

    def decode_frame(self, latent: Tensor) -> Tensor:
        """Decode the next latent frame (B, C, h, w) to values around [-1, 1], (B, t, 3, H, W), on the codec's device.

        Raises:
            InputError: the result of the codec's `decode_frame` has another type or shape than it must have.
        """
        codec, first = self._codec, self._frames == 0
        latent = latent.to(codec.device, torch.float32)
        with report_errors(type(codec), "decode_frame", f"it must decode latents of shape {tuple(latent.shape)}"):
            values = codec.decode_frame(latent, first, self._state)
        size = (side * codec.spatial_factor for side in latent.shape[-2:])
        shape = len(latent), 1 if first else codec.temporal_factor, 3, *size
        self._frames += 1
        return check_result(codec, "decode_frame", values, shape, "(B, t, 3, H, W)")


def report_errors(codec_class: type[Codec], member: str, expected: str) -> AbstractContextManager[None]:
    """Return a context that reports errors of a custom codec in one sentence; those of built-in codecs are bugs.

    Args:
        codec_class: class of the codec.
        member: the method or property that is used in the context.
        expected: a clause that describes a correct one: "it must ...".
    """
    if codec_class.__module__.startswith("gpdit_lightning."):
        return nullcontext()
    return report_custom_errors(f"`{member}` of codec", import_path(codec_class), expected)


def check_result(codec: Codec, method: str, result: Any, shape: tuple[int, ...], letters: str) -> Tensor:
    """Return the result of a method of a codec.

    Args:
        codec: the codec.
        method: the name of its method.
        result: what the method returned.
        shape: the shape that the result must have.
        letters: the names of its axes, for the message.

    Raises:
        InputError: the result is not a float32 tensor of this shape on the codec's device.
    """
    if not isinstance(result, Tensor):
        returned = describe(result)
    elif (tuple(result.shape), result.dtype, result.device.type) != (shape, torch.float32, codec.device.type):
        returned = f"{describe(result)} on {result.device}"
    else:
        return result
    raise InputError(
        f"{import_path(codec)}.{method} returned {returned}; it must return a torch.float32 tensor {letters} "
        f"of shape {shape} on {codec.device}."
    )


def describe(value: Any) -> str:
    """Return the kind of a value, for messages: a tensor's dtype and shape, a plain value, or else the type."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if value is None or isinstance(value, str | int | float):
        return repr(value)
    return f"an object of type {type(value).__name__}"


def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """Return 16 hexadecimal digits of a sha256 over the names, shapes and float32 values of weights."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(values.shape)}".encode())
        digest.update(values.numpy().data)
    return digest.hexdigest()[:16]
