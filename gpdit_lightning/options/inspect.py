"""Options of `inspect`."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from gpdit_lightning.options.shared import DeviceOptions, check_at_least


@dataclass(frozen=True, kw_only=True)
class InspectionOptions:
    """Inspection."""

    folder: Path
    """A folder of shards, or its manifest.json; --folder may be left out."""
    samples: int = 512
    """Samples over which the mean and standard deviation of the latents are measured."""
    verify: bool = False
    """Read every byte and every sample, and name each fault; the exit status is 1 if there is one."""
    workers: int | None = None
    """Processes for --verify; by default one per core."""
    show: int | None = None
    """Decode this many samples, of all shapes, to a PNG."""
    out: Path = Path("sheet.png")
    """The PNG that --show writes."""
    codec_source: str | None = None
    """For --show: where the codec's weights are now, if they moved since the data were prepared."""
    codec: str | None = None
    """For --show: the import path of the codec's class, where the data were prepared with a custom one."""
    why: str | None = None
    """Explain which samples an input file gave, and why: its path, its name or the end of its name, or TAR/KEY for an
    image in a tar."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions(InspectionOptions, DeviceOptions):
    """Inspect."""

    POSITIONAL: ClassVar[str] = "folder"

    def __post_init__(self) -> None:
        check_at_least(self, samples=1, workers=1, show=1)
