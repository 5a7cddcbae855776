"""Options of `prepare-pairs`."""

from dataclasses import dataclass
from pathlib import Path

from gpdit_lightning.errors import InputError
from gpdit_lightning.options.prepare import CodecOptions, ValidationOptions
from gpdit_lightning.options.shared import MAX_COUNT, OptionRecord, check_at_least, check_at_most


@dataclass(frozen=True, kw_only=True)
class PairInputOptions(OptionRecord):
    """Images."""

    task: str = "pairs"
    """pairs: existing pairs. The other tasks make both images of a pair from one image: grayscale (image to grayscale),
    colourisation (the reverse), edges (image to Canny edges), edges_to_image (the reverse), sketch (image to pencil
    drawing), copy (unchanged, for a warm-up). edges, edges_to_image and sketch need OpenCV (pip install
    'gpdit_lightning[edges]')."""
    sources: Path | None = None
    """Folder of the source images, or of the images from which a task makes pairs; searched recursively."""
    targets: Path | None = None
    """For --task pairs: folder of the target images, which have the sizes of their sources, and the same paths in their
    folder, up to the extension."""
    pairs_in: Path | None = None
    """For --task pairs, instead of --sources and --targets: folder that contains the folders source and target."""
    size: str = "256x256"
    """HEIGHTxWIDTH in pixels to which every image is scaled and cropped."""


@dataclass(frozen=True, kw_only=True)
class SequenceOptions(OptionRecord):
    """Sequences."""

    pairs: int = 40
    """Maximum number of pairs from which training sequences are drawn (paper: 40)."""
    sequences: int = 20
    """Number of training sequences (paper: 20)."""
    pairs_per_sequence: int = 3
    """Pairs per sequence (paper: 3, which are six frames)."""
    seed: int = 0
    """Seed of the choice of held-out images and of the sequences."""


@dataclass(frozen=True, kw_only=True)
class PairValidationOptions(ValidationOptions):
    """Validation."""

    validation_fraction: float = 0.1
    """Fraction of the images to hold out, at least one, chosen by a hash of their pixels and the seed: the same images
    for every task, also after others are added. Both images of a pair are held out. 0 holds out none."""
    source_pattern: str | None = None
    r"""Regular expression for the part of a file name that identifies the recording, if images are video frames: the
    frames of one recording are then in the same split. Example: clip\d+"""
    held_out_pairs: int = 4
    """Maximum number of validation sequences. Each ends with a held-out pair, after training pairs."""


@dataclass(frozen=True, kw_only=True)
class PairOutputOptions(OptionRecord):
    """Output."""

    out: Path
    """Folder for the shards and manifest.json."""


@dataclass(frozen=True, kw_only=True)
class PreparePairsOptions(PairInputOptions, SequenceOptions, PairValidationOptions, PairOutputOptions, CodecOptions):
    """Prepare pairs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, pairs=1, sequences=1, pairs_per_sequence=1, held_out_pairs=0, seed=0)
        check_at_most(self, sequences=MAX_COUNT)
        if self.pairs < self.pairs_per_sequence:
            raise InputError(
                f"--pairs is {self.pairs} but a sequence has {self.pairs_per_sequence}: raise --pairs or lower "
                "--pairs_per_sequence."
            )
