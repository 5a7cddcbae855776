"""Generation of pixel frames after a context, one latent frame at a time or all at once.

Shapes: B clips, T pixel frames, F latent frames, C channels, h x w latent pixels.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gpdit_lightning.codecs import Codec
from gpdit_lightning.generation.config import DEFAULT_CONFIG, ClipInputs, GenerationConfig
from gpdit_lightning.generation.rollout import DEFAULT_INPUTS, check_finite, rollout
from gpdit_lightning.model import GPDiT
from gpdit_lightning.progress import progress_bar


class GeneratedFrames(NamedTuple):
    """One latent frame and its pixel frames.

    Attributes:
        pixels: (B, T, 3, H, W) uint8 on the CPU. T is the codec's temporal factor, but 1 for the first latent frame of
            a video that is generated from noise alone, and less for the last latent frame if surplus frames are
            dropped.
        latents: (B, 1, C, h, w) raw, on the CPU.
    """

    pixels: Tensor
    latents: Tensor


class GeneratedVideo(NamedTuple):
    """Context and generated frames.

    Attributes:
        pixels: (B, T + frames, 3, H, W) uint8, with the context unchanged.
        latents: (B, F, C, h, w) raw.
    """

    pixels: Tensor
    latents: Tensor


def stream_video(
    model: GPDiT,
    codec: Codec,
    context: Tensor,
    frames: int,
    config: GenerationConfig = DEFAULT_CONFIG,
    inputs: ClipInputs = DEFAULT_INPUTS,
) -> Iterator[GeneratedFrames]:
    """Generate the pixel frames after a context, and yield those of each latent frame without keeping earlier ones.

    Args:
        model: in evaluation mode.
        codec: the codec whose latents the model was trained on.
        context: (B, k, C, h, w) raw latents on any device; k = 0 generates from noise alone.
        frames: number of pixel frames to generate; surplus frames of the last latent frame are dropped.
        config, inputs: as for :func:`rollout`.

    Raises:
        InputError: as :func:`rollout`, the latents do not match the codec or the model, or generated ones are not
            finite.
    """
    context = context.to(model.device)
    decode = codec.decoder()
    decode(context)
    remaining = frames
    count = num_latent_frames(codec, context.shape[1], frames)
    for latent in rollout(model, codec.whitened(context), count, config, inputs):
        raw = codec.unwhitened(latent)[:, None]
        pixels = decode(raw)[:, :remaining]
        remaining -= pixels.shape[1]
        generated = GeneratedFrames(pixels.cpu(), raw.cpu())
        check_finite(generated.latents, config.sampler)
        yield generated


def num_latent_frames(codec: Codec, context_frames: int, frames: int) -> int:
    """Return the number of latent frames that cover `frames` pixel frames after `context_frames` latent frames."""
    first = 1 if context_frames == 0 and frames else 0  # a video's first latent frame covers one pixel frame
    return first + math.ceil((frames - first) / codec.temporal_factor)


def encode_context(codec: Codec, pixels: Tensor) -> Tensor:
    """Encode (B, T, 3, H, W) uint8 as `Codec.encode`; without frames, return latents without frames."""
    if pixels.ndim != 5 or pixels.shape[1]:
        return codec.encode(pixels)
    codec.check_frame_size(*pixels.shape[3:])
    height, width = (side // codec.spatial_factor for side in pixels.shape[3:])
    return torch.zeros((len(pixels), 0, codec.latent_channels, height, width), device=codec.device)


def continue_video(
    model: GPDiT,
    codec: Codec,
    context: Tensor,
    frames: int,
    config: GenerationConfig = DEFAULT_CONFIG,
    inputs: ClipInputs = DEFAULT_INPUTS,
    *,
    progress: bool = False,
) -> GeneratedVideo:
    """Generate the pixel frames after a context.

    Args:
        model: in evaluation mode.
        codec: the codec whose latents the model was trained on.
        context: (B, T, 3, H, W) uint8 on any device, at the stride of the training clips; T is 1 plus a multiple of the
            codec's temporal factor, or 0 to generate from noise alone.
        frames: number of pixel frames to generate.
        config, inputs: as for :func:`rollout`.
        progress: show a progress bar over latent frames.

    Raises:
        InputError: as :func:`rollout`, or T or the frame size does not match the codec or the model.
    """
    latents = encode_context(codec, context)
    generated = progress_bar(
        stream_video(model, codec, latents, frames, config, inputs),
        total=num_latent_frames(codec, latents.shape[1], frames),
        desc="generating",
        unit="latent frame",
        disable=not progress,
    )
    parts = [GeneratedFrames(context.cpu(), latents.cpu()), *generated]
    return GeneratedVideo(
        torch.cat([part.pixels for part in parts], dim=1), torch.cat([part.latents for part in parts], dim=1)
    )
