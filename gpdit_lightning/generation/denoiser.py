"""The guided velocity of the next block, given the blocks before it, with a KV cache or without.

Shapes: B clips, C channels, H x W latent pixels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gpdit_lightning.diffusion import rotate_to, velocity_of
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation.config import ClipInputs, GenerationConfig
from gpdit_lightning.generation.precision import autocast
from gpdit_lightning.model import NO_LABEL, GPDiT, GPDiTConfig, KVCache
from gpdit_lightning.model.checks import check_condition


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
        # The context noise (B, S) of the blocks of `clean`; None if there is none in the whole rollout, or in `clean`.
        self.clean_theta: Tensor | None = None
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
                clean_theta=self.clean_theta,
            )
        velocities = velocity_of(prediction, noisy, theta, self.model.config.target).split(clips)
        if self.cache is not None:
            self.clean = self.clean_theta = None  # the cache contains them now
        return guidance.combine(
            velocities[0], velocities[1] if over_label else None, velocities[-1] if over_context else None
        )

    def append(self, latent: Tensor, draw_noise: Callable[[], Tensor]) -> None:
        """Append a generated block to the context; the next network call computes its keys and values.

        Args:
            latent: (B, C, H, W) or (B, f, C, h, w), clean.
            draw_noise: returns standard Gaussian noise of the same shape, for the context noise.
        """
        angle, theta = self.config.context_noise, None
        if angle:
            theta = latent.new_full((len(latent), 1), angle)
            latent = rotate_to(latent, draw_noise(), theta[:, 0]).noisy
        latent = latent[:, None] if latent.ndim == 4 else latent
        if self.cache is None and self.clean is not None:
            if theta is not None:
                theta = torch.cat((self._theta_of_clean(), theta), dim=1)
            latent = torch.cat((self.clean, latent), dim=1)
        self.clean, self.clean_theta = latent, theta
        if self.cache is None:
            self._drop_invisible_frames()

    def _theta_of_clean(self) -> Tensor:
        """Return the context noise (B, S) of the blocks of `clean`, which without a cache are whole frames."""
        assert self.clean is not None
        if self.clean_theta is not None:
            return self.clean_theta
        blocks = self.model.layout(*self.clean.shape[-2:]).count(self.clean.shape[1])
        return self.clean.new_zeros(len(self.clean), blocks)

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
        if self.clean is None or self.visible is None or self.clean.shape[1] <= self.visible:
            return
        sinks, window = self.config.sinks, self.visible - self.config.sinks
        self.clean = torch.cat((self.clean[:, :sinks], self.clean[:, -window:]), dim=1)
        if self.clean_theta is not None:  # with a window blocks are frames
            self.clean_theta = torch.cat((self.clean_theta[:, :sinks], self.clean_theta[:, -window:]), dim=1)


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
