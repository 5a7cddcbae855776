"""Lookup of a recorded input file by its path, its name, or the end of its name."""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gpdit_lightning.errors import InputError
from gpdit_lightning.names import as_text
from gpdit_lightning.preparation.input_files import hash_path
from gpdit_lightning.preparation.record_formats import RecordedFile
from gpdit_lightning.preparation.records import Records

MAX_NAMES_SHOWN = 10  # in the message for an ambiguous query


class Interpretation(NamedTuple):
    """Interpretation of a query as an input file, or as a tar and the key of an image in it."""

    path: Path
    key: str = ""

    @property
    def size(self) -> int | None:
        """Size of the file in bytes; None if it does not exist."""
        return self.path.stat().st_size if self.path.is_file() else None


class Match(NamedTuple):
    """The input file, or image in a tar, that matches a query."""

    name: str
    """Name of the input file; TAR/KEY for an image in a tar."""
    interpretation: Interpretation
    file: RecordedFile | None = None
    """None for a file that the annotations exclude; it is in no part."""
    part: int = -1


def look_up(query: str, records: Records, skipped: Sequence[str]) -> Match | None:
    """Find the input file, or image in a tar, that matches a query best; None if nothing matches.

    Args:
        query: a path; a name as in records and metadata, or the end of a name; TAR/KEY for an image in a tar.
        records: records of the preparation.
        skipped: names of inputs that were skipped or noted, some of which are in no part.

    Raises:
        InputError: several files match equally well.
    """
    matchers = [_Matcher(interpretation) for interpretation in _interpretations(Path(query))]
    # By rank, then by name: a file without samples may occur again in a later part.
    matches: dict[tuple[int, int], dict[str, Match]] = defaultdict(dict)
    for part in records.parts:
        for file in records.files_of_part(part):
            for matcher in matchers if file.format == "tar" else matchers[:1]:
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
        more = ", ..." if len(best) > MAX_NAMES_SHOWN else ""
        names = ", ".join(sorted(best)[:MAX_NAMES_SHOWN])
        raise InputError(f"{query} matches {names}{more}: give one of these names.")
    match = next(iter(best.values()))
    # A skipped input may be an image in a tar, which is in a part.
    return match if match.file else look_up(match.name, records, ()) or match


def _interpretations(path: Path) -> Iterator[Interpretation]:
    yield Interpretation(path)
    for parent in path.parents:
        if parent.name:
            folder, _, name = path.relative_to(parent).as_posix().rpartition("/")
            # The names of the members of a sample agree up to the first dot.
            yield Interpretation(parent, f"{folder}/{name.partition('.')[0]}".lstrip("/"))


class _Matcher:
    """Matcher of recorded files with one interpretation of a query."""

    def __init__(self, interpretation: Interpretation) -> None:
        self.interpretation = interpretation
        path = interpretation.path
        self._text, self._absolute = as_text(path.as_posix()), as_text(os.path.abspath(path))
        self._path_hashes = {hash_path(path), hash_path(Path(os.path.realpath(path)))}  # the path may be a link
        self._size = interpretation.size

    def rank(self, name: str, path_hash: str | None = None, size: int | None = None) -> tuple[int, int] | None:
        """Rank how well a file matches, lower is better; None if it does not match."""
        if path_hash in self._path_hashes:
            return 0, 0
        if name == self._text:
            return 1, 0
        if size is not None and self._size not in (None, size):
            return None  # the path of the query is a different file
        if name.endswith(f"/{self._text}"):
            return 2, 0
        if self._absolute.endswith(f"/{name}"):  # a moved file; the longest name is the most specific
            return 3, -len(name)
        return None
