"""Loading of custom codecs: every rule of :class:`~gpdit_lightning.codecs.Codec` is checked before a codec is used."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gpdit_lightning.codecs.base import Codec, StreamingDecoder, describe, report_errors
from gpdit_lightning.errors import InputError
from gpdit_lightning.imports import import_path

TRIAL_FRAMES = 3  # latent frames
TRIAL_SIZE = 4, 6  # latent pixels; they differ, so that swapped axes are found
# Of the RMS of the latents. Kernels for other lengths change bfloat16 latents by about 1 %.
CAUSAL_TOLERANCE = 0.05
DECODING_TOLERANCE = 0.01  # mean difference of values in [-1, 1]
MISSING = object()


def load_custom_codec(codec_class: type[Codec], source: str | None, device: str | torch.device) -> Codec:
    """Load a custom codec to a device, and check it by encoding and decoding two short clips of noise.

    Args:
        codec_class: its class.
        source: the argument of its `load`.
        device: device of the codec.

    Raises:
        InputError: the class lacks a method or an attribute, a method raises an error or returns something else than it
            must, or the codec is not causal.
    """
    path = import_path(codec_class)
    missing = sorted(codec_class.__abstractmethods__)
    if missing:
        raise InputError(
            f"the codec {path} does not define {' and '.join(missing)}: a codec must define these methods of `Codec`."
        )
    with report_errors(codec_class, "load", f"it must load the codec from the source {source!r}"):
        codec = codec_class.load(source)
    if not isinstance(codec, codec_class):
        raise InputError(
            f"{path}.load({source!r}) returned {describe(codec)}; it must return an instance of the class."
        )
    with report_errors(codec_class, "to", f"it must move the codec to {device}"):
        moved = codec.to(device)
    if moved is not codec:
        raise InputError(f"{path}.to({str(device)!r}) returned {describe(moved)}; it must return the codec itself.")
    _check_attributes(codec, source, torch.device(device))
    _check_trial(codec)
    return codec


def _check_attributes(codec: Codec, source: str | None, device: torch.device) -> None:
    """Raise InputError if an attribute of a loaded codec is missing or has another type than it must have."""

    def is_count(value: Any) -> bool:
        return type(value) is int and value >= 1

    def is_constant(value: Any) -> bool:
        if not (isinstance(value, Tensor) and value.dtype == torch.float32):
            return False
        return value.shape == (codec.latent_channels,) and bool(value.isfinite().all())

    def is_size(value: Any) -> bool:
        if not isinstance(value, tuple | list) or len(value) != 2:
            return False
        return all(is_count(side) and side % codec.spatial_factor == 0 for side in value)

    count, constant = "a whole number of at least 1", "a finite torch.float32 tensor of shape (latent_channels,)"
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "latent_channels": (is_count, count),
        "spatial_factor": (is_count, count),
        "temporal_factor": (is_count, count),
        "mean": (is_constant, constant),
        "std": (lambda value: is_constant(value) and bool((value > 0).all()), f"{constant}, above 0"),
        "fingerprint": (lambda value: isinstance(value, str) and value != "", "the result of `fingerprint_of`"),
        "source": (
            lambda value: isinstance(value, str) or (value is None and source is None),
            "a string that `load` accepts" + (" or None" if source is None else ""),
        ),
        "device": (
            lambda value: isinstance(value, torch.device) and value.type == device.type,
            f"torch.device('{device}') after `to`",
        ),
        "trial_size": (
            lambda value: value is None or is_size(value),
            "None or a height and width in pixels, multiples of spatial_factor",
        ),
    }
    path = import_path(codec)
    for name, (is_valid, expected) in rules.items():
        with report_errors(type(codec), name, f"it must be {expected}"):
            value = getattr(codec, name, MISSING)
        if value is MISSING:
            raise InputError(f"{path} does not set the attribute `{name}`; it must be {expected}.")
        if not is_valid(value):
            raise InputError(f"{path}.{name} is {describe(value)}; it must be {expected}.")


@torch.no_grad()
def _check_trial(codec: Codec) -> None:
    """Encode and decode two short clips of noise, and check the results.

    Raises:
        InputError: a method raises an error; its result has an invalid type or shape, or is not finite; the codec
            is not causal; or its decoders are not independent.
    """
    path, pixels = import_path(codec), _trial_clips(codec)
    latents = _encode(codec, pixels)
    for frames in range(1, TRIAL_FRAMES):
        prefix = pixels[:1, : codec.pixel_frames(frames)]
        alone, whole = _encode(codec, prefix), latents[:1, :frames]
        if (alone - whole).square().mean().sqrt() > CAUSAL_TOLERANCE * whole.square().mean().sqrt():
            raise InputError(
                f"{path}.encode_values returned other first latents for a clip of {pixels.shape[1]} frames than for "
                f"the clip cut to length {prefix.shape[1]}; it must be deterministic, and a latent frame must depend "
                "neither on later pixel frames nor on other clips."
            )
    together, in_turns = _decode(codec, [latents])[0], torch.cat(_decode(codec, latents.split(1)))
    if (together - in_turns).abs().mean() > DECODING_TOLERANCE:
        raise InputError(
            f"{path}.decode_frame returned other frames for two videos decoded in turns than for both as a batch; it "
            "must keep what it needs of earlier frames in its argument `state`, not in the codec, and must not change "
            "the latents."
        )


def _trial_clips(codec: Codec) -> Tensor:
    """Return two clips of noise that become brighter, so that the mean of a clip depends on its length."""
    frames = codec.pixel_frames(TRIAL_FRAMES)
    height, width = codec.trial_size or (side * codec.spatial_factor for side in TRIAL_SIZE)
    noise = torch.rand(2, frames, 3, height, width, generator=torch.Generator().manual_seed(0))
    return (127 * noise + 128 * torch.linspace(0, 1, frames)[:, None, None, None]).to(torch.uint8)


def _encode(codec: Codec, pixels: Tensor) -> Tensor:
    """Encode clips; raise InputError if that fails or the latents are not finite."""
    try:
        latents = codec.encode(pixels)
    except InputError as error:
        if error.__cause__ is None or codec.trial_size is not None:  # not an error in its code, or its own size
            raise
        raise InputError(f"{error} If it needs frames of another size, set its `trial_size`.") from error
    if not latents.isfinite().all():
        raise InputError(
            f"{import_path(codec)}.encode_values returned latents that are not finite for values in [-1, 1]; "
            "they must be finite."
        )
    return latents


def _decode(codec: Codec, clips: Sequence[Tensor]) -> list[Tensor]:
    """Decode clips (B, F, C, h, w) in turns, frame after frame, to values (B, T, 3, H, W).

    Raises:
        InputError: decoding fails, or a result has an invalid type or shape or is not finite.
    """
    decoders = [StreamingDecoder(codec) for _ in clips]
    pieces: list[list[Tensor]] = [[] for _ in clips]
    for frame in range(clips[0].shape[1]):
        for decoder, clip, values in zip(decoders, clips, pieces, strict=True):
            values.append(decoder.decode_frame(clip[:, frame]))
            if not values[-1].isfinite().all():
                raise InputError(
                    f"{import_path(codec)}.decode_frame returned values that are not finite for latents that "
                    "`encode_values` returned; they must be finite."
                )
    return [torch.cat(values, dim=1) for values in pieces]
