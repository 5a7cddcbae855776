"""Options of `prepare`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpdit_lightning.errors import InputError
from gpdit_lightning.options.shared import DeviceOptions, check_at_least

INTERLEAVED_FILES = 16
"""Input files that are read in turn. The order of samples depends on this number, and on no number of processes."""
SHORTEST_CLIP = 17  # pixel frames; GPDiT, section 5.1: long video has 17 to 45 frames


@dataclass(frozen=True, kw_only=True)
class CodecOptions(DeviceOptions):
    """Codec."""

    codec: str = "wan"
    """wan (the WanVAE, as in the paper), pca (needs no download), or the import path of a codec class
    (docs/extending.md)."""
    codec_source: str | None = None
    """The codec's weights: a folder or hub name (wan), a file (pca); by default the codec's own."""


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """Validation."""

    validation_fraction: float
    source_pattern: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise InputError(f"--validation_fraction is {self.validation_fraction}: give at least 0 and less than 1.")
        try:
            re.compile(self.source_pattern or "")
        except re.error as error:
            raise InputError(
                f"--source_pattern {self.source_pattern!r} is not a regular expression ({error}): correct it."
            ) from None


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """Input files."""

    videos: Sequence[Path] = ()
    """Folders that are searched for videos recursively, single files, or .txt lists with one path per line."""
    images: Sequence[Path] = ()
    """Images, given like --videos."""
    image_tars: Sequence[str] = ()
    """WebDataset tars of images as img2dataset writes them (.jpg, .png or .webp with .txt and .json): folders, files or
    patterns such as 'laion/{00000..00127}.tar'; captions are kept."""
    annotations: Sequence[Path] = ()
    """Files with captions, labels and splits: UCF-101's trainlist01.txt, testlist01.txt and classInd.txt; MSR-VTT's
    videodatainfo.json; .jsonl, .csv or .tsv with source, caption, label, split. If they name training files, files that
    they do not name are left out."""
    labels: bool = False
    """Store the name of a file's folder as its label."""


@dataclass(frozen=True, kw_only=True)
class HoldOutOptions(ValidationOptions):
    """Validation."""

    validation_videos: Sequence[Path] = ()
    """Videos that are all held out, given like --videos."""
    validation_images: Sequence[Path] = ()
    """Images that are all held out, given like --videos."""
    validation_fraction: float = 0.05
    """Fraction of the input files that is held out, by a hash of their path, unless --validation_videos,
    --validation_images or annotations decide."""
    source_pattern: str | None = None
    r"""Regular expression for the part of a path that names the recording, if a recording was cut into several files:
    these are then held out together. UCF-101: v_\w+_g\d+"""


@dataclass(frozen=True, kw_only=True)
class ClipOptions:
    """Clips."""

    stride: int = 3
    """Use every stride-th frame of a video; the paper uses every third."""
    clip_frames: int = 45
    """Frames of a full clip, 1 + 4k; training shortens clips as needed."""
    least_clip_frames: int | None = None
    """Keep the rest of a video or shot as a shorter clip if it has at least this many frames, 1 + 4k; by default the
    paper's 17, or clip_frames if that is less."""
    clip_step: int | None = None
    """Frames from the start of a clip to the start of the next; below clip_frames clips overlap. By default
    clip_frames."""
    clips_per_video: int | None = None
    """Use only the first clips of each video, this many; by default all."""
    avoid_cuts: bool = False
    """Let no clip cross a hard cut; needs PySceneDetect (pip install -e '.[shots]')."""
    video_sizes: Sequence[str] = ("192x320",)
    """HEIGHTxWIDTH in pixels; each video is scaled and cropped to the size with the closest aspect ratio."""
    image_sizes: Sequence[str] = ("256x256", "192x320", "320x192")
    """The same for images."""

    @property
    def shortest_clip(self) -> int:
        """Frames of the shortest clip to keep."""
        return min(SHORTEST_CLIP, self.clip_frames) if self.least_clip_frames is None else self.least_clip_frames

    @property
    def frames_between_starts(self) -> int:
        """Frames from the start of a clip to the start of the next."""
        return self.clip_step or self.clip_frames


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """Output."""

    out: Path
    """Folder for the shards and manifest.json; if it holds shards already, new input files are added."""
    shard_size: int = 1000
    """Most samples in one shard."""
    part_size: int = 1000
    """Input files in a part, which one process encodes into separate shards: this many videos, 16 times as many images,
    or a 64th as many tars. Lower it if there are fewer parts than GPUs."""
    retry_skipped: bool = False
    """Try again to use the input files that earlier runs skipped."""


@dataclass(frozen=True, kw_only=True)
class ProcessOptions(DeviceOptions):
    """Computation."""

    workers: int | None = None
    """Decoding processes beside the codec, at most 16; 0 decodes in the same process; by default one per core."""
    batch_size: int = 4
    """Clips, or images, that are encoded at once."""
    ray: bool = False
    """Encode on a Ray cluster (RAY_ADDRESS, else this machine), one process per GPU; needs Ray (pip install -e
    '.[ray]')."""


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(InputOptions, ShardOptions, ClipOptions, HoldOutOptions, CodecOptions, ProcessOptions):
    """Prepare."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, stride=1, clip_frames=1, shard_size=1, part_size=1, batch_size=1, workers=0)
        check_at_least(self, clips_per_video=1, clip_step=1)
        if not 1 <= self.shortest_clip <= self.clip_frames:
            raise InputError(
                f"--least_clip_frames is {self.least_clip_frames} and --clip_frames {self.clip_frames}: give from 1 to "
                "--clip_frames."
            )
        if (self.workers or 0) > INTERLEAVED_FILES:
            raise InputError(f"--workers is {self.workers}: give at most {INTERLEAVED_FILES}.")
