"""Videos whose frames have given times and gray levels."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

STEP = 5  # gray levels from frame to frame: more than what H.264 changes


def write_timed(path: Path, times: Sequence[float], height: int = 32, width: int = 32) -> Path:
    """Write a video whose frame i has the gray level 5 i and is shown at `times[i]` seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", 1000, options={"crf": "4", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 90000)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), number * STEP, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time * 90000), Fraction(1, 90000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def gray_numbers(frames: "Sequence[object]") -> list[int]:
    """Return the numbers of frames (3, H, W) by their gray levels."""
    return [round(float(frame.float().mean()) / STEP) for frame in frames]  # type: ignore[attr-defined]
