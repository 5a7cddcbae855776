"""Detection of hard cuts in videos with PySceneDetect (the optional extra `shots`)."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
from torch import Tensor

from gpdit_lightning.errors import InputError

T = TypeVar("T")

MAX_WIDTH = 256  # PySceneDetect scales wider frames down to this width, for which its thresholds are tuned


def check_available() -> None:
    """Raise InputError if PySceneDetect cannot be imported."""
    try:
        import cv2  # noqa: F401
        import scenedetect  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"PySceneDetect, which detects cuts, cannot be imported ({error}): pip install 'gpdit_lightning[shots]'."
        ) from None


def mark_cuts(frames: Iterable[tuple[Tensor, T]]) -> Iterator[tuple[T, bool]]:
    """Yield the item of every frame, and whether the frame begins a new shot. One frame is in memory at a time.

    The difference between a frame and the one before is compared with the differences around it (PySceneDetect's
    AdaptiveDetector with its defaults, except that a shot may have a single frame). Therefore fast camera motion is not
    a cut, and a change between two dark images is one. Dissolves are not cuts, nor are fades, except for their last
    step into pure black. The decision on a frame requires the two frames after it: if the frames end with an error, the
    last two frames before it are lost.

    Args:
        frames: every frame of a video in order, uint8 RGB (3, H, W), all of one size, each with
            an item to yield for it.

    Raises:
        InputError: PySceneDetect is not installed.
    """
    check_available()
    import cv2
    from scenedetect import AdaptiveDetector, FrameTimecode

    cv2.setNumThreads(1)  # threads do not accelerate small images, and preparation runs one process per core
    detector = AdaptiveDetector(min_scene_len=0)
    processed = 0

    def delayed_decision(image: np.ndarray) -> bool:
        """Pass an image to the detector; return whether the frame `window_width` before it begins a shot."""
        nonlocal processed
        processed += 1
        return bool(detector.process_frame(FrameTimecode(processed, fps=1.0), image))

    undecided: deque[T] = deque()
    image = np.empty(0)
    for number, (frame, item) in enumerate(frames):
        image = _downscaled(frame)
        if number == 0:
            # The detector makes no decision on a frame without neighbours, but clips cut from longer videos often begin
            # or end with a frame of another shot. So the first frame is passed twice, and the last one three times.
            delayed_decision(image)
        begins_shot = delayed_decision(image)
        undecided.append(item)
        if len(undecided) > detector.window_width:
            yield undecided.popleft(), begins_shot
    while undecided:
        begins_shot = delayed_decision(image)
        yield undecided.popleft(), begins_shot


def _downscaled(frame: Tensor) -> np.ndarray:
    """Convert a frame (3, H, W) to OpenCV's layout: (h, w, 3), blue first, w at most `MAX_WIDTH`."""
    import cv2

    height, width = frame.shape[1:]
    scale = min(1.0, MAX_WIDTH / width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # Scaling each channel and merging the small results is faster than transposing the large frame.
    planes = [cv2.resize(plane, size, interpolation=cv2.INTER_LINEAR) for plane in frame.numpy()[::-1]]
    image: np.ndarray = cv2.merge(planes)
    return image
