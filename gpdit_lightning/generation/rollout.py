"""Latent frames one after another, each sampled given the clean ones before it (GPDiT, figure 2, left)."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from gpdit_lightning.diffusion import RotationSampler
from gpdit_lightning.model import GPDiT


def frame_noise(seed: int, clip: int, frame: int, shape: tuple[int, ...]) -> Tensor:
    """Standard Gaussian noise of one frame, the same whatever the batch it is generated in: float32 on the CPU."""
    generator = torch.Generator().manual_seed(((seed * 1_000_003 + clip) * 1_000_003 + frame) % 2**63)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


@torch.inference_mode()
def rollout(model: GPDiT, sampler: RotationSampler, context: Tensor, frames: int, seed: int = 0) -> Iterator[Tensor]:
    """Generate `frames` latent frames after `context`, yielding each when it is done.

    The keys and values of all clean frames are cached, so that a frame costs the same work per step as in training.

    Args:
        model: in evaluation mode.
        sampler: from noise to a frame.
        context: (B, k, C, H, W) whitened latents; k = 0 begins from nothing.
        frames: how many to generate.
        seed: of the noise; clip b's depends on (seed, b, frame) alone.

    Yields:
        (B, C, H, W) whitened latents.
    """
    clips, known, *shape = context.shape
    cache = model.new_cache(clips, known + frames, *shape[1:])
    if known:
        model.extend(cache, context)
    for frame in range(known, known + frames):
        noise = torch.stack([frame_noise(seed, clip, frame, tuple(shape)) for clip in range(clips)])
        latent = sampler.sample(partial(model.denoise, cache=cache), noise.to(context))
        yield latent
        if frame < known + frames - 1:
            model.extend(cache, latent[:, None])
