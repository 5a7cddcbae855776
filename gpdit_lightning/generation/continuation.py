"""From context pixels to generated pixels."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from gpdit_lightning.codecs import Codec
from gpdit_lightning.diffusion import RotationSampler
from gpdit_lightning.generation.rollout import rollout
from gpdit_lightning.model import GPDiT


class Continuation(NamedTuple):
    """A continued video.

    Attributes:
        pixels: (B, T + frames, 3, H, W) uint8: the context as given, then what was generated.
        latents: (B, F, C, h, w) whitened, context and generated.
    """

    pixels: Tensor
    latents: Tensor


def continue_video(
    model: GPDiT,
    codec: Codec,
    context: Tensor,
    frames: int,
    sampler: RotationSampler,
    seed: int = 0,
    progress: bool = False,
) -> Continuation:
    """Generate the pixel frames that follow.

    Args:
        model: in evaluation mode.
        codec: whose latents the model was trained on.
        context: (B, T, 3, H, W) uint8 at the stride of the training clips, T = 1 + 4 (k - 1).
        frames: pixel frames to generate; a latent frame holds four, surplus ones are dropped.
        sampler: from noise to a latent frame.
        seed: of the noise.
        progress: show a bar over latent frames.

    Raises:
        InputError: T or the frame size does not suit the codec or the model.
    """
    device = next(model.parameters()).device
    mean, std = (constant.to(device)[:, None, None] for constant in (codec.mean, codec.std))
    known = (codec.encode(context.to(device)) - mean) / std
    count = math.ceil(frames / codec.temporal_factor)
    steps = rollout(model, sampler, known, count, seed)
    generated = list(tqdm(steps, total=count, desc="generating", unit="latent frame", disable=not progress))
    latents = torch.cat([known, *(latent[:, None] for latent in generated)], dim=1)
    decoded = codec.decode(latents * std + mean).cpu()
    pixels = torch.cat([context.cpu(), decoded[:, context.shape[1] :]], dim=1)
    return Continuation(pixels[:, : context.shape[1] + frames], latents.cpu())
