"""Reading of the scalars in TensorBoard's event files, within the size of each file.

A file is a sequence of records (TFRecord): the length, uint64; the masked CRC-32C of its eight bytes, uint32; the bytes
of an `Event`; and their masked CRC-32C, all little-endian. TensorBoard's own reader allocates what a length states,
waits for pipes, and ends with an exception for an event that it cannot parse.
"""

import logging
import math
import struct
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple

from gpdit_lightning.regular_files import BoundedReader

HEADER, CHECKSUM = struct.Struct("<QI"), struct.Struct("<I")
MAX_EVENT_BYTES = 2**16  # of an event with scalars; images and texts are larger, and are skipped
CURE = "remove it from the run folder"

log = logging.getLogger(__name__)


class Scalars(NamedTuple):
    """The scalars of a run.

    Attributes:
        points: values by tag and step.
        begun: ISO date of the first point; empty if it has no valid time.
    """

    points: dict[str, dict[int, float]]
    begun: str


class _Point(NamedTuple):
    """A value of a tag at a step; without a tag the restart of a run, which replaces all points from the step on."""

    tag: str | None
    step: int
    value: float
    time: float
    """Seconds since 1970."""


class _DamagedRecordError(Exception):
    """A record whose bytes are not those that were written."""


def read_scalars(files: Iterable[Path]) -> Scalars:
    """Read all scalars of a run, whose process may still write the last event, and may have been restarted.

    Points that a restarted process logged again replace the earlier ones, as in TensorBoard. The rest of a damaged file
    is left out with a warning.

    Args:
        files: the event files in their order.

    Raises:
        InputError: one is not a regular file.
        OSError: one cannot be read.
    """
    written = [point for path in files for point in _points_of(path)]
    points: dict[str, dict[int, float]] = {}
    limit = math.inf
    for tag, step, value, _ in reversed(written):
        if tag is None:
            limit = min(limit, step)
        elif step < limit:
            points.setdefault(tag, {}).setdefault(step, value)
    return Scalars(points, _date_of(written[0].time) if written else "")


def _points_of(path: Path) -> Iterator[_Point]:
    """Yield the points of a file in their order."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    events = 0
    try:
        for content in _records(path):
            event = Event.FromString(content)
            events += 1
            if event.session_log.status == SessionLog.START:
                yield _Point(None, event.step, 0.0, event.wall_time)
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    yield _Point(value.tag, event.step, value.simple_value, event.wall_time)
    except (DecodeError, _DamagedRecordError) as error:
        reason = "the bytes of the next one are none" if isinstance(error, DecodeError) else error
        log.warning("%s is damaged after %d events (%s): the rest of it is left out.", path, events, reason)


def _records(path: Path) -> Iterator[bytes]:
    """Yield the bytes of the records that can contain scalars, and of larger ones none; the last may be incomplete.

    Raises:
        _DamagedRecordError: a checksum differs.
    """
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    with BoundedReader(path, CURE) as file:
        while len(header := file.read(HEADER.size)) == HEADER.size:
            length, checksum = HEADER.unpack(header)
            if masked_crc32c(header[:8]) != checksum:
                raise _DamagedRecordError("the checksum of a length differs")
            if length > MAX_EVENT_BYTES:
                file.seek(min(length + CHECKSUM.size, file.size), 1)
                continue
            content, stored = file.read(length), file.read(CHECKSUM.size)
            if len(stored) < CHECKSUM.size:
                return
            if masked_crc32c(content) != CHECKSUM.unpack(stored)[0]:
                raise _DamagedRecordError("the checksum of an event differs")
            yield content


def _date_of(seconds: float) -> str:
    try:
        return date.fromtimestamp(seconds).isoformat()
    except (ValueError, OverflowError, OSError):
        return ""
