"""A source of data in a recipe: its options, and the clip lengths that they give."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from gpdit_lightning.data.manifest import Kind
from gpdit_lightning.data.plan import LossFrames, PlannedBucket, PlannedSource, noisy_frames
from gpdit_lightning.errors import InputError

# The sources of a recipe, and the kind of samples that each takes from its manifests.
KINDS: dict[str, Kind] = {"images": "image", "videos": "video", "sequences": "sequence"}


@dataclass(frozen=True)
class SourceConfig:
    """One source of samples in the mixture."""

    manifests: list[str] = field(default_factory=list)
    """Folders made by `prepare`, for sequences by `prepare-pairs`; or their manifest.json."""
    batch_size: int = 0
    """Samples per optimizer step over all ranks; a source with neither batch_size nor tokens, or without manifests, is
    left out."""
    micro_batches: int = 1
    """Equal parts into which that batch is cut, one forward and backward pass each: more parts, less memory."""
    frames: int = 0
    """Most latent frames taken from the start of each sample; 0 takes all."""
    least_frames: int = 0
    """Above 0, micro-batches vary in length: each number of latent frames from here to `frames` equally often."""
    weight: float = 1.0
    """Weight of this source's mean loss relative to the other sources'."""
    tokens: int = 0
    """Above 0, instead of batch_size: tokens per optimizer step over all ranks, where a clip of F latent frames of
    h x w has F x h x w / patch_size^2. Each shape, and each length of clips, then has the number of samples that comes
    closest from below."""
    shuffle_window: int = 65_536
    """Samples that are shuffled together: the samples of whole shards, about this many. Reading stays within them."""
    loss_frames: LossFrames = "all"
    """The frames with a loss: `all`, or of sequences (source, target, source, target, ...) the `targets` only, given
    all frames before them."""

    @property
    def used(self) -> bool:
        """Whether training uses the source."""
        return bool(self.manifests) and max(self.batch_size, self.tokens) > 0

    def check(self, name: str) -> None:
        """Raise InputError for a negative option of the source with this name."""
        for option in ("batch_size", "tokens", "frames", "least_frames"):
            if getattr(self, option) < 0:
                raise InputError(f"data.{name}.{option} is {getattr(self, option)}; it must not be negative.")

    def clip_lengths(self, name: str, available: int, owner: str) -> tuple[int, ...]:
        """The numbers of latent frames that samples are cut to.

        A fixed length must be available in full; where lengths vary, short samples give the short ones.

        Args:
            name: of the source.
            available: latent frames of the samples.
            owner: what has the samples, for messages.

        Raises:
            InputError: the samples are too short, or have no frames for a loss on targets.
        """
        most = self.frames or available
        least = self.least_frames or most
        if least > most:
            raise InputError(
                f"data.{name}.least_frames is {least}, more than the {most} latent frames of the longest clips: lower "
                "it."
            )
        if least > available:
            raise InputError(
                f"data.{name} takes {least} latent frames of each sample, but {owner} has samples of {available}: "
                "prepare longer clips, or take fewer frames."
            )
        noisy_frames(name, self.loss_frames, least)
        return tuple(range(least, min(most, available) + 1))

    def planned(self, name: str, buckets: Iterable[PlannedBucket], patch_size: int) -> PlannedSource:
        """The source as the batch plan takes it."""
        return PlannedSource(
            name=name,
            buckets=tuple(buckets),
            batch_size=self.batch_size,
            tokens=self.tokens,
            micro_batches=self.micro_batches,
            weight=self.weight,
            shuffle_window=self.shuffle_window,
            loss_frames=self.loss_frames,
            patch_size=patch_size,
        )
