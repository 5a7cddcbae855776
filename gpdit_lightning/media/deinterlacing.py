"""Deinterlacing of the frames that are stored as two fields of different times."""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace

import av

from gpdit_lightning.errors import InputError
from gpdit_lightning.media.decoding import DecodedFrame

MIN_WIDTH, MIN_HEIGHT = 3, 4  # of a plane, for `bwdif`


def deinterlaced(frames: Iterable[DecodedFrame]) -> Iterator[DecodedFrame]:
    """Replace each interlaced frame by a progressive one of the same time, made from it and its neighbours.

    Nothing is changed before the first frame that is marked as interlaced. From there on FFmpeg's filter `idet`
    corrects the marks and the order of the fields by the content, since progressive videos are often marked as
    interlaced, and `bwdif` deinterlaces the frames that are interlaced. Frames that are too small for it are taken for
    progressive ones: FFmpeg would convert the colours of each field alone, and so small fields wrongly.

    Args:
        frames: consecutive frames of a video. If they end with an `InputError`, it is raised after the last frame.
    """
    fields: _FieldFilter | None = None
    try:
        for decoded in frames:
            if fields and not fields.fits(decoded.frame):
                yield from fields.end()
                fields = None
            if fields is None and decoded.frame.interlaced_frame:
                fields = _FieldFilter(decoded.frame)
            if fields is None:
                yield decoded
            else:
                yield from fields.add(decoded)
    except InputError:
        yield from fields.end() if fields else ()
        raise
    yield from fields.end() if fields else ()


class _FieldFilter:
    """The filters of interlaced frames, which return as many frames as they take, but later.

    Args:
        frame: a frame with the size and format of all frames.
    """

    def __init__(self, frame: "av.VideoFrame") -> None:
        self._layout = frame.width, frame.height, frame.format.name
        self._waiting: deque[DecodedFrame] = deque()
        self._graph = av.filter.Graph()
        self._graph.threads = 1
        filters = [("idet", ""), ("bwdif", "mode=send_frame:parity=auto:deint=interlaced")]
        if any(plane.width < MIN_WIDTH or plane.height < MIN_HEIGHT for plane in frame.planes):
            filters = [("setfield", "prog")]
        self._graph.link_nodes(
            self._graph.add_buffer(template=frame, time_base=frame.time_base),
            *(self._graph.add(name, options) for name, options in filters),
            self._graph.add("buffersink"),
        ).configure()

    def fits(self, frame: "av.VideoFrame") -> bool:
        """Return whether a frame has the size and format of the filters."""
        return self._layout == (frame.width, frame.height, frame.format.name)

    def add(self, decoded: DecodedFrame) -> Iterator[DecodedFrame]:
        """Add the next frame, and yield the frames that are complete."""
        self._waiting.append(decoded)
        self._graph.vpush(decoded.frame)
        return self._complete_frames()

    def end(self) -> Iterator[DecodedFrame]:
        """Yield the remaining frames."""
        self._graph.vpush(None)
        return self._complete_frames()

    def _complete_frames(self) -> Iterator[DecodedFrame]:
        with suppress(av.BlockingIOError, av.EOFError):
            while True:
                frame = self._graph.vpull()
                yield replace(self._waiting.popleft(), frame=frame)
