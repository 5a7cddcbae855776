"""Hard cuts of a video, found by PySceneDetect (the optional extra `shots`)."""

from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.media.video import iterate_frames

WIDTH = 256  # PySceneDetect scales wider frames down to this width; its thresholds hold for it


def check_available() -> None:
    """Raise InputError if PySceneDetect cannot be imported."""
    try:
        import cv2  # noqa: F401
        import scenedetect  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"PySceneDetect, which finds cuts, cannot be imported ({error}): pip install -e '.[shots]'."
        ) from None


def find_cuts(path: str | Path) -> list[int]:
    """The numbers of the frames that begin a new shot, as `iterate_frames` counts them; never 0.

    Raises:
        InputError: PySceneDetect is missing, or the video is missing or damaged.
    """
    return [number for number, (_, begins_shot) in enumerate(mark_cuts(iterate_frames(path))) if begins_shot]


def mark_cuts(frames: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Every frame, and whether it begins a new shot. Three frames are in memory at a time.

    A frame's difference from the one before is compared with the differences around it (PySceneDetect's
    AdaptiveDetector with its defaults, except that a shot may have a single frame). So a fast camera motion is no cut,
    and a change between two dark images is one; dissolves are none, nor are fades up to their step into pure black. The
    decision on a frame needs the two after it: if the frames end with an error, the last two before it are lost.

    Args:
        frames: uint8 RGB (3, H, W), every frame of a video in order, of one size.

    Raises:
        InputError: PySceneDetect is missing.
    """
    check_available()
    import cv2
    from scenedetect import AdaptiveDetector, FrameTimecode

    cv2.setNumThreads(1)  # small images gain nothing from threads, and preparation has a process per core
    detector = AdaptiveDetector(min_scene_len=0)
    processed = 0

    def delayed_decision(frame: Tensor) -> bool:
        """Pass the next frame to the detector; returns whether the one `window_width` before it begins a shot."""
        nonlocal processed
        processed += 1
        return bool(detector.process_frame(FrameTimecode(processed, fps=1.0), _downscaled(frame)))

    waiting: deque[Tensor] = deque()
    for number, frame in enumerate(frames):
        if number == 0:
            # The detector decides on no frame without neighbours, and clips cut from longer videos often have a frame
            # of another shot at an end: so the first frame is passed twice, and the last one three times.
            delayed_decision(frame)
        begins_shot = delayed_decision(frame)
        waiting.append(frame)
        if len(waiting) > detector.window_width:
            yield waiting.popleft(), begins_shot
    while waiting:
        begins_shot = delayed_decision(waiting[-1])
        yield waiting.popleft(), begins_shot


def _downscaled(frame: Tensor) -> np.ndarray:
    """A frame (3, H, W) in OpenCV's layout: (h, w, 3), blue first, w at most `WIDTH`."""
    import cv2

    height, width = frame.shape[1:]
    scale = min(1.0, WIDTH / width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # Channel by channel: scaling the planes and merging the small ones is cheaper than transposing the large frame.
    planes = [cv2.resize(plane, size, interpolation=cv2.INTER_LINEAR) for plane in frame.numpy()[::-1]]
    image: np.ndarray = cv2.merge(planes)
    return image
