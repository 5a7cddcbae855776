"""Hard cuts of a video, found by PySceneDetect (the optional extra `shots`)."""

from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.media.video import iterate_frames

WIDTH = 256  # PySceneDetect's own: it scales wider frames down to this, and its thresholds were found so


def check_available() -> None:
    """Raise `InputError` where PySceneDetect cannot be imported, before any video is opened."""
    try:
        import cv2  # noqa: F401
        import scenedetect  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"PySceneDetect, which finds cuts, cannot be imported ({error}): pip install -e '.[shots]'."
        ) from None


def cuts_of(path: str | Path) -> list[int]:
    """The numbers of the frames that begin a new shot, counted as `iterate_frames` counts; never 0.

    Raises:
        InputError: PySceneDetect is missing, or the video is missing or damaged.
    """
    return [number for number, (_, begins_shot) in enumerate(with_cuts(iterate_frames(path))) if begins_shot]


def with_cuts(frames: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Every frame, with whether it begins a new shot. Three frames are in memory at a time.

    A frame's difference from the one before is compared with those around it (PySceneDetect's AdaptiveDetector with its
    defaults, but that a shot may have a single frame). So a fast camera is no cut, and a change between two dark
    pictures is one; a dissolve is none, nor a fade before its step into pure black. The answer for a frame needs the
    two after it: where the frames end with an error, the last two before it are lost.

    Args:
        frames: uint8 RGB (3, H, W), every frame of a video in order, of one size.

    Raises:
        InputError: PySceneDetect is missing.
    """
    check_available()
    import cv2
    from scenedetect import AdaptiveDetector, FrameTimecode

    cv2.setNumThreads(1)  # small pictures gain nothing, and who prepares data has a process for each core
    detector = AdaptiveDetector(min_scene_len=0)
    shown = 0

    def earlier_begins_shot(frame: Tensor) -> bool:
        """Show the next frame; tells whether the one `window_width` before it begins a shot."""
        nonlocal shown
        shown += 1
        return bool(detector.process_frame(FrameTimecode(shown, fps=1.0), _small(frame)))

    waiting: deque[Tensor] = deque()
    for number, frame in enumerate(frames):
        if number == 0:
            # The detector judges no frame without neighbours, and videos cut by others often have one frame too many at
            # an end: so the first frame is shown twice, and the last one three times.
            earlier_begins_shot(frame)
        begins_shot = earlier_begins_shot(frame)
        waiting.append(frame)
        if len(waiting) > detector.window_width:
            yield waiting.popleft(), begins_shot
    while waiting:
        begins_shot = earlier_begins_shot(waiting[-1])
        yield waiting.popleft(), begins_shot


def _small(frame: Tensor) -> np.ndarray:
    """A frame (3, H, W) as OpenCV has pictures: (h, w, 3), blue first; w is at most `WIDTH`."""
    import cv2

    height, width = frame.shape[1:]
    scale = min(1.0, WIDTH / width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # Channel by channel: to scale the small planes and join them is cheaper than to turn the large frame.
    planes = [cv2.resize(plane, size, interpolation=cv2.INTER_LINEAR) for plane in frame.numpy()[::-1]]
    picture: np.ndarray = cv2.merge(planes)
    return picture
