"""How latent frames are generated, and the inputs of each clip besides its context."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpdit_lightning.diffusion import Guidance, RotationSampler, Sampler
from gpdit_lightning.errors import InputError


@dataclass(frozen=True)
class GenerationConfig:
    """How latent frames are generated.

    Raises:
        InputError: a window below 1, a negative number of sinks, an angle outside 0 to pi/2, or a data type that
            autocast does not have.
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
    context_noise: float = 0.0
    """Angle theta_c, in radians, by which a generated block is rotated towards noise before later blocks attend to it.
    The model should be trained with at least as much (`data.context_noise`). Given frames and the result stay clean."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise InputError(f"the window is {self.window} latent frames: give at least 1.")
        if self.sinks < 0:
            raise InputError(f"the number of sinks is {self.sinks}: give 0 or more.")
        if not 0 <= self.context_noise <= math.pi / 2:
            raise InputError(f"context_noise is {self.context_noise}: give an angle from 0 to pi/2 = 1.57 radians.")
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


DEFAULT_CONFIG = GenerationConfig()
DEFAULT_INPUTS = ClipInputs()
