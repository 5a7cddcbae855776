"""Rollout: blocks of latents generated in turn, each given the clean blocks before it (GPDiT, figure 2, left).

A block is a latent frame by default, and otherwise what the model's `block_shape` says.

Shapes: B clips, C channels, H x W latent pixels.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from gpdit_lightning.diffusion import Sampler, check_target
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation.config import DEFAULT_CONFIG, DEFAULT_INPUTS, ClipInputs, GenerationConfig
from gpdit_lightning.generation.denoiser import Denoiser
from gpdit_lightning.imports import import_path
from gpdit_lightning.model import GPDiT
from gpdit_lightning.model.checks import check_rollout
from gpdit_lightning.model.layout import BlockLayout, Part
from gpdit_lightning.randomness import GENERATION_NOISE, ROLLOUT_CONTEXT_NOISE, generator

WHOLE_FRAME: Part = (slice(None), slice(None))


@torch.inference_mode()
def rollout(
    model: GPDiT,
    context: Tensor,
    frames: int | None,
    config: GenerationConfig = DEFAULT_CONFIG,
    inputs: ClipInputs = DEFAULT_INPUTS,
) -> Iterator[Tensor]:
    """Generate latent frames after `context`, and yield each as soon as all blocks are computed that contain it.

    Args:
        model: in evaluation mode.
        context: (B, k, C, H, W) whitened latents on any device; k = 0 generates from noise alone.
        frames: number of latent frames to generate; None for an endless rollout, which needs a window. A last block is
            generated whole, and its frames after these are left out.
        config: sampler, guidance, window, and how to compute.
        inputs: seeds and conditions of the clips.

    Yields:
        (B, C, H, W) whitened latents, on the device of the model.

    Raises:
        InputError: the context does not fit the model, seeds, window or condition do not match the other arguments, or
            the sampler begins at a noise from which the target of the model gives no velocity.
    """
    context = context.to(model.device)
    check_rollout(model.config, context, frames)
    check_target(model.config.target, config.sampler.schedule)
    clips, context_frames = context.shape[:2]
    seeds = inputs.seed_per_clip(clips)
    layout = model.layout(*context.shape[-2:])
    _check_blocks(layout, context_frames, frames)
    denoiser = Denoiser(model, context, frames, config, inputs)
    left = math.inf if frames is None else frames
    for of_group in _groups(layout, context_frames, frames):
        blocks = []
        for part in layout.parts:
            noise = partial(_batch_noise, context, seeds, of_group, part)
            blocks.append(config.sampler.sample(denoiser, noise(), noise))
            denoiser.append(blocks[-1], partial(noise, purpose=ROLLOUT_CONTEXT_NOISE))
        latents = layout.joined(blocks)
        yield from (latents,) if latents.ndim == 4 else latents.unbind(1)[: int(min(left, len(of_group)))]
        left -= len(of_group)


def _check_blocks(layout: BlockLayout, context_frames: int, frames: int | None) -> None:
    """Check that a rollout consists of blocks.

    Raises:
        InputError: the context does not consist of whole blocks, or an endless rollout would have one endless block.
    """
    if context_frames:
        layout.check_context(context_frames)
    if frames is None and not layout.frames:
        raise InputError(
            "an endless rollout would be one endless block (block_shape has 0 frames): give a number of frames."
        )


def _groups(layout: BlockLayout, context_frames: int, frames: int | None) -> Iterator[range]:
    """Yield the frames of each group of blocks, those that share their frames, that a rollout generates."""
    length, end = context_frames + (frames or 0), context_frames
    while frames is None or end < length:
        group = layout.group_after(end, length)
        end = group.stop
        yield group


def check_finite(latents: Tensor, sampler: Sampler) -> None:
    """Check that generated latents are finite. The host waits for them, so call it where it does so anyway.

    Raises:
        InputError: a value is not finite.
    """
    if not latents.isfinite().all():
        raise InputError(
            f"generated latents are not finite, because of sampler '{import_path(sampler)}' or the weights of the "
            "model: use another sampler or checkpoint."
        )


def check_sampler(sampler: Sampler, clips: int, *shape: int) -> None:
    """Run a sampler once without a network on the CPU, so that a faulty custom one is found before it is needed.

    Args:
        sampler: the sampler.
        clips: number of clips, B.
        shape: (C, H, W) of a latent frame.

    Raises:
        InputError: the sampler fails, or its result has another shape or dtype or is not finite.
    """
    noise = partial(_batch_noise, torch.empty(clips, 0, *shape), range(clips), (0,), WHOLE_FRAME)
    if not sampler.sample(lambda noisy, _: noisy / 2, noise(), noise).isfinite().all():
        raise InputError(
            f"sampler '{import_path(sampler)}' returns values that are not finite in a trial call without the network: "
            "correct its method solve."
        )


def frame_noise(seed: int, frame: int, shape: Sequence[int], draw: int = 0, purpose: int = GENERATION_NOISE) -> Tensor:
    """Return standard Gaussian noise (float32, CPU), a function of the clip's seed, the frame, the draw and the use."""
    return torch.from_numpy(generator(seed, purpose, frame, draw).standard_normal(tuple(shape), "float32"))


def _batch_noise(
    context: Tensor,
    seeds: Sequence[int],
    frames: Sequence[int],
    part: Part,
    step: int = -1,
    purpose: int = GENERATION_NOISE,
) -> Tensor:
    """Return noise of a block: the initial noise (step -1) or that of a stochastic sampler's step.

    Args:
        context: latents whose frame size, device and precision the noise gets.
        seeds: seed of each clip.
        frames: positions of the block's frames.
        part: the rows and columns of the block.
        step: number of the step.
        purpose: the random stream of the noise, a constant of `randomness.py`.

    Returns:
        (B, C, H, W) if the block is a frame, else (B, f, C, h, w).
    """
    noise = torch.stack(
        [torch.stack([frame_noise(seed, at, context.shape[2:], 1 + step, purpose) for at in frames]) for seed in seeds]
    )
    block = noise[..., part[0], part[1]].to(context)
    return block[:, 0] if len(frames) == 1 and block.shape[2:] == context.shape[2:] else block
