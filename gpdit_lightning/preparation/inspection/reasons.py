"""Reasons for the size of a sample, and for the frames of a video that are in no clip."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gpdit_lightning.data.shard_entry import Split
from gpdit_lightning.data.shards import Shape
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import Size, closest_size, parse_size, read_image
from gpdit_lightning.media.video import count_frames, video_info
from gpdit_lightning.options.prepare import PrepareOptions
from gpdit_lightning.preparation.input_files import FileFormat
from gpdit_lightning.preparation.tars import iterate_samples


class Sample(NamedTuple):
    """A sample of an input file, stored or hypothetical."""

    location: str
    """Key and shard of the sample; empty for a hypothetical one."""
    first_frame: int | None
    frames: int
    """Pixel frames."""
    split: Split
    pixel_size: Sequence[int]
    shape: Shape
    """Shape of the latents."""


def explain_size(path: Path, file_format: FileFormat, key: str, options: PrepareOptions) -> str:
    """Compare the size of a file, or of the image with this key in a tar, with the sizes that can be chosen."""
    height, width = _pixel_size(path, file_format, key)
    sizes = [parse_size(text) for text in (options.video_sizes if file_format == "video" else options.image_sizes)]
    chosen = closest_size(height, width, sizes)

    def distance(size: Size) -> float:
        return abs(math.log(height / width) - math.log(size[0] / size[1]))

    distances = [
        f"{size[0]}x{size[1]} {distance(size):.3f}{' (chosen)' if size == chosen else ''}"
        for size in sorted(sizes, key=distance)
    ]
    return f"{height}x{width} pixels; distances in log aspect ratio: {', '.join(distances)}"


def explain_frames(path: Path, samples: Sequence[Sample], options: PrepareOptions, temporal_factor: int) -> str:
    """Count the frames of a video and those in clips, with the reason why the others are not."""
    count = count_frames(path, options.fps)
    used = {
        sample.first_frame + frame * options.stride
        for sample in samples
        if sample.first_frame is not None
        for frame in range(sample.frames)
    }
    if options.avoid_cuts:  # each shot has a first frame and left-over frames
        return f"{count}, {len(used)} of them in clips, which have stride {options.stride} and end at cuts"
    at_stride = math.ceil(count / options.stride)
    rate = f" at {options.fps:g} per second" if options.fps else ""
    counts = f"{count}{rate}, {at_stride} of them at stride {options.stride}: {len(used)} in clips"
    if not (left := at_stride - len(used)):
        return counts
    if len(samples) == options.clips_per_video:
        return f"{counts}, {left} left over, since --clips_per_video is {options.clips_per_video}"
    lengths = f"{options.clip_frames} frames"
    if options.shortest_clip < options.clip_frames:
        lengths = f"{options.shortest_clip} to {lengths}, 1 + {temporal_factor} k"
    if options.frames_between_starts != options.clip_frames:
        lengths += f", and begins {options.frames_between_starts} frames after the one before"
    return f"{counts}, {left} left over, since a clip has {lengths}"


def _pixel_size(path: Path, file_format: FileFormat, key: str) -> Size:
    if file_format == "video":
        info = video_info(path)
        return info.height, info.width
    if key:
        pixels = next((sample.pixels for sample in iterate_samples(path) if sample.key == key), None)
    else:
        pixels = read_image(path)
    if pixels is None:
        raise InputError(f"{path} has no readable image {key!r}")
    return pixels.shape[2], pixels.shape[3]
