"""What a preparation can be asked for, and the command line made of it."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import parse_size

# Sources that are read at a time, in turn: the order of samples depends on it, and on no number of processes.
LANES = 16
PAPERS_SHORTEST = 17  # GPDiT, section 5.1: long video has 17 to 45 frames


@dataclass(frozen=True)
class PrepareOptions:
    """What to encode, how, and where to. Each field's `help` is the command line's."""

    out: Path = field(metadata={"help": "folder for the shards and manifest.json; what is there already is extended"})
    videos: Sequence[Path] = field(
        default=(),
        metadata={"help": "folders of videos (searched in depth), single files, or .txt lists of one path a line"},
    )
    images: Sequence[Path] = field(default=(), metadata={"help": "pictures, given like --videos"})
    image_tars: Sequence[str] = field(
        default=(),
        metadata={
            "help": "WebDataset tars of pictures as img2dataset writes them (.jpg, .png or .webp with .txt and .json): "
            "folders, files, or patterns such as 'laion/{00000..00127}.tar'; captions are kept"
        },
    )
    validation_videos: Sequence[Path] = field(
        default=(), metadata={"help": "videos that are all held out, given like --videos"}
    )
    validation_images: Sequence[Path] = field(
        default=(), metadata={"help": "pictures that are all held out, given like --videos"}
    )
    annotations: Sequence[Path] = field(
        default=(),
        metadata={
            "help": "files with captions, labels and splits: UCF-101's trainlist01.txt, testlist01.txt, classInd.txt; "
            "MSR-VTT's videodatainfo.json, or .jsonl and .csv with source, caption, label, split; where they name "
            "training sources, those they do not name are left out"
        },
    )
    labels: bool = field(default=False, metadata={"help": "store the name of a file's folder as its label"})
    codec: str = field(default="wan", metadata={"help": "wan (the WanVAE, as in the paper) or pca (no download)"})
    codec_source: str | None = field(
        default=None, metadata={"help": "the codec's weights: a folder or hub name (wan), a file (pca)"}
    )
    stride: int = field(
        default=3, metadata={"help": "take every stride-th frame of a video; the paper takes every third"}
    )
    clip_frames: int = field(
        default=45, metadata={"help": "most frames of a clip, 1 + 4k; training shortens clips as it needs"}
    )
    least_clip_frames: int | None = field(
        default=None,
        metadata={
            "help": "keep what is left at the end of a video or shot as a shorter clip of at least so many frames, 1 + "
            "4k (default: the paper's 17, or clip_frames if that is less)"
        },
    )
    clip_step: int | None = field(
        default=None,
        metadata={
            "help": "frames from the start of a clip to the next one's; below clip_frames they overlap (default: "
            "clip_frames)"
        },
    )
    avoid_cuts: bool = field(
        default=False,
        metadata={"help": "let no clip run over a hard cut, found by PySceneDetect (pip install -e '.[shots]')"},
    )
    clips_per_video: int | None = field(
        default=None, metadata={"help": "only the first so many clips of each video; all when not given"}
    )
    video_sizes: Sequence[str] = field(
        default=("192x320",),
        metadata={"help": "HEIGHTxWIDTH; each video is scaled and cropped to the closest in aspect"},
    )
    image_sizes: Sequence[str] = field(
        default=("256x256", "192x320", "320x192"), metadata={"help": "the same for pictures"}
    )
    validation_fraction: float = field(
        default=0.05,
        metadata={
            "help": "share of the sources that is held out by a hash of their path, where neither a held-out place nor "
            "an annotation says which"
        },
    )
    source_pattern: str | None = field(
        default=None,
        metadata={
            "help": "regular expression for the part of a path that names the recording, where one was cut into "
            r"several files, which are then held out together; UCF-101: v_\w+_g\d+"
        },
    )
    shard_size: int = field(default=1000, metadata={"help": "most samples in one shard"})
    part_size: int = field(
        default=1000,
        metadata={
            "help": "sources that one process works on at a time, in shards of their own: so many videos, 16 times as "
            "many pictures, or a 64th as many tars; lower it where there are fewer parts than GPUs"
        },
    )
    retry_skipped: bool = field(default=False, metadata={"help": "try again what earlier runs left out"})
    workers: int | None = field(
        default=None,
        metadata={"help": f"decoding processes beside the codec, at most {LANES} (default: one for each core)"},
    )
    ray: bool = field(
        default=False,
        metadata={
            "help": "spread the parts over a Ray cluster (RAY_ADDRESS, else this machine) with Ray Data: one process "
            "for each GPU; needs pip install -e '.[ray]'"
        },
    )
    batch_size: int = field(default=4, metadata={"help": "clips, or pictures, encoded at once"})
    device: str = field(
        default="auto",
        metadata={"help": "where the codec computes: auto, cpu, cuda, cuda:1, ...; auto: this rank's GPU"},
    )

    @property
    def shortest_clip(self) -> int:
        """Frames of the shortest clip to keep."""
        return min(PAPERS_SHORTEST, self.clip_frames) if self.least_clip_frames is None else self.least_clip_frames

    @property
    def step(self) -> int:
        """Frames from the start of a clip to the start of the next."""
        return self.clip_step or self.clip_frames


def check_options(options: PrepareOptions) -> None:
    """Refuse what no source could be prepared with, before any is opened; raises `InputError`."""
    for name in ("stride", "clip_frames", "shard_size", "part_size", "batch_size"):
        if getattr(options, name) < 1:
            raise InputError(f"{name} is {getattr(options, name)}: give at least 1.")
    if not 1 <= options.shortest_clip <= options.clip_frames:
        raise InputError(
            f"least_clip_frames is {options.least_clip_frames} and clip_frames {options.clip_frames}: give at least 1 "
            "and at most clip_frames."
        )
    for name, otherwise in (("clips_per_video", "for all"), ("clip_step", "for clips that follow each other")):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}: give at least 1, or leave it out {otherwise}.")
    if options.workers is not None and not 0 <= options.workers <= LANES:
        raise InputError(f"workers is {options.workers}: give 0 (decode in the same process) to {LANES}.")
    if not 0 <= options.validation_fraction < 1:
        raise InputError(f"validation_fraction is {options.validation_fraction}: give a share from 0 to below 1.")
    for text in (*options.video_sizes, *options.image_sizes):
        parse_size(text)
    try:
        re.compile(options.source_pattern or "")
    except re.error as error:
        raise InputError(
            f"source_pattern {options.source_pattern!r} is no regular expression ({error}): mend it."
        ) from None


def argument_parser(options: type[Any], description: str | None) -> argparse.ArgumentParser:
    """A parser with one argument for each field of an options dataclass, with its type, default and help."""
    parser = argparse.ArgumentParser(description=description)
    hints = get_type_hints(options)
    for option in fields(options):
        flag, text, hint = f"--{option.name}", option.metadata["help"], hints[option.name]
        if hint is bool:
            parser.add_argument(flag, action="store_true", help=text)
            continue
        several = isinstance(option.default, tuple)
        kind = get_args(hint)[0] if get_args(hint) else hint  # of Sequence[X] and X | None: X
        if option.default is MISSING:
            parser.add_argument(flag, type=kind, required=True, help=text)
            continue
        default = " ".join(option.default) if isinstance(option.default, tuple) else option.default
        shown = f"{text} (default: {default})" if default not in (None, "") else text
        parser.add_argument(flag, type=kind, nargs="+" if several else None, default=option.default, help=shown)
    return parser
