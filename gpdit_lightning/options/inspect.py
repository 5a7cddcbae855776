"""Options of `inspect`."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from gpdit_lightning.options.shared import DeviceOptions, OptionRecord, check_at_least, check_has_effect


@dataclass(frozen=True, kw_only=True)
class InspectionOptions(OptionRecord):
    """Inspection."""

    folder: Path
    """Folder of shards, or its manifest.json; may also be the first argument, without --folder."""
    samples: int = 512
    """Number of samples for the mean and standard deviation of the latents."""
    verify: bool = False
    """Read every byte and every sample, and report each fault; the exit status is 1 if there is one."""
    workers: int | None = None
    """Processes for --verify; by default one per core."""
    show: int | None = None
    """Decode this many samples, of all shapes, to a PNG."""
    out: Path = Path("sheet.png")
    """PNG that --show writes or replaces."""
    codec_source: str | None = None
    """For --show: current location of the codec's weights, if they were moved after the preparation."""
    codec: str | None = None
    """For --show: import path of the codec's class, if the data were prepared with a custom one."""
    why: str | None = None
    """Explain how an input file was prepared, or why it was skipped. Specify its path, its name or the end of its name;
    TAR/KEY for an image in a tar."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions(InspectionOptions, DeviceOptions):
    """Inspect."""

    POSITIONAL: ClassVar[str] = "folder"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, samples=1, workers=1, show=1)
        if self.show is None:
            check_has_effect(self, "without --show", "out", "codec_source", "codec", "device")
        if not self.verify:
            check_has_effect(self, "without --verify", "workers")
        if self.verify or self.show is not None or self.why is not None:
            check_has_effect(self, "with --verify, --show or --why, which print no overview", "samples")
