"""Options of `prepare`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpdit_lightning.errors import InputError
from gpdit_lightning.options.shared import (
    MAX_COUNT,
    DeviceOptions,
    OptionRecord,
    check_at_least,
    check_at_most,
    check_is_utf8,
)

INTERLEAVED_FILES = 16
"""Number of input files that are read in turn. It determines the order of samples, for any number of processes."""
MAX_FPS = 1000  # of --fps, since it repeats the frames of videos with a lower rate
ImageScaling = Literal["bicubic", "adm"]
SHORTEST_CLIP = 17  # pixel frames; long videos have 17 to 45 frames (GPDiT, section 5.1)


@dataclass(frozen=True, kw_only=True)
class CodecOptions(DeviceOptions):
    """Codec."""

    codec: str = "wan"
    """wan (the WanVAE, as in GPDiT), sd (the image VAE of Stable Diffusion, frame by frame, as in ACDiT), pca (needs no
    download), pca_digits (for the videos of `demo` only), or the import path of a codec class (docs/extending.md)."""
    codec_source: str | None = None
    """Weights of the codec: a folder or hub name for wan and sd, a file for pca; by default its standard weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_is_utf8(self, "codec_source", "rename it, since the manifest records it")


@dataclass(frozen=True, kw_only=True)
class StoredLatentOptions(OptionRecord):
    """Codec."""

    posterior: bool = False
    """Store the standard deviations of the codec's posterior beside its means (wan and sd), so that training draws a
    sample each time that it uses a clip (ACDiT, DiT). Twice the size."""
    flips: Literal["none", "images", "all"] = "none"
    """Store images, or images and videos, as they are and flipped left to right, so that training draws which of the
    two it uses. Pixels are flipped before encoding, since flipped latents are not those of the flipped image. Twice the
    size and encoding time."""


@dataclass(frozen=True, kw_only=True)
class ValidationOptions(OptionRecord):
    """Validation."""

    validation_fraction: float
    source_pattern: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.validation_fraction < 1:
            raise InputError(f"--validation_fraction is {self.validation_fraction}: give at least 0 and less than 1.")
        check_is_utf8(self, "source_pattern", r"write such bytes of names as in messages, for example caf\\xe9")
        try:
            re.compile(self.source_pattern or "")
        except re.error as error:
            raise InputError(
                f"--source_pattern {self.source_pattern!r} is not a regular expression ({error}): correct it."
            ) from None


@dataclass(frozen=True, kw_only=True)
class InputOptions(OptionRecord):
    """Input files."""

    videos: Sequence[Path] = ()
    """Folders that are searched for videos recursively, single files, or .txt lists with one path per line."""
    images: Sequence[Path] = ()
    """Images, specified like --videos."""
    image_tars: Sequence[str] = ()
    """WebDataset tars of images as img2dataset writes them (.jpg, .png or .webp with .txt, .json or .cls), or
    ImageNet's tars of one tar per class: folders, files or patterns such as 'laion/{00000..00127}.tar'. Captions and
    classes are stored."""
    annotations: Sequence[Path] = ()
    """Files with captions, labels and splits: UCF-101's trainlist01.txt, testlist01.txt and classInd.txt; MSR-VTT's
    videodatainfo.json; ImageNet's lists (docs/data.md); .jsonl, .csv or .tsv with source, caption, label, split. If
    they list training files, unlisted files are left out."""


@dataclass(frozen=True, kw_only=True)
class LabelOptions(OptionRecord):
    """Input files."""

    labels: bool = False
    """Label each file with the name of its folder; an image in a tar with its .cls, else the name of its folder in the
    tar, else the name of the tar."""


@dataclass(frozen=True, kw_only=True)
class HeldOutInputOptions(OptionRecord):
    """Validation."""

    validation_videos: Sequence[Path] = ()
    """Videos that are used for validation only, specified like --videos."""
    validation_images: Sequence[Path] = ()
    """Images that are used for validation only, specified like --videos."""
    validation_image_tars: Sequence[str] = ()
    """Tars of images that are used for validation only, specified like --image_tars."""


@dataclass(frozen=True, kw_only=True)
class HoldOutOptions(HeldOutInputOptions, ValidationOptions):
    """Validation."""

    validation_fraction: float = 0.05
    """Fraction of the recordings to hold out, chosen by a hash of their names (for images in tars: of their bytes), and
    at least four, or a quarter of them if that is less; without effect if --validation_videos, --validation_images,
    --validation_image_tars or --annotations determine the split."""
    source_pattern: str | None = None
    r"""Regular expression for the part of a file name that identifies the recording, if several files come from one
    recording: they are then in the same split. UCF-101: v_\w+_g\d+"""


@dataclass(frozen=True, kw_only=True)
class ClipOptions(OptionRecord):
    """Clips."""

    stride: int = 3
    """Use every stride-th frame of a video (paper: 3); frames are counted as they are stored, or after --fps."""
    fps: float | None = None
    """Resample videos in time to this number of frames per second, by the time stamps of the frames, before the stride
    counts. By default clips with uneven intervals between frames are used as they are and listed in notes.jsonl."""
    clip_frames: int = 45
    """Frames of a full clip, 1 + k times the temporal factor of the codec: 1 + 4k for wan and pca (paper: at most 45),
    any number for sd; training shortens clips as needed."""
    least_clip_frames: int | None = None
    """Minimum frames, of the same form, of a shorter clip from the remaining frames of a video or shot; by default 17
    (as in the paper), or clip_frames if that is less."""
    clip_step: int | None = None
    """Frames from the start of a clip to the start of the next; clips overlap if it is less than clip_frames, which is
    the default."""
    clips_per_video: int | None = None
    """Maximum number of clips per video, from its beginning; by default all."""
    damaged_videos: Literal["cut", "drop"] = "cut"
    """cut: use the frames of a damaged video before the damage. drop: use no frame of it; each video is then decoded
    twice."""
    avoid_cuts: bool = False
    """Make no clip that crosses a hard cut; needs PySceneDetect (pip install 'gpdit_lightning[shots]')."""
    video_sizes: Sequence[str] = ("192x320",)
    """HEIGHTxWIDTH in pixels. Each video is scaled and cropped to the size with the closest aspect ratio."""
    image_sizes: Sequence[str] = ("256x256", "192x320", "320x192")
    """The same for images."""
    image_scaling: ImageScaling = "bicubic"
    """How images are scaled before the centre crop: bicubic with antialiasing; or adm, as ADM, DiT and ACDiT scale
    ImageNet: halved by box averages while both sides are at least twice the size, then bicubic (Pillow)."""

    @property
    def shortest_clip(self) -> int:
        """Minimum frames of a clip."""
        return min(SHORTEST_CLIP, self.clip_frames) if self.least_clip_frames is None else self.least_clip_frames

    @property
    def frames_between_starts(self) -> int:
        """Frames from the start of a clip to the start of the next."""
        return self.clip_step or self.clip_frames


@dataclass(frozen=True, kw_only=True)
class OutputOptions(OptionRecord):
    """Output."""

    out: Path
    """Folder for the shards and manifest.json. New input files are added to existing shards."""
    retry_skipped: bool = False
    """Retry the input files that earlier runs skipped."""


@dataclass(frozen=True, kw_only=True)
class ShardOptions(OptionRecord):
    """Output."""

    shard_size: int = 1000
    """Maximum number of samples per shard."""
    part_size: int = 1000
    """Number of videos in a part, which one process encodes into separate shards; parts of images have 16 times as many
    files, parts of tars a 64th. Lower it if there are fewer parts than GPUs."""


@dataclass(frozen=True, kw_only=True)
class ProcessOptions(DeviceOptions):
    """Computation."""

    workers: int | None = None
    """Decoding processes, at most 16; 0 decodes in the main process; by default one per core."""
    batch_size: int = 4
    """Clips or images per encoding batch."""
    ray: bool = False
    """Encode on a Ray cluster (RAY_ADDRESS, else this machine), one process per GPU; needs Ray (pip install
    'gpdit_lightning[ray]')."""


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(
    LabelOptions,
    InputOptions,
    OutputOptions,
    ShardOptions,
    ClipOptions,
    HoldOutOptions,
    StoredLatentOptions,
    CodecOptions,
    ProcessOptions,
):
    """Prepare."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, stride=1, clip_frames=1, shard_size=1, part_size=1, batch_size=1, workers=0)
        check_at_least(self, clips_per_video=1, clip_step=1)
        check_at_most(self, part_size=MAX_COUNT)
        if self.fps is not None and not 0 < self.fps <= MAX_FPS:
            raise InputError(f"--fps is {self.fps}: give frames per second, above 0 and at most {MAX_FPS}.")
        if not 1 <= self.shortest_clip <= self.clip_frames:
            raise InputError(
                f"--least_clip_frames is {self.least_clip_frames} and --clip_frames {self.clip_frames}: give from 1 to "
                "--clip_frames."
            )
        if (self.workers or 0) > INTERLEAVED_FILES:
            raise InputError(f"--workers is {self.workers}: give at most {INTERLEAVED_FILES}.")
