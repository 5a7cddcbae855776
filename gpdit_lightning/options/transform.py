"""Options of `transform`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpdit_lightning.options.shared import (
    BatchedSamplerOptions,
    ModelOptions,
    OptionRecord,
    check_at_least,
)


@dataclass(frozen=True, kw_only=True)
class ExampleOptions(OptionRecord):
    """Examples and sources."""

    examples: Path
    """A folder that contains two folders, source and target, of images with the same names; with --task a folder of
    single images."""
    source: Sequence[str]
    """Images, and folders of images."""
    task: str | None = None
    """Make source and target of examples, and of --source, from single images: grayscale, colourisation, edges,
    edges_to_image, sketch, copy."""
    examples_task: str | None = None
    """Another task for the examples only (`pairs` for a folder of pairs), to see what the examples contribute; by
    default --task, or pairs without it."""
    pairs: int | None = None
    """Number of examples, the first in natural order; by default the pairs of a training sequence less one."""
    truth: Path | None = None
    """The ground truth: an image, or a folder of images with the names of the sources."""
    size: str | None = None
    """HEIGHTxWIDTH in pixels, one of the sizes of training; by default the closest in aspect."""


@dataclass(frozen=True, kw_only=True)
class ImageOutputOptions(OptionRecord):
    """Output."""

    out: Path = Path("transformed.png")
    """A .png file for one source, a folder for several; a result has the name of its source."""
    sheet: Path | None = None
    """A .png file with examples, sources, results and ground truth side by side, a row per source, at most 64; by
    default OUT_sheet.png beside --out."""


@dataclass(frozen=True, kw_only=True)
class TransformOptions(ModelOptions, ExampleOptions, BatchedSamplerOptions, ImageOutputOptions):
    """Transform."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, pairs=1)
