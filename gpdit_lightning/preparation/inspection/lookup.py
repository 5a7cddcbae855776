"""What is meant by a path, a name, or the end of one, among all sources that were recorded."""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gpdit_lightning.errors import InputError
from gpdit_lightning.preparation.input_files import InputFile
from gpdit_lightning.preparation.records import RecordedSource, Records

SHOWN = 10  # of the names that may be meant


class Reading(NamedTuple):
    """One way to read what was asked for: as a source, or as a tar and the key of a picture in it."""

    path: Path
    key: str = ""

    @property
    def size(self) -> int | None:
        """Bytes of the file; None where there is none."""
        return self.path.stat().st_size if self.path.is_file() else None


class Match(NamedTuple):
    """What is meant."""

    name: str
    """Of the source; of a picture in a tar TAR/KEY."""
    reading: Reading
    source: RecordedSource | None = None
    """None for what the annotations left out, which is in no part."""
    part: int = -1


def look_up(file: str, records: Records, left_out: Sequence[str]) -> Match | None:
    """The one source, or picture in a tar, that is meant; None if nothing fits.

    Args:
        file: its path; its name, as records and metadata have it, or the end of that; for a picture in a tar TAR/KEY.
        records: of the preparation.
        left_out: names of sources that may be in no part.

    Raises:
        InputError: several things fit equally well.
    """
    measures = [_Measure(reading) for reading in _readings(Path(file))]
    # By how well they fit, then by name: what an earlier part lost, a later one may have taken up.
    matches: dict[tuple[int, int], dict[str, Match]] = defaultdict(dict)
    for part in records.parts:
        for source in records.of_part(part):
            for measure in measures if source.split is None else measures[:1]:
                if fit := measure.fit(source.name, source.place, source.bytes):
                    key = measure.reading.key
                    name = f"{source.name}/{key}" if key else source.name
                    matches[fit][name] = Match(name, measure.reading, source, part)
    for name in left_out:
        if fit := measures[0].fit(name):
            matches[fit].setdefault(name, Match(name, measures[0].reading))
    if not matches:
        return None
    best = matches[min(matches)]
    if len(best) > 1:
        more = ", ..." if len(best) > SHOWN else ""
        raise InputError(f"{file} may mean {', '.join(sorted(best)[:SHOWN])}{more}: give one of these names.")
    match = next(iter(best.values()))
    # The report names pictures in tars too, which are in a part.
    return match if match.source else look_up(match.name, records, ()) or match


def place_of(path: Path) -> str:
    """What records note of where a file lies."""
    return InputFile(path, path.name, "image", None, 0).place


def _readings(path: Path) -> Iterator[Reading]:
    yield Reading(path)
    for parent in path.parents:
        if parent.name:
            folder, _, name = path.relative_to(parent).as_posix().rpartition("/")
            # Members of a tar belong to one key up to the first dot of their name.
            yield Reading(parent, f"{folder}/{name.partition('.')[0]}".lstrip("/"))


class _Measure:
    """Tells how well sources fit a reading, of which everything is computed once."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self._text, self._whole = reading.path.as_posix(), os.path.abspath(reading.path)
        self._place, self._size = place_of(reading.path), reading.size

    def fit(self, name: str, place: str | None = None, size: int | None = None) -> tuple[int, int] | None:
        """The less the better; None: not at all."""
        if place == self._place:
            return 0, 0
        if name == self._text:
            return 1, 0
        if size is not None and self._size not in (None, size):
            return None  # a file that is there, and another
        if name.endswith(f"/{self._text}"):
            return 2, 0
        if self._whole.endswith(f"/{name}"):  # it was moved; the longest name tells most
            return 3, -len(name)
        return None
