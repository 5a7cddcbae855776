"""Options of a data source in a recipe, and the clip lengths and noisy frames that follow from them."""

import math
from dataclasses import dataclass, field
from typing import Literal

from gpdit_lightning.data.shard_entry import Kind
from gpdit_lightning.errors import InputError

SourceName = Literal["images", "videos", "sequences"]
LossFrames = Literal["all", "targets"]

# The sources of a recipe, and the kind of samples that each uses from its manifests.
KINDS: dict[str, Kind] = {"images": "image", "videos": "video", "sequences": "sequence"}


def whole_blocks(frames: int, block_frames: tuple[int, int]) -> int:
    """Return the largest number of latent frames, at most `frames`, of a clip of whole blocks; 0 if there is none.

    Args:
        frames: latent frames of a sample.
        block_frames: latent frames of the first block, 0: all of a clip; and of a later block, 0: all others.
    """
    first, later = block_frames
    if frames < first:
        return 0
    return frames - (frames - first) % later if first and later else frames


@dataclass(frozen=True)
class SourceConfig:
    """One source of samples in the training mixture."""

    manifests: list[str] = field(default_factory=list)
    """Folders made by `prepare`, for sequences by `prepare-pairs`; or their manifest.json."""
    batch_size: int = 0
    """Samples per optimizer step that uses the source, over all ranks. A source with neither batch_size nor tokens, or
    without manifests, is not used."""
    micro_batches: int = 1
    """Micro-batches into which that batch is divided, one forward and backward pass each; more need less memory."""
    frames: int = 0
    """Maximum number of latent frames from the start of each sample; 0 for all. Shorter samples are used in full."""
    least_frames: int = 0
    """Above 0, the length varies between micro-batches: each number of latent frames from this to `frames` is used
    equally often."""
    weight: float = 1.0
    """Weight relative to the other sources: of the source's mean loss in each step if data.sampling is joint, of the
    number of its steps if it is alternate."""
    tokens: int = 0
    """Above 0, replaces batch_size: tokens per optimizer step that uses the source, over all ranks. A clip of F latent
    frames of h x w has F x h x w / patch_size^2 tokens; each shape and clip length has the largest number of samples
    within the budget."""
    shuffle_window: int = 65_536
    """Approximate number of samples, in whole shards, that are shuffled together; reads stay within them."""
    loss_frames: LossFrames = "all"
    """Frames with a loss: `all`; or, for sequences (source, target, source, target, ...), the `targets` only, each
    conditioned on all frames before it."""
    frames_without_loss: int = 0
    """Number of latent frames at the start of each sample that are context only, without noise and loss; 0: every frame
    has a loss, also the first, which has no context. Faster training of models that only continue videos."""

    @property
    def shortest(self) -> int:
        """The least number of latent frames that samples are cut to; 0 if they are not cut."""
        return self.least_frames or self.frames

    def check(self, name: str) -> None:
        """Check the options that do not depend on the samples.

        Args:
            name: name of the source.

        Raises:
            InputError: an option is outside its range, or a loss on targets is requested from a source that has none.
        """
        for option in ("batch_size", "tokens", "frames", "least_frames", "frames_without_loss"):
            if getattr(self, option) < 0:
                raise InputError(f"data.{name}.{option} is {getattr(self, option)}; it must not be negative.")
        for option in ("micro_batches", "shuffle_window"):
            if getattr(self, option) < 1:
                raise InputError(f"data.{name}.{option} is {getattr(self, option)}; it must be at least 1.")
        if not 0 < self.weight < math.inf:
            raise InputError(f"data.{name}.weight is {self.weight}; it must be positive and finite.")
        if self.loss_frames == "targets" and name != "sequences":
            raise InputError(f"data.{name}.loss_frames is targets, which only data.sequences has: set it to all.")
        if self.loss_frames == "targets" and self.frames_without_loss:
            raise InputError(
                f"data.{name}.frames_without_loss is {self.frames_without_loss}, but loss_frames is targets: set only "
                "one of them."
            )

    def clip_lengths(self, name: str, available: int, block_frames: tuple[int, int] = (1, 1)) -> tuple[int, ...]:
        """Return the numbers of latent frames that samples of a length are cut to.

        They are the numbers within the limits that consist of whole blocks of the backbone. If there is none, or the
        samples are shorter than the least one, samples are used up to the end of their last whole block. A single
        length that the recipe gives, and the length of samples without a whole block, are not changed: the stage
        refuses them.

        Args:
            name: name of the source.
            available: latent frames of the samples.
            block_frames: latent frames of the first and of a later block; see :func:`whole_blocks`.

        Raises:
            InputError: `least_frames` is above `frames`, or the samples are too short for a loss on targets.
        """
        most = self.frames or available
        least = self.least_frames or most
        if least > most:
            raise InputError(
                f"data.{name}.least_frames is {least}, more than the {most} latent frames of the longest clips: lower "
                "it."
            )
        lengths = self._whole_lengths(range(min(least, available), min(most, available) + 1), block_frames)
        if self.loss_frames == "targets" and lengths[0] < 2:
            raise InputError(
                f"data.{name}.loss_frames is targets, but a sequence of one latent frame has none: take at least 2 "
                "frames of each, or set it to all."
            )
        if self.frames_without_loss >= lengths[0]:
            raise InputError(
                f"data.{name}.frames_without_loss is {self.frames_without_loss}, but {lengths[0]} latent frames of "
                "some samples are used: lower it, or take more frames of each."
            )
        return lengths

    def _whole_lengths(self, lengths: range, block_frames: tuple[int, int]) -> tuple[int, ...]:
        whole = tuple(length for length in lengths if whole_blocks(length, block_frames) == length)
        longest, is_given = lengths[-1], self.frames == self.shortest == lengths[-1]
        return whole or (longest if is_given else whole_blocks(longest, block_frames) or longest,)

    def noisy_frames(self, frames: int) -> tuple[int, ...] | None:
        """Return the positions of the frames with noise and loss in clips of `frames` latent frames; None for all.

        The targets are every second frame.
        """
        if self.loss_frames == "targets":
            return tuple(range(1, frames, 2))
        return tuple(range(self.frames_without_loss, frames)) if self.frames_without_loss else None
