"""Finds the recorded input file that is meant by a path, by a name, or by the end of one."""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gpdit_lightning.errors import InputError
from gpdit_lightning.preparation.input_files import hash_of_path
from gpdit_lightning.preparation.records import RecordedFile, Records

SHOWN = 10  # names in the message for an ambiguous query


class Interpretation(NamedTuple):
    """One way to read a query: as an input file, or as a tar and the key of an image in it."""

    path: Path
    key: str = ""

    @property
    def size(self) -> int | None:
        """Bytes of the file; None if it does not exist."""
        return self.path.stat().st_size if self.path.is_file() else None


class Match(NamedTuple):
    """What a query means."""

    name: str
    """Of the input file; for an image of a tar TAR/KEY."""
    interpretation: Interpretation
    file: RecordedFile | None = None
    """None for a file that the annotations exclude, which is in no part."""
    part: int = -1


def look_up(query: str, records: Records, skipped: Sequence[str]) -> Match | None:
    """The one input file, or image of a tar, that a query means; None if nothing matches.

    Args:
        query: a path; a name as in records and metadata, or the end of one; for an image of a tar TAR/KEY.
        records: of the preparation.
        skipped: names of skipped inputs, of which some are in no part.

    Raises:
        InputError: several files match equally well.
    """
    matchers = [_Matcher(interpretation) for interpretation in _interpretations(Path(query))]
    # By rank, then by name: a file that gave nothing in an earlier part may be in a later part again.
    matches: dict[tuple[int, int], dict[str, Match]] = defaultdict(dict)
    for part in records.parts:
        for file in records.files_of_part(part):
            for matcher in matchers if file.split is None else matchers[:1]:
                if rank := matcher.rank(file.name, file.path_hash, file.bytes):
                    key = matcher.interpretation.key
                    name = f"{file.name}/{key}" if key else file.name
                    matches[rank][name] = Match(name, matcher.interpretation, file, part)
    for name in skipped:
        if rank := matchers[0].rank(name):
            matches[rank].setdefault(name, Match(name, matchers[0].interpretation))
    if not matches:
        return None
    best = matches[min(matches)]
    if len(best) > 1:
        more = ", ..." if len(best) > SHOWN else ""
        raise InputError(f"{query} may mean {', '.join(sorted(best)[:SHOWN])}{more}: give one of these names.")
    match = next(iter(best.values()))
    # Skipped inputs may be images of tars, which are in a part.
    return match if match.file else look_up(match.name, records, ()) or match


def _interpretations(path: Path) -> Iterator[Interpretation]:
    yield Interpretation(path)
    for parent in path.parents:
        if parent.name:
            folder, _, name = path.relative_to(parent).as_posix().rpartition("/")
            # The members of a sample share their name up to its first dot.
            yield Interpretation(parent, f"{folder}/{name.partition('.')[0]}".lstrip("/"))


class _Matcher:
    """Ranks how well files match an interpretation, whose properties are computed once."""

    def __init__(self, interpretation: Interpretation) -> None:
        self.interpretation = interpretation
        self._text, self._absolute = interpretation.path.as_posix(), os.path.abspath(interpretation.path)
        self._path_hash, self._size = hash_of_path(interpretation.path), interpretation.size

    def rank(self, name: str, path_hash: str | None = None, size: int | None = None) -> tuple[int, int] | None:
        """The lower the better; None: no match."""
        if path_hash == self._path_hash:
            return 0, 0
        if name == self._text:
            return 1, 0
        if size is not None and self._size not in (None, size):
            return None  # the path exists and is another file
        if name.endswith(f"/{self._text}"):
            return 2, 0
        if self._absolute.endswith(f"/{name}"):  # the file was moved; the longest name is the most specific
            return 3, -len(name)
        return None
