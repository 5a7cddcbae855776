"""Latent frames one after another, each sampled given the clean ones before it (GPDiT, figure 2, left)."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import torch
from torch import Tensor, nn

from gpdit_lightning.diffusion import Guidance, RotationSampler, Sampler
from gpdit_lightning.errors import InputError
from gpdit_lightning.model import NO_LABEL, GPDiT
from gpdit_lightning.randomness import GENERATION_NOISE, generator


@dataclass(frozen=True)
class GenerationConfig:
    """How latent frames are generated.

    Raises:
        InputError: a window without room for a frame, or a negative number of sinks.
    """

    sampler: Sampler = field(default_factory=RotationSampler)
    """From noise to a frame."""
    guidance: Guidance = field(default_factory=Guidance)
    """Over the context and the label or text."""
    window: int | None = None
    """The latest clean frames that a frame sees; None: all. Training showed one frame less than its clips have. With a
    window, memory and time per frame stay the same for ever."""
    sinks: int = 0
    """The first frames of the video, so many, which stay visible besides the window."""
    cached: bool = True
    """Keep the keys and values of clean frames. Without, the visible frames are computed anew at every network call
    (GPDiT, 4.1.2) and the frames come out equal; with `of2` a clean frame has seen those before it, so that none may
    leave the window."""
    compiled: bool = False
    """Run blocks that torch.compile has fused: a minute or so at first, worth it for many frames."""
    precision: torch.dtype | None = None
    """Of products, as `torch.bfloat16`; None: as the model is, or as an autocast around the rollout says."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise InputError(f"the window is {self.window} latent frames; let each frame see at least 1.")
        if self.sinks < 0:
            raise InputError(f"the number of sinks is {self.sinks}; it must not be negative.")


DEFAULT = GenerationConfig()


@torch.inference_mode()
def rollout(
    model: GPDiT,
    context: Tensor,
    frames: int | None,
    config: GenerationConfig = DEFAULT,
    *,
    seeds: int | Sequence[int] = 0,
    condition: Tensor | None = None,
    without_condition: Tensor | None = None,
) -> Iterator[Tensor]:
    """Generate latent frames after `context`, yielding each when it is done.

    Args:
        model: in evaluation mode.
        context: (B, k, C, H, W) whitened latents; k = 0 begins from nothing.
        frames: how many to generate; None never ends, and needs a window.
        config: sampler, guidance, window, and how it is computed.
        seeds: of the noise, one for each clip; a number gives clip b `seeds + b`. A clip's noise depends on its seed
            alone, so that clips may be batched in any way.
        condition: (B,) classes or (B, L, text width) embeddings, for a model that takes them.
        without_condition: the same for no condition, where it is guided over; None for classes.

    Yields:
        (B, C, H, W) whitened latents.

    Raises:
        InputError: seeds, a window or a condition that do not fit the rest.
    """
    clips, known = context.shape[:2]
    seeds = range(seeds, seeds + clips) if isinstance(seeds, int) else seeds
    if len(seeds) != clips or min(seeds, default=0) < 0:
        raise InputError(f"the seeds are {list(seeds)} for {clips} clips: give each clip one, from 0 on.")
    denoiser = Denoiser(model, context, frames, config, condition, without_condition)
    for frame in count(known) if frames is None else range(known, known + frames):
        noise = partial(_noise, context, seeds, frame)
        latent = config.sampler.sample(denoiser, noise(), noise)
        yield latent
        denoiser.append(latent)


def products_in(model: GPDiT, precision: torch.dtype) -> None:
    """Round the weights of the blocks' products, once, as an autocast would at every call: half the memory to read.

    What autocast leaves in float32 stays as it is: embeddings, norms and the residual stream.
    """
    for block in model.blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.to(precision)


def frame_noise(seed: int, frame: int, shape: Sequence[int], draw: int = 0) -> Tensor:
    """Standard Gaussian noise (float32, on the CPU): a function of the clip's seed, the frame and the draw alone."""
    return torch.from_numpy(generator(seed, GENERATION_NOISE, frame, draw).standard_normal(tuple(shape), "float32"))


def _noise(context: Tensor, seeds: Sequence[int], frame: int, step: int = -1) -> Tensor:
    """What a frame of all clips begins with, or what a step of a stochastic sampler adds: (B, C, H, W)."""
    return torch.stack([frame_noise(seed, frame, context.shape[2:], 1 + step) for seed in seeds]).to(context)


class Denoiser:
    """What a sampler asks: the guided velocity of the frame that follows those so far.

    Args:
        model, context, frames, config, condition, without_condition: as for :func:`rollout`.

    Raises:
        InputError: a window that the model cannot do without a cache, no window for a rollout without end, or guidance
            over a condition that is not given.
    """

    def __init__(
        self,
        model: GPDiT,
        context: Tensor,
        frames: int | None,
        config: GenerationConfig,
        condition: Tensor | None,
        without_condition: Tensor | None,
    ) -> None:
        clips, known, _, height, width = context.shape
        self.model, self.config = model, config
        self.condition, self.without_condition = condition, without_condition
        self.guides_label = config.guidance.label != 1
        if self.guides_label:
            if condition is None:
                raise InputError(f"guidance of {config.guidance.label} over a label needs one: give it, or scale 1.")
            if without_condition is None and model.config.text_width:
                raise InputError("guidance over a text needs the embeddings of an empty one: give without_condition.")
            if without_condition is None:
                self.without_condition = torch.full_like(condition, NO_LABEL)
        if frames is None and config.window is None:
            raise InputError("a rollout without end would keep all frames it made: give it a window.")
        all_frames = None if frames is None else max(known + frames - 1, 1)
        visible = None if config.window is None else config.sinks + config.window
        if visible is not None and all_frames is not None and all_frames <= visible:
            visible = None  # none is ever left out
        self.visible = visible
        if visible is not None and not config.cached and model.config.attention == "of2":
            raise InputError(
                f"without a cache an of2 model must see all frames, and a window of {config.window} leaves some out: "
                "generate with the cache, fewer frames, or an `of` model."
            )
        self.cache = None
        # The clean frames that no pass has taken in yet; without a cache, all that are visible.
        self.clean = context if known else None
        if config.cached:
            with self._precision(context):
                room, sinks = (visible, config.sinks) if visible is not None else (all_frames, None)
                assert room is not None
                self.cache = model.new_cache(clips, room, height, width, sinks)
                model.extend(self.cache, context[:, :-1])
            self.clean = context[:, -1:] if known else None
        else:
            self._forget()

    def __call__(self, noisy: Tensor, theta: Tensor) -> Tensor:
        """The velocity (B, C, H, W) at `noisy` (B, C, H, W) and theta (B,)."""
        clips, guidance = len(noisy), self.config.guidance
        # The angle is asked for only where it matters: on a GPU the answer waits for all work before it.
        guided = guidance.everywhere or guidance.at(theta[0].item(), self.config.sampler.schedule)
        label = guided and self.guides_label
        context = guided and guidance.context != 1 and self._has_context
        conditions = [self.condition]
        conditions += [self.without_condition] if label else []
        conditions += [self.condition] if context else []
        with self._precision(noisy):
            answers = self.model.denoise(
                noisy.repeat(len(conditions), 1, 1, 1),
                theta.repeat(len(conditions)),
                self.cache,
                None if self.condition is None else torch.cat([c for c in conditions if c is not None]),
                self.clean,
                draws=2 if label else 1,
                without_context=clips if context else 0,
                compiled=self.config.compiled,
            ).split(clips)
        if self.cache is not None:
            self.clean = None  # it is in the cache now
        return guidance.combine(answers[0], answers[1] if label else None, answers[-1] if context else None)

    def append(self, latent: Tensor) -> None:
        """Take in the frame (B, C, H, W) that is done: the next pass will."""
        latent = latent[:, None]
        if self.cache is not None or self.clean is None:
            self.clean = latent
        else:
            self.clean = torch.cat((self.clean, latent), dim=1)
            self._forget()

    @property
    def _has_context(self) -> bool:
        return self.clean is not None or (self.cache is not None and self.cache.frames > 0)

    def _forget(self) -> None:
        """Keep of all clean frames those that are visible: they stand as if they followed each other."""
        if self.clean is not None and self.visible is not None and self.clean.shape[1] > self.visible:
            sinks, window = self.clean[:, : self.config.sinks], self.clean[:, -(self.visible - self.config.sinks) :]
            self.clean = torch.cat((sinks, window), dim=1)

    def _precision(self, like: Tensor) -> AbstractContextManager[object]:
        if self.config.precision is None:
            return nullcontext()
        return torch.autocast(like.device.type, dtype=self.config.precision)
