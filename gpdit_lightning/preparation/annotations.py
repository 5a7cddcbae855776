"""What published annotation files say of sources: captions, labels, and the split that a source belongs to."""

import csv
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, get_args

from gpdit_lightning.data.manifest import Split
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import IMAGE_EXTENSIONS
from gpdit_lightning.media.video import VIDEO_EXTENSIONS

FIELDS = ("source", "caption", "label", "split")
UNDERSTOOD = (
    "give UCF-101's trainlist, testlist or classInd, MSR-VTT's videodatainfo.json, or JSON lines, CSV or TSV with "
    f"{', '.join(FIELDS)}"
)
SPLITS: dict[str, Split] = {split: split for split in get_args(Split)}
MSR_VTT_SPLITS: dict[str, Split] = {"train": "train", "validate": "validation", "test": "validation"}

ENDINGS = (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS)
FILE = rf"(?P<name>\S.*(?:{'|'.join(map(re.escape, ENDINGS))}))"
# The lines of UCF-101's three kinds of lists, and the split that a kind stands for.
LISTS: tuple[tuple[re.Pattern[str], Split | None], ...] = (
    (re.compile(rf"{FILE}\s+(?P<number>\d+)", re.IGNORECASE), "train"),
    (re.compile(FILE, re.IGNORECASE), "validation"),
    (re.compile(r"(?P<number>\d+)\s+(?P<name>\S+)"), None),
)
HALF_A_PAIR = re.compile(r"[\ud800-\udfff]")  # of surrogates: JSON can spell it, and no file can hold it


class Annotation(NamedTuple):
    """What is known of one source."""

    captions: tuple[str, ...] = ()
    label: str | None = None
    split: Split | None = None


@dataclass(frozen=True)
class Table:
    """What one file says, under the names that it uses."""

    path: Path
    entries: dict[str, Annotation] = field(default_factory=dict)
    classes: set[tuple[int, str]] = field(default_factory=set)
    """Numbers and names of classes, which are names of folders."""
    is_list: bool = False
    """One of UCF-101's lists."""

    def of(self, name: str) -> Annotation:
        """What is said of a source under its whole name, else under its path without ending, else under its stem."""
        if name in self.entries:
            return self.entries[name]
        entry = self._by_path.get(_without_ending(name)) or self._by_stem.get(_stem(name))
        return self.entries[entry] if entry else Annotation()

    def add(self, line: int, name: str, said: Annotation) -> None:
        """Add what a line says of a source.

        Raises:
            InputError: an earlier line says otherwise.
        """
        name = name.removeprefix("./")
        if known := self.entries.get(name):
            if difference := _difference(known, said):
                raise InputError(f"{self.path} line {line} gives {name!r} the {difference} before: remove one of them.")
            said = _merged(known, said)
        self.entries[name] = said

    # Made when a whole name is not found: a file of millions that names its sources in full costs no more than itself.
    @cached_property
    def _by_path(self) -> dict[str, str | None]:
        return _shortened(self.entries, _without_ending)

    @cached_property
    def _by_stem(self) -> dict[str, str | None]:
        return _shortened(self.entries, _stem)


@dataclass(frozen=True)
class Annotations:
    """What several files say together."""

    tables: tuple[Table, ...] = ()
    labels: tuple[str, ...] = ()
    """Names of all classes in the order of their numbers in UCF-101's lists; empty where no such list is given."""

    def of(self, name: str) -> Annotation:
        """What is known of a source; nothing, where no file names it.

        Args:
            name: its path relative to its folder, with slashes. An annotation file may name it in full, or without the
                ending, or by its stem alone unless it has that stem twice.

        Raises:
            InputError: two files give it different labels or splits.
        """
        known = Annotation()
        for place, table in enumerate(self.tables):
            said = table.of(name)
            if difference := _difference(known, said):
                earlier = next(other.path for other in self.tables[:place] if _difference(other.of(name), said))
                raise InputError(
                    f"{table.path} gives {name!r} the {difference} in {earlier}: correct or leave out one."
                )
            known = _merged(known, said)
        return known


def read_annotations(paths: Sequence[Path]) -> Annotations:
    """Read annotation files, each recognised by what is in it.

    - UCF-101's lists: one with class numbers is for training, one without for validation, and classInd.txt names the
      classes. The label is the folder, where any list gives it a class number.
    - MSR-VTT's `videodatainfo.json`: captions in the order of `sen_id`, and splits ("validate" and "test" are both
      validation). Its categories are left out: they are numbers without names, and topics more than classes.
    - JSON lines, CSV and TSV with the fields `FIELDS`, of which only "source" is needed. Captions may be a list, or
      stand on several lines.

    Raises:
        InputError: a file that is missing, of none of these forms, or contradicts itself; class numbers that differ.
    """
    tables = tuple(_read(Path(path)) for path in paths)
    classes = sorted({pair for table in tables for pair in table.classes})
    for (number, name), (other_number, other) in combinations(classes, 2):
        if number == other_number or name == other:
            raise InputError(
                f"{', '.join(map(str, paths))} number classes differently ({number} {name}, {other_number} {other}): "
                "give lists of one data set."
            )
    labels = tuple(name for _, name in classes)
    for table in tables:
        if table.is_list:
            _label_by_folder(table, set(labels))
    return Annotations(tables, labels)


def _read(path: Path) -> Table:
    first = next((line.strip() for _, line in _lines(path) if line.strip()), "")
    if first.startswith("{"):
        return _msr_vtt(path) if _is_document(first) else _table(path, _objects(path))
    delimiter = "\t" if "\t" in first else ","
    if "source" in (cell.strip('"') for cell in first.split(delimiter)):
        return _table(path, _rows(path, delimiter))
    for pattern, split in LISTS:
        if pattern.fullmatch(first):
            return _list(path, pattern, split)
    raise InputError(f"{path} begins with {first[:80]!r}, which is nothing that is understood: {UNDERSTOOD}.")


def _list(path: Path, pattern: re.Pattern[str], split: Split | None) -> Table:
    table = Table(path, is_list=True)
    for number, line in _lines(path):
        if not line.strip():
            continue
        match = pattern.fullmatch(line.strip())
        if not match:
            raise InputError(f"{path} line {number} is {line.strip()[:80]!r}, unlike the lines before: {UNDERSTOOD}.")
        said = match.groupdict()
        if split:
            table.add(number, said["name"], Annotation(split=split))
        label = _folder(said["name"]) if split else said["name"]
        if label and "number" in said:
            table.classes.add((int(said["number"]), label))
    return table


def _label_by_folder(table: Table, classes: set[str]) -> None:
    for name, said in table.entries.items():
        if _folder(name) in classes:
            table.entries[name] = said._replace(label=_folder(name))


def _msr_vtt(path: Path) -> Table:
    text = "".join(line for _, line in _lines(path))
    captions: dict[str, list[str]] = defaultdict(list)
    try:
        content = json.loads(text)
        splits = {video["video_id"]: MSR_VTT_SPLITS[video["split"]] for video in content["videos"]}
        for sentence in sorted(content["sentences"], key=lambda sentence: sentence["sen_id"]):
            if not _is_text(sentence["caption"]):
                raise TypeError(f"the caption {sentence['caption']!r}")
            captions[sentence["video_id"]].append(sentence["caption"].strip())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no readable JSON ({error}): {UNDERSTOOD}.") from None
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is unlike MSR-VTT's videodatainfo.json at {error}: {UNDERSTOOD}.") from None
    names = dict.fromkeys([*splits, *captions])
    return Table(path, {name: Annotation(tuple(captions[name]), split=splits.get(name)) for name in names})


def _is_document(line: str) -> bool:
    """Whether a line that begins like JSON is the begin, or the whole, of one document for all sources."""
    try:
        return "videos" in json.loads(line)
    except (ValueError, RecursionError):
        return True


def _table(path: Path, objects: Iterable[tuple[int, dict[str, Any]]]) -> Table:
    table = Table(path)
    for line, values in objects:
        source, said = _entry(path, line, values)
        table.add(line, source, said)
    return table


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON lines file, each with its line."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} line {number} is no readable JSON ({error}): correct or remove it.") from None
        if not isinstance(values, dict):
            raise InputError(f"{path} line {number} is no JSON object: correct or remove it.")
        yield number, values


def _rows(path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a CSV or TSV file below its header, each with its line; empty cells are left out."""
    # Strict: a quote that is not closed would take all lines up to the next one as its cell, in silence.
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for row in filter(None, reader):
            if not header:
                header = row
                if len(set(header)) < len(header):
                    raise csv.Error("two columns have one name")
            elif len(row) != len(header):
                raise csv.Error(f"{len(row)} cells under a header of {len(header)}")
            else:
                yield reader.line_num, {name: cell for name, cell in zip(header, row, strict=True) if cell.strip()}
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num} is no row of the table ({error}): correct it.") from None


def _entry(path: Path, line: int, values: dict[str, Any]) -> tuple[str, Annotation]:
    """The source that an object or row names, and what it says of it."""

    def wrong(name: str, wanted: str) -> InputError:
        return InputError(f"{path} line {line} has {values.get(name)!r} as {name} where {wanted} belongs: correct it.")

    for name in values:
        if name not in FIELDS:
            raise InputError(f"{path} line {line} has the unknown field {name!r}: leave only {', '.join(FIELDS)}.")
    source, caption, label, split = (values.get(name) or None for name in FIELDS)
    captions = caption if isinstance(caption, list) else [caption] if caption else []
    if not isinstance(source, str) or not _is_text(source):
        raise wrong("source", "the path of a source")
    if not all(_is_text(text) for text in captions):
        raise wrong("caption", "a text or a list of texts")
    if label and not _is_text(label):
        raise wrong("label", "a text")
    if split and (not isinstance(split, str) or split not in SPLITS):
        raise wrong("split", " or ".join(SPLITS))
    return source, Annotation(
        tuple(text.strip() for text in captions), sys.intern(label) if label else None, SPLITS[split] if split else None
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file, counted from 1; raises `InputError` where it is no text."""
    number = 1
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {UNDERSTOOD}.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} line {number} is no UTF-8 ({error.reason}): save it as UTF-8.") from None


def _difference(known: Annotation, said: Annotation) -> str | None:
    """In words, what of two annotations cannot both be true."""
    for name, first, second in zip(Annotation._fields[1:], known[1:], said[1:], strict=True):
        if first and second and first != second:
            return f"{name} {second!r}, which is {first!r}"
    return None


def _merged(known: Annotation, said: Annotation) -> Annotation:
    return Annotation(known.captions + said.captions, known.label or said.label, known.split or said.split)


def _shortened(names: Iterable[str], shorten: Callable[[str], str]) -> dict[str, str | None]:
    """Short name -> the name it stands for; None where it stands for several."""
    found: dict[str, str | None] = {}
    for name in names:
        short = shorten(name)
        found[short] = None if short in found else name
    return found


def _without_ending(name: str) -> str:
    start, _, ending = name.rpartition(".")
    return start if f".{ending.lower()}" in ENDINGS else name


def _stem(name: str) -> str:
    return _without_ending(name.rpartition("/")[2])


def _folder(name: str) -> str:
    return PurePosixPath(name).parent.name


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and (value.isascii() or not HALF_A_PAIR.search(value))
