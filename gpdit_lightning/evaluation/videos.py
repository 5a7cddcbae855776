"""The videos of an evaluation: finding and selecting them, and reading one clip of each."""

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
    """The videos of an evaluation.

    Attributes:
        names: relative to the folders they were found in, in the order of selection.
        paths: on this machine.
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
    """Select the first videos that are long enough in the order of a hash of their names.

    The selection depends on the names and the seed alone.

    Args:
        places: folders of videos and single videos.
        count: number of videos.
        seed: of the hash.
        frames: minimum number of frames of each, by its header.
        progress: show a progress bar.

    Raises:
        InputError: too few videos, two with the same name, or as :func:`find_videos`.
    """
    paths: dict[str, Path] = {}
    for place in places:
        for path in find_videos([place]):
            name = path.name if path == Path(place) else path.relative_to(place).as_posix()
            if paths.setdefault(name, path) is not path:
                raise InputError(
                    f"{paths[name]} and {path} have the same name: give a folder above both, or leave one out."
                )
    selected: dict[str, Path] = {}
    rejected = 0
    names = sorted(paths, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    for name in tqdm(names, desc="selecting", unit=" videos", disable=not progress, leave=False):
        if len(selected) == count:
            break
        if has_frames(paths[name], frames):
            selected[name] = paths[name]
        else:
            rejected += 1
    if len(selected) < count:
        raise InputError(
            f"{' and '.join(map(str, places))} have {len(selected)} videos of at least {frames} frames, and {rejected} "
            f"that are shorter or broken, but {count} are requested: lower the count or the stride, or add videos."
        )
    return Selection(tuple(selected), tuple(selected.values()))


def has_frames(path: Path, frames: int) -> bool:
    """Whether a video has so many frames by its header, or by counting where the header does not say or is broken."""
    try:
        length = video_info(path, threads=1).frames
        return (length or _count_frames(path)) >= frames
    except InputError:
        return False


def find_videos(places: Sequence[str | Path]) -> list[Path]:
    """Videos, and those in folders at any depth, in the order of the places and of their names.

    Raises:
        InputError: a place that does not exist or contains no videos.
    """
    videos: list[Path] = []
    for place in places:
        path = Path(place)
        if path.is_file():
            videos.append(path)
            continue
        if not path.is_dir():
            raise InputError(f"{place} does not exist on this machine: give videos or folders of videos.")
        files = [Path(folder) / name for folder, _, names in os.walk(path, followlinks=True) for name in names]
        inside = [file for file in files if file.suffix.lower() in VIDEO_EXTENSIONS and not file.name.startswith(".")]
        if not inside:
            raise InputError(f"{place} contains no videos ({', '.join(VIDEO_EXTENSIONS)}): give another folder.")
        videos += sorted(inside, key=lambda video: (video.parent, natural_sort_key(video)))
    return videos


def clip_frame_numbers(
    length: int, frames: int, stride: int, centred: bool = False, resample_short: bool = False
) -> list[int]:
    """The numbers of a video's frames that form its clip.

    Args:
        length: number of frames of the video.
        frames: number of frames of the clip.
        stride: distance between them; 0 spaces them evenly over the whole video.
        centred: take the middle of the video instead of its beginning.
        resample_short: if the video is too short for the stride, space the frames evenly over all of it.

    Returns:
        increasing numbers; an empty list if the video is too short.
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
    """The clip of a video, with frames scaled to cover a size and cropped at the centre.

    Args:
        path: of the video.
        frames, stride, centred, resample_short: as for :func:`clip_frame_numbers`.
        size: (height, width) in pixels.

    Returns:
        uint8 (T, 3, H, W), T = `frames`.

    Raises:
        InputError: the video is unreadable or too short.
    """
    at_beginning = stride and not centred and not resample_short
    length = 1 + (frames - 1) * stride if at_beginning else video_info(path, threads=1).frames or _count_frames(path)
    numbers = clip_frame_numbers(length, frames, stride, centred, resample_short)
    clip = _read_frames(path, numbers, size)
    if len(clip) < len(numbers):  # the video is shorter than assumed, or than its header says
        length = _count_frames(path)
        numbers = clip_frame_numbers(length, frames, stride, centred, resample_short)
        clip = _read_frames(path, numbers, size)
    if not clip:
        needed = frames if resample_short or not stride else 1 + (frames - 1) * stride
        raise InputError(
            f"{path} has {length} frames, but a clip of {frames} at stride {stride} needs {needed}: leave it out, or "
            "use fewer frames or a smaller stride."
        )
    return torch.stack(clip)


def _read_frames(path: Path, numbers: Sequence[int], size: Size) -> list[Tensor]:
    """The frames of these increasing numbers, each uint8 (3, H, W) of the size; fewer if the video ends before."""
    if not numbers:
        return []
    steps = {later - earlier for earlier, later in pairwise(numbers)} or {1}
    stride = steps.pop() if len(steps) == 1 else 1
    wanted, max_frames = set(numbers), (numbers[-1] - numbers[0]) // stride + 1
    return [
        resize_and_crop(pixels[None], size)[0]
        for index, pixels in enumerate(iterate_frames(path, numbers[0], stride, max_frames, threads=1))
        if numbers[0] + index * stride in wanted
    ]


def _count_frames(path: Path) -> int:
    return sum(1 for _ in iterate_frames(path, threads=1))
