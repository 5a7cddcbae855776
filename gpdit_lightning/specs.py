"""Records of a codec and of the training clips, for manifests and checkpoints.

Letters: T pixel frames, F latent frames, C latent channels, H x W pixels, h x w latent pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from gpdit_lightning.errors import InputError
from gpdit_lightning.imports import is_import_path
from gpdit_lightning.schema import (
    NUMBER,
    SIZE,
    TEXT,
    TEXT_OR_NULL,
    Constraint,
    check,
    shown,
    size_up_to,
)

FACTOR = size_up_to(2**16)
# What the record of a training may state is below these, since memory for a generated clip is taken by it.
MAX_STRIDE, MAX_CLIP_FRAMES, MAX_FRAME_PIXELS, MAX_SIZES = 2**20, 2**12, 2**26, 2**12
# float16 latents that are whitened by these remain far within float32.
WHITENING_MEAN = Constraint("a number within 1e6 of 0", lambda value: NUMBER.accepts(value) and abs(value) <= 1e6)
FRAME_RATE = Constraint("a number from 0.001 to 100,000", lambda value: NUMBER.accepts(value) and 1e-3 <= value <= 1e5)
WHITENING_STD = Constraint("a number from 1e-6 to 1e6", lambda value: NUMBER.accepts(value) and 1e-6 <= value <= 1e6)


class LatentGrid:
    """The mapping between the shapes of pixels and latents: the common base of codecs and their records.

    A codec is causal in time: the first latent frame covers one pixel frame and each later one `temporal_factor`, so
    that T = 1 + temporal_factor (F - 1).

    Attributes:
        latent_channels: C.
        spatial_factor: pixels along one side of a latent pixel.
        temporal_factor: pixel frames in each latent frame after the first.
    """

    latent_channels: int
    spatial_factor: int
    temporal_factor: int

    def latent_frames(self, pixel_frames: int, option: str = "the number of pixel frames") -> int:
        """Return F for T pixel frames.

        Args:
            pixel_frames: T.
            option: what sets T, for the message.

        Raises:
            InputError: T is not 1 + temporal_factor k.
        """
        if pixel_frames < 1 or (pixel_frames - 1) % self.temporal_factor:
            lower = self.encodable_frames(max(1, pixel_frames))
            raise InputError(
                f"{option} is {pixel_frames}, which is not 1 + {self.temporal_factor} k: give {lower} or "
                f"{lower + self.temporal_factor}."
            )
        return 1 + (pixel_frames - 1) // self.temporal_factor

    def encodable_frames(self, available: int) -> int:
        """Return the largest T = 1 + temporal_factor k that is at most `available`, which is at least 1."""
        return available - (available - 1) % self.temporal_factor

    def pixel_frames(self, latent_frames: int) -> int:
        """Return T for F latent frames.

        Raises:
            InputError: F is below 1.
        """
        if latent_frames < 1:
            raise InputError(f"{latent_frames} latent frames were requested: request at least 1.")
        return 1 + (latent_frames - 1) * self.temporal_factor

    def latent_shape(self, pixels: Sequence[int]) -> tuple[int, int, int, int]:
        """Return the shape (F, C, h, w) of the latents of a clip of pixels (T, 3, H, W)."""
        frames, _, height, width = pixels
        size = height // self.spatial_factor, width // self.spatial_factor
        return self.latent_frames(frames), self.latent_channels, *size

    def check_frame_size(self, height: int, width: int) -> None:
        """Check a frame size in pixels.

        Raises:
            InputError: the spatial factor does not divide the height or the width.
        """
        factor = self.spatial_factor
        if height % factor or width % factor:
            lower = "x".join(str(max(1, size // factor) * factor) for size in (height, width))
            raise InputError(
                f"{height}x{width} pixels are not multiples of {factor} in height and width: crop or resize to {lower}."
            )


@dataclass(frozen=True)
class CodecSpec(LatentGrid):
    """The record of a codec in manifests and checkpoints: enough to load it and to tell it from other codecs."""

    name: str
    """A registered name, or the import path of a custom codec's class."""
    source: str | None
    """The folder, file or hub name of its weights; None for weights that ship with the package."""
    latent_channels: int
    spatial_factor: int
    temporal_factor: int
    mean: tuple[float, ...]
    """(C,) The whitened latents are (latents - mean) / std, in each channel."""
    std: tuple[float, ...]
    """(C,)"""
    fingerprint: str
    """16 hexadecimal digits of a hash of the weights."""

    SCHEMA: ClassVar[dict[str, Any]] = {
        "name": TEXT,
        "source": TEXT_OR_NULL,
        "latent_channels": FACTOR,
        "spatial_factor": FACTOR,
        "temporal_factor": FACTOR,
        "mean": [WHITENING_MEAN],
        "std": [WHITENING_STD],
        "fingerprint": TEXT,
    }

    @property
    def is_custom(self) -> bool:
        """Whether the name is an import path, which the user must give too: a file must not choose code to import."""
        return is_import_path(self.name)

    @classmethod
    def from_dict(cls, content: Any, file: str, cure: str) -> Self:
        """Parse and validate the record in a file.

        Args:
            content: the field `codec` of the file, of any type.
            file: the file's path, for messages.
            cure: what the user should do about an invalid file, for messages.

        Raises:
            InputError: a field is missing or of the wrong type, or `mean` or `std` does not have C numbers.
        """
        check(content, cls.SCHEMA, "codec", file, cure)
        for name in ("mean", "std"):
            if len(content[name]) != content["latent_channels"]:
                raise InputError(
                    f"{file} has codec.{name} = {content[name]!r}, which is not one number for each of the "
                    f"{content['latent_channels']} latent channels: {cure}."
                )
        fields = {name: content[name] for name in cls.SCHEMA}
        return cls(**fields | {"mean": tuple(content["mean"]), "std": tuple(content["std"])})

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    def check_same(
        self,
        other: "CodecSpec",
        owner: str,
        other_owner: str,
        cure: str = "use latents and weights of one codec",
    ) -> None:
        """Check that another spec describes the same codec; its source may differ, since weights may be moved.

        Args:
            other: the other spec.
            owner: the file or model that this spec is from, for the message.
            other_owner: that of the other spec.
            cure: what the user should do about a difference, for the message.

        Raises:
            InputError: the codecs differ. The message names the first field that differs, with both values.
        """
        for name in self.SCHEMA:
            value, other_value = getattr(self, name), getattr(other, name)
            if name != "source" and value != other_value:
                raise InputError(
                    f"{owner} and {other_owner} are of different codecs ({name} {value!r} and {other_value!r}): {cure}."
                )


@dataclass(frozen=True)
class ClipGeometry:
    """Stride, frame sizes and length of the clips that a model was trained on."""

    stride: int
    """Distance of consecutive frames of a clip, in frames of its video."""
    sizes: tuple[tuple[int, int], ...]
    """Heights and widths in pixels."""
    frames: int
    """Latent frames of the longest clips."""
    fps: float | None = None
    """Frames per second to which videos were resampled before the stride; None if they were not."""

    SCHEMA: ClassVar[dict[str, Any]] = {"stride": SIZE, "sizes": [[SIZE]], "frames": SIZE}

    @classmethod
    def from_dict(cls, content: Any, file: str, cure: str) -> Self:
        """Parse and validate the record in a file, from its field `geometry`; otherwise as `CodecSpec.from_dict`."""
        check(content, cls.SCHEMA, "geometry", file, cure)
        pixels = max(math.prod(size) for size in content["sizes"])
        numbers = [content["stride"] // MAX_STRIDE, content["frames"] // MAX_CLIP_FRAMES, pixels // MAX_FRAME_PIXELS]
        if any(numbers) or len(content["sizes"]) > MAX_SIZES:
            raise InputError(f"{file} has a geometry far beyond any clip, {shown(content)}: {cure}.")
        for size in content["sizes"]:
            if len(size) != 2:
                raise InputError(f"{file} has {size!r} in geometry.sizes, which is not [height, width]: {cure}.")
        sizes = tuple((height, width) for height, width in content["sizes"])
        fps = content.get("fps")
        if fps is not None:
            check(content, {"fps": FRAME_RATE}, "geometry", file, cure)
        return cls(content["stride"], sizes, content["frames"], fps)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        content = asdict(self) | {"sizes": [list(size) for size in self.sizes]}
        if self.fps is None:  # as in files of versions without resampling
            del content["fps"]
        return content
