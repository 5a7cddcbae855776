"""Options of `prepare-pairs`."""

from dataclasses import dataclass
from pathlib import Path

from gpdit_lightning.errors import InputError
from gpdit_lightning.options.prepare import CodecOptions, ValidationOptions
from gpdit_lightning.options.shared import check_at_least


@dataclass(frozen=True, kw_only=True)
class PairInputOptions:
    """Images."""

    task: str = "pairs"
    """pairs: both images of each pair are given. Or both are made from one image: grayscale (to grayscale),
    colourisation (the reverse), edges (to Canny edges), edges_to_image (the reverse), sketch (to a pencil drawing),
    copy (no change: a warm-up). edges and sketch need OpenCV (pip install -e '.[edges]')."""
    sources: Path | None = None
    """Folder of the source images, or of the images from which a task makes both sides; not searched recursively."""
    targets: Path | None = None
    """For --task pairs: folder of the target images, with the names and sizes of their sources."""
    pairs_in: Path | None = None
    """For --task pairs, instead of --sources and --targets: a folder that holds the folders source and target."""
    size: str = "256x256"
    """HEIGHTxWIDTH in pixels to which every image is scaled and cropped."""


@dataclass(frozen=True, kw_only=True)
class SequenceOptions:
    """Sequences."""

    pairs: int = 40
    """Most pairs from which training sequences are drawn (paper: 40)."""
    sequences: int = 20
    """Training sequences (paper: 20)."""
    pairs_per_sequence: int = 3
    """Pairs in a sequence (paper: 3, six frames)."""
    seed: int = 0
    """Seed of the held-out images and of the drawing of pairs."""


@dataclass(frozen=True, kw_only=True)
class PairValidationOptions(ValidationOptions):
    """Validation."""

    validation_fraction: float = 0.1
    """Fraction of the images that is held out, at least one, by a hash of their pixels and the seed: the same images in
    every task, and when others are added. The other image of a pair is held out with it. 0 holds out none."""
    source_pattern: str | None = None
    r"""Regular expression for the part of a file's name that names the recording, if images are frames of videos: the
    frames of a recording are then held out together, by a hash of that part. Example: clip\d+"""
    held_out_pairs: int = 4
    """Most held-out pairs to use; each ends one validation sequence, whose other pairs are training pairs."""


@dataclass(frozen=True, kw_only=True)
class PairOutputOptions:
    """Output."""

    out: Path
    """Folder for the shards and manifest.json."""


@dataclass(frozen=True, kw_only=True)
class PreparePairsOptions(PairInputOptions, SequenceOptions, PairValidationOptions, PairOutputOptions, CodecOptions):
    """Prepare pairs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, pairs=1, sequences=1, pairs_per_sequence=1, held_out_pairs=0, seed=0)
        if self.pairs < self.pairs_per_sequence:
            raise InputError(
                f"--pairs is {self.pairs} but a sequence has {self.pairs_per_sequence}: give more --pairs or fewer "
                "--pairs_per_sequence."
            )
