"""Bounds on the tables of mp4 and QuickTime headers, which FFmpeg expands in memory without comparing them to the file.

A fragment of 20 bytes can state four billion samples of no bytes, of which FFmpeg would write an index of 24 bytes per
sample; and each entry of an edit list can repeat the index of all samples (ISO 14496-12: 8.6.6, 8.7.3, 8.8.8).
"""

from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from gpdit_lightning.errors import InputError
from gpdit_lightning.regular_files import BoundedReader

FIRST_BOXES = (b"ftyp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"sidx")
CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"moof", b"traf")
EDIT_LIST = b"elst"
TABLES = {b"stts": 8, b"ctts": 8, b"stsc": 12, b"stss": 4, b"stco": 4, b"co64": 8}  # box -> bytes of an entry
# Box -> position of the number of its entries.
COUNTED = {b"stsz": 8, b"stz2": 8, b"trun": 4, EDIT_LIST: 4} | dict.fromkeys(TABLES, 4)
HEAD_BYTES = 16 + 8 + 4  # a box's length, kind and further length, and its number of entries
MAX_EDITS = 1000  # of a track; each decodes frames again, at least from the last key frame
MAX_REPEATED_SAMPLES = 50_000_000  # edits times samples of a track; FFmpeg's index of as many takes 1.2 GB


@dataclass
class _Counts:
    """What the tables of a header state.

    Attributes:
        samples: number of samples by the number of the track, counted from 0; of fragments under -1.
        edits: number of edits by the number of the track.
        excess: kind, number of entries and length in bytes of a table with more entries than fit into it.
        fragments: number of fragments.
        ends_with_box: whether the file ends where its last box does.
    """

    samples: Counter[int] = field(default_factory=Counter)
    edits: Counter[int] = field(default_factory=Counter)
    excess: tuple[str, int, int] | None = None
    fragments: int = 0
    ends_with_box: bool = True


def check_mp4_header(path: Path) -> bool:
    """Compare the numbers of samples and edits that the header of an mp4 states with the size of the file.

    Files of other formats are accepted, and what follows a damaged box is left to FFmpeg.

    Returns:
        Whether the file is cut within a fragment. FFmpeg drops a fragment with an incomplete header without a message.

    Raises:
        InputError: the file states more samples than it has bytes, edits that repeat too many of them, or more entries
            of another table than fit into it.
    """
    with BoundedReader(path) as file:
        if file.read(8)[4:] not in FIRST_BOXES:
            return False
        size = file.seek(0, 2)
        counts = _count(file, size)
    if (samples := counts.samples.total()) > size:
        raise InputError(f"{path} states {samples} samples in a file of {size} bytes: replace or remove it.")
    if counts.excess:
        kind, entries, length = counts.excess
        raise InputError(f"{path} states {entries} entries in a table {kind} of {length} bytes: replace or remove it.")
    for track, edits in counts.edits.items():
        if edits > MAX_EDITS or (edits > 1 and edits * counts.samples[track] > MAX_REPEATED_SAMPLES):
            raise InputError(
                f"{path} has an edit list of {edits} edits for {counts.samples[track]} samples, more than can be read: "
                "convert it to an mp4 without one."
            )
    return counts.fragments > 0 and not counts.ends_with_box


def _count(file: BinaryIO, size: int) -> _Counts:
    """Read the tables of a file of `size` bytes."""
    counts, tracks = _Counts(), 0
    regions = deque([(0, size, -1)])  # start, end and track of regions that contain boxes
    while regions:
        begin, end, track = regions.popleft()
        start = begin
        while start + 8 <= end:
            file.seek(start)
            head = file.read(HEAD_BYTES)
            length, kind, body = int.from_bytes(head[:4]), head[4:8], 8
            if length == 1:
                length, body = int.from_bytes(head[8:16]), 16
            stop = end if length == 0 else start + length
            if stop < start + body:
                break
            counts.fragments += kind == b"moof"
            if kind in CONTAINERS:
                is_track = kind == b"trak"
                regions.append((start + body, min(stop, end), tracks if is_track else track))
                tracks += is_track
            elif kind in COUNTED:
                place = body + COUNTED[kind]
                entries = int.from_bytes(head[place : place + 4])
                if kind not in TABLES:
                    (counts.edits if kind == EDIT_LIST else counts.samples)[track] += entries
                elif entries * TABLES[kind] > stop - start:
                    counts.excess = kind.decode(), entries, stop - start
            start = stop
        if begin == 0:
            counts.ends_with_box = start == end
    return counts
