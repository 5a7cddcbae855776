"""The videos that are evaluated on: finding them, and reading a clip of each as the protocol says."""

import hashlib
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import Size, resize_and_crop
from gpdit_lightning.media.video import VIDEO_EXTENSIONS, iterate_frames, natural_sort_key, video_info


class Selection(NamedTuple):
    """The videos that a protocol names.

    Attributes:
        names: relative to the folders they were found in, in the order in which they were drawn.
        paths: where they are on this machine.
    """

    names: tuple[str, ...]
    paths: tuple[Path, ...]

    @property
    def sha256(self) -> str:
        """Of the names in their order: the same on every machine."""
        return hashlib.sha256("\n".join(self.names).encode()).hexdigest()


def select_videos(
    places: Sequence[str | Path], count: int, seed: int, frames: int, progress: bool = False
) -> Selection:
    """Draw videos that are long enough, by a hash of their names, so that nothing else decides which.

    Args:
        places: folders of videos and single videos.
        count: how many.
        seed: of the drawing.
        frames: that each must have, by its header.
        progress: show a bar.

    Raises:
        InputError: too few, two of one name, or as :func:`find_videos`.
    """
    found: dict[str, Path] = {}
    for place in places:
        for path in find_videos([place]):
            name = path.name if path == Path(place) else path.relative_to(place).as_posix()
            if found.setdefault(name, path) is not path:
                raise InputError(f"{found[name]} and {path} have one name: give a folder above both, or leave one out.")
    drawn: dict[str, Path] = {}
    short = 0
    names = sorted(found, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    for name in tqdm(names, desc="choosing", unit=" videos", disable=not progress, leave=False):
        if len(drawn) == count:
            break
        if has_frames(found[name], frames):
            drawn[name] = found[name]
        else:
            short += 1
    if len(drawn) < count:
        raise InputError(
            f"{' and '.join(map(str, places))} hold {len(drawn)} videos of at least {frames} frames, and {short} that "
            f"are shorter or broken, where {count} are asked for: lower the count or the stride, or add videos."
        )
    return Selection(tuple(drawn), tuple(drawn.values()))


def has_frames(path: Path, frames: int) -> bool:
    """Whether a video says that it has so many frames; where it says nothing or is broken, whether they can be read."""
    try:
        length = video_info(path, threads=1).frames
        return (length or _counted(path)) >= frames
    except InputError:
        return False


def find_videos(places: Sequence[str | Path]) -> list[Path]:
    """Videos, and those in folders at any depth, in the order of the places and of their names.

    Raises:
        InputError: a place that is not there or holds no videos.
    """
    found: list[Path] = []
    for place in places:
        path = Path(place)
        if path.is_file():
            found.append(path)
            continue
        if not path.is_dir():
            raise InputError(f"{place} does not exist on this machine: give videos or folders of videos.")
        files = [Path(folder) / name for folder, _, names in os.walk(path, followlinks=True) for name in names]
        videos = [file for file in files if file.suffix.lower() in VIDEO_EXTENSIONS and not file.name.startswith(".")]
        if not videos:
            raise InputError(f"{place} holds no videos ({', '.join(VIDEO_EXTENSIONS)}): give another folder.")
        found += sorted(videos, key=lambda video: (video.parent, natural_sort_key(video)))
    return found


def clip_frame_numbers(
    length: int, frames: int, stride: int, centred: bool = False, resample_short: bool = False
) -> list[int]:
    """Which frames of a video make its clip: `frames` of them, `stride` apart.

    Args:
        length: frames of the video.
        frames: of the clip.
        stride: between them; 0 spreads them evenly over the whole video.
        centred: take the middle of the video instead of its beginning.
        resample_short: where the video is too short for the stride, spread the clip evenly over all of it.

    Returns:
        rising numbers; an empty list where the video is too short.
    """
    span = 1 + (frames - 1) * stride
    if stride and span <= length:
        start = (length - span) // 2 if centred else 0
        return list(range(start, start + span, stride))
    if (resample_short or not stride) and frames <= length:
        return np.linspace(0, length - 1, frames).round().astype(int).tolist()
    return []


def read_clip(
    path: Path, frames: int, stride: int, size: Size, centred: bool = False, resample_short: bool = False
) -> Tensor:
    """The clip of a video, each frame scaled and cropped in the middle.

    Args:
        path: of the video.
        frames, stride, centred, resample_short: as for :func:`clip_frame_numbers`.
        size: (height, width) in pixels.

    Returns:
        uint8 (T, 3, H, W), T = `frames`.

    Raises:
        InputError: unreadable, or too short.
    """
    length = None
    if centred or resample_short or not stride:
        length = video_info(path, threads=1).frames or _counted(path)
    numbers = clip_frame_numbers(
        1 + (frames - 1) * stride if length is None else length, frames, stride, centred, resample_short
    )
    found = _at(path, numbers, size)
    if len(found) < len(numbers):  # the header promises more than there is
        length = _counted(path)
        numbers = clip_frame_numbers(length, frames, stride, centred, resample_short)
        found = _at(path, numbers, size)
    if not found:
        needed = frames if resample_short or not stride else 1 + (frames - 1) * stride
        raise InputError(
            f"{path} holds {length} frames where a clip of {frames} at stride {stride} takes {needed}: leave it out, "
            "or ask for fewer frames or a smaller stride."
        )
    return torch.stack(found)


def _at(path: Path, numbers: Sequence[int], size: Size) -> list[Tensor]:
    if not numbers:
        return []
    steps = {later - earlier for earlier, later in pairwise(numbers)} or {1}
    stride = steps.pop() if len(steps) == 1 else 1
    wanted, most = set(numbers), (numbers[-1] - numbers[0]) // stride + 1
    return [
        resize_and_crop(pixels[None], size)[0]
        for place, pixels in enumerate(iterate_frames(path, numbers[0], stride, most, threads=1))
        if numbers[0] + place * stride in wanted
    ]


def _counted(path: Path) -> int:
    return sum(1 for _ in iterate_frames(path, threads=1))
