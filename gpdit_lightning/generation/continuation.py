"""From context to generated pixels, as they come or all at once."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from gpdit_lightning.codecs import Codec
from gpdit_lightning.generation.rollout import DEFAULT, GenerationConfig, rollout
from gpdit_lightning.model import GPDiT


class Piece(NamedTuple):
    """The next frames of a video that is being generated.

    Attributes:
        pixels: (B, T, 3, H, W) uint8 on the CPU, T = 4; the first frame of a video that begins from nothing is alone.
        latents: (B, 1, C, h, w) raw, on the CPU.
    """

    pixels: Tensor
    latents: Tensor


class Continuation(NamedTuple):
    """A continued video.

    Attributes:
        pixels: (B, T + frames, 3, H, W) uint8: the context as given, then what was generated.
        latents: (B, F, C, h, w) raw, context and generated.
    """

    pixels: Tensor
    latents: Tensor


def stream_video(
    model: GPDiT,
    codec: Codec,
    known: Tensor,
    frames: int,
    config: GenerationConfig = DEFAULT,
    *,
    seeds: int | Sequence[int] = 0,
    condition: Tensor | None = None,
    without_condition: Tensor | None = None,
) -> Iterator[Piece]:
    """Generate the pixel frames that follow, yielding them as they are done; nothing of a long video is kept.

    Args:
        model: in evaluation mode.
        codec: whose latents the model was trained on.
        known: (B, k, C, h, w) raw latents of the context; k = 0 begins from nothing.
        frames: pixel frames to generate; surplus ones of the last latent frame are dropped.
        config, seeds, condition, without_condition: as for :func:`rollout`.

    Yields:
        a :class:`Piece` for each latent frame.

    Raises:
        InputError: as :func:`rollout`, or latents that do not suit the codec or the model.
    """
    known = known.to(next(model.parameters()).device)
    decode = codec.decoder()
    decode(known)
    count = latent_frames(codec, known.shape[1], frames)
    left = frames
    for latent in rollout(
        model,
        codec.whitened(known),
        count,
        config,
        seeds=seeds,
        condition=condition,
        without_condition=without_condition,
    ):
        raw = codec.unwhitened(latent)[:, None]
        pixels = decode(raw)[:, :left]
        left -= pixels.shape[1]
        yield Piece(pixels.cpu(), raw.cpu())


def latent_frames(codec: Codec, known: int, frames: int) -> int:
    """How many latent frames hold `frames` pixel frames after `known` latent frames."""
    alone = 1 if known == 0 and frames else 0  # the first frame of a video
    return alone + math.ceil((frames - alone) / codec.temporal_factor)


def continue_video(
    model: GPDiT,
    codec: Codec,
    context: Tensor,
    frames: int,
    config: GenerationConfig = DEFAULT,
    *,
    seeds: int | Sequence[int] = 0,
    condition: Tensor | None = None,
    without_condition: Tensor | None = None,
    progress: bool = False,
) -> Continuation:
    """Generate the pixel frames that follow, all at once.

    Args:
        model: in evaluation mode.
        codec: whose latents the model was trained on.
        context: (B, T, 3, H, W) uint8 at the stride of the training clips, T = 1 + 4 (k - 1).
        frames: pixel frames to generate.
        config, seeds, condition, without_condition: as for :func:`rollout`.
        progress: show a bar over latent frames.

    Raises:
        InputError: T or the frame size does not suit the codec or the model, or as :func:`rollout`.
    """
    known = codec.encode(context)
    conditions = {"condition": condition, "without_condition": without_condition}
    pieces = stream_video(model, codec, known, frames, config, seeds=seeds, **conditions)
    count = latent_frames(codec, known.shape[1], frames)
    made = list(tqdm(pieces, total=count, desc="generating", unit="latent frame", disable=not progress))
    pixels = torch.cat([context.cpu(), *(piece.pixels for piece in made)], dim=1)
    return Continuation(pixels, torch.cat([known.cpu(), *(piece.latents for piece in made)], dim=1))
