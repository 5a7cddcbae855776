"""Rollout: blocks of latents generated in turn, each given the clean blocks before it (GPDiT, figure 2, left).

A block is a latent frame by default, and otherwise what the model's `block_shape` says.

Shapes: B clips, C channels, H x W latent pixels.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from gpdit_lightning.diffusion import Guidance, RotationSampler, Sampler, check_target, velocity_of
from gpdit_lightning.errors import InputError
from gpdit_lightning.imports import import_path
from gpdit_lightning.model import NO_LABEL, GPDiT, GPDiTConfig, KVCache
from gpdit_lightning.model.checks import check_condition, check_rollout
from gpdit_lightning.model.layout import BlockLayout, Part
from gpdit_lightning.randomness import GENERATION_NOISE, generator


@dataclass(frozen=True)
class GenerationConfig:
    """How latent frames are generated.

    Raises:
        InputError: a window below 1, a negative number of sinks, or a data type that autocast does not have.
    """

    sampler: Sampler = field(default_factory=RotationSampler)
    """Turns noise into a block, with one network call per step."""
    guidance: Guidance = field(default_factory=Guidance)
    """Classifier-free guidance over the context and over the label or text."""
    window: int | None = None
    """Number of preceding clean latent frames that a new frame attends to; None: all. In training it is at most the
    number of latent frames of a clip less one. With a window, memory and time per frame do not grow with the video.
    With `of2` attention a clean frame attends to this many clean frames too, itself included: to one earlier frame
    less than a new frame does."""
    sinks: int = 0
    """Number of latent frames from the beginning of the video that stay visible besides the window (StreamingLLM)."""
    use_cache: bool = True
    """Cache the keys and values of clean frames. Without a cache, the visible frames are computed again at every
    network call (GPDiT, section 4.1.2), with the same result. With `of2` attention a clean frame depends on those
    before it, and the window must therefore contain all frames if there is no cache."""
    compile: bool = False
    """Fuse the blocks with torch.compile. Compilation takes about a minute."""
    autocast_dtype: torch.dtype | None = None
    """Data type of matrix products, such as `torch.bfloat16`; None: that of the weights or of an enclosing autocast."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise InputError(f"the window is {self.window} latent frames: give at least 1.")
        if self.sinks < 0:
            raise InputError(f"the number of sinks is {self.sinks}: give 0 or more.")
        if self.autocast_dtype not in (None, torch.bfloat16, torch.float16):
            raise InputError(f"autocast_dtype is {self.autocast_dtype}: give torch.bfloat16, torch.float16 or None.")


@dataclass(frozen=True)
class ClipInputs:
    """Inputs of each clip of a batch besides its context."""

    seeds: int | Sequence[int] = 0
    """Seed of each clip's noise; a number s gives clip b the seed s + b. The noise is independent of batch
    composition."""
    condition: Tensor | None = None
    """(B,) class numbers or (B, L, text width) text embeddings, on any device, for a model conditioned on them."""
    null_condition: Tensor | None = None
    """(B, L, text width) embeddings of an empty text, for guidance over a text; classes have a null class."""

    def seed_per_clip(self, clips: int) -> Sequence[int]:
        """Return one seed for each of `clips` clips.

        Raises:
            InputError: the number of seeds differs from the number of clips, or a seed is negative.
        """
        seeds = range(self.seeds, self.seeds + clips) if isinstance(self.seeds, int) else self.seeds
        if len(seeds) != clips or min(seeds, default=0) < 0:
            raise InputError(f"the seeds are {list(seeds)} for {clips} clips: give one seed per clip, at least 0.")
        return seeds


WHOLE_FRAME: Part = (slice(None), slice(None))
DEFAULT_CONFIG = GenerationConfig()
DEFAULT_INPUTS = ClipInputs()


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
            denoiser.append(blocks[-1])
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


def cast_linear_weights(model: GPDiT, dtype: torch.dtype) -> None:
    """Round the weights of the blocks' linear layers to `dtype`, which autocast would otherwise do at every call.

    This halves the memory traffic. Layers that autocast keeps in float32 are unchanged.
    """
    for block in model.blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)


def autocast(like: Tensor, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Return a context that computes matrix products in `dtype` on the device of a tensor; None changes nothing."""
    if dtype is None or like.device.type == "meta":  # where nothing is computed, and autocast does not exist
        return nullcontext()
    return torch.autocast(like.device.type, dtype=dtype)


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


def frame_noise(seed: int, frame: int, shape: Sequence[int], draw: int = 0) -> Tensor:
    """Return standard Gaussian noise (float32, CPU) that depends only on the clip's seed, the frame and the draw."""
    return torch.from_numpy(generator(seed, GENERATION_NOISE, frame, draw).standard_normal(tuple(shape), "float32"))


def _batch_noise(context: Tensor, seeds: Sequence[int], frames: Sequence[int], part: Part, step: int = -1) -> Tensor:
    """Return noise of a block: the initial noise (step -1) or that of a stochastic sampler's step.

    Args:
        context: latents whose frame size, device and precision the noise gets.
        seeds: seed of each clip.
        frames: positions of the block's frames.
        part: the rows and columns of the block.
        step: number of the step.

    Returns:
        (B, C, H, W) if the block is a frame, else (B, f, C, h, w).
    """
    noise = torch.stack(
        [torch.stack([frame_noise(seed, frame, context.shape[2:], 1 + step) for frame in frames]) for seed in seeds]
    )
    block = noise[..., part[0], part[1]].to(context)
    return block[:, 0] if len(frames) == 1 and block.shape[2:] == context.shape[2:] else block


class Denoiser:
    """Guided velocity of the next block given the blocks before it: the function that a sampler integrates.

    Args:
        model, context, frames, config, inputs: as for :func:`rollout`; the context is on the device of the model.

    Raises:
        InputError: a window that an `of2` model cannot use without a cache, no window for an endless rollout, or
            guidance over a condition that is missing.
    """

    def __init__(
        self, model: GPDiT, context: Tensor, frames: int | None, config: GenerationConfig, inputs: ClipInputs
    ) -> None:
        context_frames = context.shape[1]
        self.model, self.config = model, config
        self.condition, self.null_condition = _conditions(model, config.guidance.label, inputs, len(context))
        if frames is None and config.window is None:
            raise InputError("an endless rollout would keep all frames in memory: give it a window.")
        layout = model.layout(*context.shape[-2:])
        history = None if frames is None else max(layout.frames_before_last(context_frames + frames), context_frames, 1)
        self.visible = _visible_frames(config, history)
        if not config.use_cache:
            _check_without_cache(model.config, None if self.visible is None else config.window)
        self.cache: KVCache | None = None
        # Clean frames (B, k, C, H, W) that the next network call takes as inputs. With a cache these are the frames
        # that are not in it yet; without one, all visible frames.
        self.clean = context if context_frames else None
        if config.use_cache:
            self._fill_cache(context, history)
        else:
            self._drop_invisible_frames()

    def __call__(self, noisy: Tensor, theta: Tensor) -> Tensor:
        """Return the velocity at `noisy`, (B, C, H, W) if blocks are frames, else (B, f, C, h, w), and `theta` (B,)."""
        clips, guidance = len(noisy), self.config.guidance
        # `at_all_levels` comes first, since reading the angle makes the host wait for the GPU.
        guided = guidance.at_all_levels or guidance.applies_at(theta[0].item(), self.config.sampler.schedule)
        over_label = guided and self.null_condition is not None
        over_context = guided and guidance.context != 1 and self._has_context
        conditions = [self.condition]
        conditions += [self.null_condition] if over_label else []
        conditions += [self.condition] if over_context else []
        # The last rows, for guidance over the context, are more than `draws` per clip: they have no context.
        with autocast(noisy, self.config.autocast_dtype):
            noisy, theta = torch.cat([noisy] * len(conditions)), theta.repeat(len(conditions))
            prediction = self.model.denoise(
                noisy,
                theta,
                self.cache,
                None if self.condition is None else torch.cat([c for c in conditions if c is not None]),
                self.clean,
                draws=2 if over_label else 1,
                compiled=self.config.compile,
            )
        velocities = velocity_of(prediction, noisy, theta, self.model.config.target).split(clips)
        if self.cache is not None:
            self.clean = None  # the cache contains it now
        return guidance.combine(
            velocities[0], velocities[1] if over_label else None, velocities[-1] if over_context else None
        )

    def append(self, latent: Tensor) -> None:
        """Append a generated block to the context; the next network call computes its keys and values."""
        latent = latent[:, None] if latent.ndim == 4 else latent
        if self.cache is not None or self.clean is None:
            self.clean = latent
        else:
            self.clean = torch.cat((self.clean, latent), dim=1)
            self._drop_invisible_frames()

    def _fill_cache(self, context: Tensor, history: int | None) -> None:
        """Cache all context blocks except the last frames, which are an input of the first network call."""
        clips, context_frames, _, height, width = context.shape
        frames, sinks = (self.visible, self.config.sinks) if self.visible is not None else (history, None)
        assert frames is not None  # an endless rollout has a window
        with autocast(context, self.config.autocast_dtype):
            cache = self.model.new_cache(clips, frames, height, width, sinks)
            last = cache.layout.frames_before_last(context_frames)
            self.model.extend(cache, context[:, :last])
        self.cache = cache
        self.clean = context[:, last:] if last < context_frames else None

    @property
    def _has_context(self) -> bool:
        return self.clean is not None or (self.cache is not None and self.cache.blocks > 0)

    def _drop_invisible_frames(self) -> None:
        """Drop clean frames that are no longer visible; the positions of the others become consecutive."""
        if self.clean is not None and self.visible is not None and self.clean.shape[1] > self.visible:
            sinks, window = self.clean[:, : self.config.sinks], self.clean[:, -(self.visible - self.config.sinks) :]
            self.clean = torch.cat((sinks, window), dim=1)


def _check_without_cache(config: GPDiTConfig, window: int | None) -> None:
    """Raise InputError unless the visible frames, all if `window` is None, can be recomputed at every network call."""
    if not config.whole_frames or (window is not None and config.block_frames != (1, 1)):
        raise InputError(
            f"without a cache, blocks of block_shape {config.block_shape} cannot be generated"
            f"{' with a window' if config.whole_frames else ''}: generate with the cache."
        )
    if window is not None and config.attention == "of2":
        raise InputError(
            f"without a cache an of2 model must attend to all frames, but the window is {window}: generate with the "
            "cache, generate fewer frames, or use a model with `of` attention."
        )


def _conditions(model: GPDiT, scale: float, inputs: ClipInputs, clips: int) -> tuple[Tensor | None, Tensor | None]:
    """Return the condition and, for guidance over the label or text, the null condition, on the device of the model.

    Raises:
        InputError: the condition does not fit the model, or it or the null condition of a text is missing.
    """
    # Here, where class numbers may still be on the CPU, their range is checked without a wait for the GPU.
    check_condition(model.config, inputs.condition, clips)
    null = inputs.null_condition
    if scale == 1:
        null = None
    elif inputs.condition is None:
        raise InputError(f"guidance of {scale} over a label needs a label: give a condition, or scale 1.")
    elif null is None and model.config.text_width:
        raise InputError("guidance over a text needs the embeddings of an empty text: give them as null_condition.")
    elif null is None:
        null = torch.full_like(inputs.condition, NO_LABEL)
    condition, null = (given if given is None else given.to(model.device) for given in (inputs.condition, null))
    return condition, null


def _visible_frames(config: GenerationConfig, history: int | None) -> int | None:
    """Return the maximum number of visible clean frames, window and sinks; None if the whole history fits.

    Args:
        config: gives window and sinks.
        history: number of clean frames of the whole rollout; None for an endless one.
    """
    if config.window is None:
        return None
    visible = config.sinks + config.window
    return None if history is not None and history <= visible else visible
