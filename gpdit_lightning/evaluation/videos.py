"""Finding and selecting videos, and reading one clip of each."""

import hashlib
import logging
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpdit_lightning.errors import InputError, TransientError
from gpdit_lightning.media.finding import MAX_SHOWN, FoundFile, find_media, without_repeated
from gpdit_lightning.media.images import Size
from gpdit_lightning.media.video import count_frames, iterate_frames, natural_sort_key, video_info
from gpdit_lightning.names import counted
from gpdit_lightning.path_kinds import Medium
from gpdit_lightning.progress import progress_bar

MAX_COUNT, MIN_COUNT = 10_000, 2  # videos of an evaluation by default (GPDiT, section 5.1), and the fewest

log = logging.getLogger(__name__)


class Selection(NamedTuple):
    """The videos of an evaluation.

    Attributes:
        names: paths relative to the given folders, in the order of selection.
        paths: on this machine.
    """

    names: tuple[str, ...]
    paths: tuple[Path, ...]

    @property
    def sha256(self) -> str:
        """sha256 of the names in their order; it is the same on every machine."""
        return hashlib.sha256("\n".join(self.names).encode()).hexdigest()


def select_videos(
    paths: Sequence[str | Path],
    count: int | None,
    seed: int,
    frames: int,
    progress: bool = False,
    fps: float | None = None,
    medium: Medium = "video",
) -> Selection:
    """Order videos or images by a hash of their names, and select the first ones; of videos, those long enough.

    The selection depends on the names, the lengths and the seed only.

    Args:
        paths: folders of videos and single videos.
        count: number of them; None selects all images, or all videos that are long enough, at most `MAX_COUNT`.
        seed: of the hash.
        frames: minimum number of frames of a video, by its header.
        progress: show a progress bar.
        fps: as for :func:`read_clip`.
        medium: of the files.

    Raises:
        InputError: there are too few videos, or two with the same name; also as :func:`find_videos`.
    """
    videos: dict[str, Path] = {}
    for path, name in find_named_videos(paths, report=False, medium=medium):
        if videos.setdefault(name, path) is not path:
            raise InputError(
                f"{videos[name]} and {path} have the same name: give a folder above both, or leave one out."
            )
    selected: dict[str, Path] = {}
    rejected, most = list[str](), count or (MAX_COUNT if medium == "video" else len(videos))
    names = sorted(videos, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    for name in progress_bar(names, desc="selecting", unit=f" {medium}s", disable=not progress, leave=False):
        if len(selected) == most:
            break
        if medium == "video" and (reason := _shortage(videos[name], frames, fps)):
            rejected.append(reason)
        else:
            selected[name] = videos[name]
    if len(selected) < (count or MIN_COUNT):
        needed = f"{count} are requested: lower --count," if count else f"an evaluation needs {MIN_COUNT}: lower"
        if medium == "image":
            raise InputError(
                f"{' and '.join(map(str, paths))} have {len(selected)} images, but {count or MIN_COUNT} are needed: "
                "add images, or lower --count."
            )
        raise InputError(
            f"{' and '.join(map(str, paths))} have {len(selected)} videos of at least {frames} frames, and "
            f"{len(rejected)} that are shorter or damaged, but {needed} --generated_frames or --stride, or add videos."
        )
    if rejected and progress:
        for reason in rejected[:MAX_SHOWN]:
            log.warning("left out: %s", reason)
        log.info("%d videos have at least %d frames; %d are shorter or damaged", len(selected), frames, len(rejected))
    return Selection(tuple(selected), tuple(selected.values()))


def stride_text(stride: int, fps: float | None) -> str:
    """Describe in a report how the frames of clips are counted: the stride, and the rate if videos were resampled."""
    return str(stride) if fps is None else f"{stride} after resampling to {fps:g} frames per second"


def _shortage(path: Path, frames: int, fps: float | None) -> str:
    """Return the reason why a video has less than this number of frames; empty if it has as many.

    They are counted if the header does not state their number.

    Raises:
        TransientError: the video cannot be read for a reason other than its content.
    """
    try:
        count = _num_frames(path, fps)
    except TransientError:
        raise
    except InputError as error:
        return str(error)
    return "" if count >= frames else f"{path} has {counted(count, 'frame')}, and a clip needs {frames}."


def find_videos(paths: Sequence[str | Path], medium: Medium = "video") -> list[Path]:
    """Return the paths of the videos or images of :func:`find_named_videos`."""
    return [path for path, _ in find_named_videos(paths, medium=medium)]


def find_named_videos(paths: Sequence[str | Path], report: bool = True, medium: Medium = "video") -> list[FoundFile]:
    """Return given videos, and the videos in given folders at any depth and in .txt lists, with their names.

    They are in the order of the arguments and in natural order within each. A file and links to it are one video.

    Args:
        paths: videos, folders and lists.
        report: whether the log names the files that are left out.
        medium: whether videos or images are searched for.

    Raises:
        InputError: a path does not exist or contains no files of the medium.
    """
    videos: list[FoundFile] = []
    for path in map(Path, paths):
        findings = find_media(path, medium)
        videos += sorted(findings.files, key=lambda video: (video.path.parent, natural_sort_key(video.path)))
        for sentence in findings.describe_left_out() if report else ():
            log.info("%s: %s", path, sentence)
    distinct, repeated = without_repeated(videos)
    if repeated and report:
        name, reason, _ = repeated[0]
        log.info("%d other names of the same files are not used: %s, for example, %s", len(repeated), name, reason)
    return distinct


def clip_frame_indices(
    length: int, frames: int, stride: int, centred: bool = False, resample_short: bool = False
) -> list[int]:
    """Return the indices of the frames of a video that form its clip.

    Args:
        length: number of frames of the video.
        frames: number of frames of the clip.
        stride: video frames from one frame of the clip to the next; 0 spaces them evenly over the whole video.
        centred: take the middle of the video instead of its beginning.
        resample_short: space the frames evenly over the whole video if it is too short for the stride.

    Returns:
        Increasing indices; an empty list if the video is too short.
    """
    span = 1 + (frames - 1) * stride
    if stride and span <= length:
        start = (length - span) // 2 if centred else 0
        return list(range(start, start + span, stride))
    if (resample_short or not stride) and frames <= length:
        return np.linspace(0, length - 1, frames).round().astype(int).tolist()
    return []


def read_clip(
    path: Path,
    frames: int,
    stride: int,
    size: Size,
    centred: bool = False,
    resample_short: bool = False,
    fps: float | None = None,
) -> Tensor:
    """Read the clip of a video; frames are scaled to cover a size and cropped at the centre.

    Args:
        path: of the video.
        frames, stride, centred, resample_short: as for :func:`clip_frame_indices`.
        size: (height, width) in pixels.
        fps: frames per second to which the video is resampled in time before its frames are counted, as the training
            clips were; None to count the frames as they are stored.

    Returns:
        uint8 (T, 3, H, W), T = `frames`.

    Raises:
        InputError: the video is unreadable or too short.
    """
    at_beginning = stride and not centred and not resample_short
    length = 1 + (frames - 1) * stride if at_beginning else _num_frames(path, fps)
    indices = clip_frame_indices(length, frames, stride, centred, resample_short)
    clip = _read_frames(path, indices, size, fps)
    if len(clip) < len(indices):  # the video is shorter than assumed, or than its header states
        length = _count_intact_frames(path, fps)
        indices = clip_frame_indices(length, frames, stride, centred, resample_short)
        clip = _read_frames(path, indices, size, fps)
    if not clip:
        if resample_short or not stride:
            raise InputError(
                f"{path} has {counted(length, 'frame')}, but a clip needs {frames}: leave it out, or use fewer frames."
            )
        raise InputError(
            f"{path} has {counted(length, 'frame')}, but a clip of {frames} at stride {stride} needs "
            f"{1 + (frames - 1) * stride}: leave it out, or use fewer frames or a smaller stride."
        )
    return torch.stack(clip)


def _read_frames(path: Path, indices: Sequence[int], size: Size, fps: float | None) -> list[Tensor]:
    """Return the frames of increasing indices, each uint8 (3, H, W) of the size; fewer if the video ends earlier."""
    if not indices:
        return []
    steps = {later - earlier for earlier, later in pairwise(indices)} or {1}
    stride = steps.pop() if len(steps) == 1 else 1
    requested, max_frames = set(indices), (indices[-1] - indices[0]) // stride + 1
    return [
        frame.resized(size)
        for frame in iterate_frames(path, indices[0], stride, max_frames, fps)
        if frame.number in requested
    ]


def _num_frames(path: Path, fps: float | None) -> int:
    """Return the number of frames by the header, or by counting if the header does not state it."""
    return (video_info(path).frames if fps is None else None) or _count_intact_frames(path, fps)


def _count_intact_frames(path: Path, fps: float | None) -> int:
    """Return the number of frames, before the damage if there is any, which is logged."""
    remarks: list[str] = []
    count = count_frames(path, fps, remarks)
    for remark in remarks:
        _warn_once(f"{remark} The {counted(count, 'frame')} before may be used.")
    return count


@cache
def _warn_once(message: str) -> None:
    """Log a warning once per process, since the frames of a video may be counted several times."""
    log.warning("%s", message)
