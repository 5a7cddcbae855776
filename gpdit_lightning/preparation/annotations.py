"""Published annotation files: captions, labels and splits of input files."""

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
SUPPORTED = (
    "give UCF-101's trainlist, testlist or classInd, MSR-VTT's videodatainfo.json, or JSON lines, CSV or TSV with "
    f"{', '.join(FIELDS)}"
)
SPLITS: dict[str, Split] = {split: split for split in get_args(Split)}
MSR_VTT_SPLITS: dict[str, Split] = {"train": "train", "validate": "validation", "test": "validation"}

EXTENSIONS = (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS)
FILE = rf"(?P<name>\S.*(?:{'|'.join(map(re.escape, EXTENSIONS))}))"
# The lines of UCF-101's three kinds of lists, and the split of the files in each.
LISTS: tuple[tuple[re.Pattern[str], Split | None], ...] = (
    (re.compile(rf"{FILE}\s+(?P<number>\d+)", re.IGNORECASE), "train"),
    (re.compile(FILE, re.IGNORECASE), "validation"),
    (re.compile(r"(?P<number>\d+)\s+(?P<name>\S+)"), None),
)
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")  # JSON can spell it, and UTF-8 cannot encode it


class Annotation(NamedTuple):
    """What the files say about one input file."""

    captions: tuple[str, ...] = ()
    label: str | None = None
    split: Split | None = None


@dataclass(frozen=True)
class Table:
    """The content of one annotation file, under the names that it uses."""

    path: Path
    entries: dict[str, Annotation] = field(default_factory=dict)
    classes: set[tuple[int, str]] = field(default_factory=set)
    """Numbers and names of classes; a class is the name of a folder."""
    is_list: bool = False
    """One of UCF-101's lists."""

    def of(self, name: str) -> Annotation:
        """The annotation of an input file: under its name, else its path without extension, else its stem."""
        if name in self.entries:
            return self.entries[name]
        entry = self._by_path.get(_without_extension(name)) or self._by_stem.get(_stem(name))
        return self.entries[entry] if entry else Annotation()

    def add(self, line: int, name: str, annotation: Annotation) -> None:
        """Add the annotation of a line.

        Raises:
            InputError: an earlier line contradicts it.
        """
        name = name.removeprefix("./")
        if earlier := self.entries.get(name):
            if conflict := _conflict(earlier, annotation):
                raise InputError(f"{self.path} line {line} gives {name!r} the {conflict} before: remove one of them.")
            annotation = _merged(earlier, annotation)
        self.entries[name] = annotation

    # Built when a full name is not found, so that files with millions of full names need no second table.
    @cached_property
    def _by_path(self) -> dict[str, str | None]:
        return _by_short_name(self.entries, _without_extension)

    @cached_property
    def _by_stem(self) -> dict[str, str | None]:
        return _by_short_name(self.entries, _stem)


@dataclass(frozen=True)
class Annotations:
    """The content of several annotation files."""

    tables: tuple[Table, ...] = ()
    labels: tuple[str, ...] = ()
    """Names of all classes in the order of their numbers in UCF-101's lists; empty without such a list."""

    def of(self, name: str) -> Annotation:
        """The annotation of an input file; an empty one if no file names it.

        Args:
            name: its path relative to its folder, with slashes. An annotation file may give the full name, the name
                without extension, or the stem alone if only one of its entries has that stem.

        Raises:
            InputError: two files give it different labels or splits.
        """
        merged = Annotation()
        for i, table in enumerate(self.tables):
            annotation = table.of(name)
            if conflict := _conflict(merged, annotation):
                other = next(other.path for other in self.tables[:i] if _conflict(other.of(name), annotation))
                raise InputError(f"{table.path} gives {name!r} the {conflict} in {other}: correct or omit one.")
            merged = _merged(merged, annotation)
        return merged


def read_annotations(paths: Sequence[Path]) -> Annotations:
    """Read annotation files; the content of each shows its format.

    - UCF-101's lists: one with class numbers is for training, one without for validation, and classInd.txt names the
      classes. The label is the name of the folder, if any list gives it a class number.
    - MSR-VTT's `videodatainfo.json`: captions in the order of `sen_id`, and splits ("validate" and "test" are both
      validation). Its categories are not used: they are numbers without names, and topics rather than classes.
    - JSON lines, CSV and TSV with the fields `FIELDS`, of which only "source" is required. Captions may be a list, or
      on several lines.

    Raises:
        InputError: a file that is missing, has none of these formats or contradicts itself; class numbers that differ.
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
    raise InputError(f"{path} begins with {first[:80]!r}, which is no supported format: {SUPPORTED}.")


def _list(path: Path, pattern: re.Pattern[str], split: Split | None) -> Table:
    table = Table(path, is_list=True)
    for number, line in _lines(path):
        if not line.strip():
            continue
        match = pattern.fullmatch(line.strip())
        if not match:
            raise InputError(f"{path} line {number} is {line.strip()[:80]!r}, unlike the lines before: {SUPPORTED}.")
        values = match.groupdict()
        if split:
            table.add(number, values["name"], Annotation(split=split))
        label = _folder(values["name"]) if split else values["name"]
        if label and "number" in values:
            table.classes.add((int(values["number"]), label))
    return table


def _label_by_folder(table: Table, classes: set[str]) -> None:
    for name, annotation in table.entries.items():
        if _folder(name) in classes:
            table.entries[name] = annotation._replace(label=_folder(name))


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
        raise InputError(f"{path} is not readable JSON ({error}): {SUPPORTED}.") from None
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path} does not have the fields of MSR-VTT's videodatainfo.json ({error}): {SUPPORTED}."
        ) from None
    names = dict.fromkeys([*splits, *captions])
    return Table(path, {name: Annotation(tuple(captions[name]), split=splits.get(name)) for name in names})


def _is_document(line: str) -> bool:
    """Whether a line that begins like JSON is the beginning, or the whole, of one document for all input files."""
    try:
        return "videos" in json.loads(line)
    except (ValueError, RecursionError):
        return True


def _table(path: Path, objects: Iterable[tuple[int, dict[str, Any]]]) -> Table:
    table = Table(path)
    for line, values in objects:
        table.add(line, *_entry(path, line, values))
    return table


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON lines file, each with its line."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} line {number} is not readable JSON ({error}): correct or remove it.") from None
        if not isinstance(values, dict):
            raise InputError(f"{path} line {number} is not a JSON object: correct or remove it.")
        yield number, values


def _rows(path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a CSV or TSV file below its header, each with its line; empty cells are omitted."""
    # Strict: otherwise an unclosed quote would silently make one cell of all lines up to the next quote.
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for row in filter(None, reader):
            if not header:
                header = row
                if len(set(header)) < len(header):
                    raise csv.Error("two columns have the same name")
            elif len(row) != len(header):
                raise csv.Error(f"{len(row)} cells under a header of {len(header)}")
            else:
                yield reader.line_num, {name: cell for name, cell in zip(header, row, strict=True) if cell.strip()}
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num} is not a row of the table ({error}): correct it.") from None


def _entry(path: Path, line: int, values: dict[str, Any]) -> tuple[str, Annotation]:
    """The input file that an object or row names, and its annotation."""

    def wrong(name: str, wanted: str) -> InputError:
        return InputError(f"{path} line {line} has {values.get(name)!r} as {name}, which must be {wanted}: correct it.")

    for name in values:
        if name not in FIELDS:
            raise InputError(f"{path} line {line} has the unknown field {name!r}: give only {', '.join(FIELDS)}.")
    source, caption, label, split = (values.get(name) or None for name in FIELDS)
    captions = caption if isinstance(caption, list) else [caption] if caption else []
    if not isinstance(source, str) or not _is_text(source):
        raise wrong("source", "the path of an input file")
    if not all(_is_text(text) for text in captions):
        raise wrong("caption", "a string or a list of strings")
    if label and not _is_text(label):
        raise wrong("label", "a string")
    if split and (not isinstance(split, str) or split not in SPLITS):
        raise wrong("split", " or ".join(SPLITS))
    return source, Annotation(
        tuple(text.strip() for text in captions), sys.intern(label) if label else None, SPLITS[split] if split else None
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file, counted from 1; raises InputError if it is not UTF-8 text."""
    number = 1
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {SUPPORTED}.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} line {number} is not UTF-8 ({error.reason}): save it as UTF-8.") from None


def _conflict(earlier: Annotation, later: Annotation) -> str | None:
    """A label or split in which two annotations differ, in words."""
    for name, first, second in zip(Annotation._fields[1:], earlier[1:], later[1:], strict=True):
        if first and second and first != second:
            return f"{name} {second!r}, which is {first!r}"
    return None


def _merged(earlier: Annotation, later: Annotation) -> Annotation:
    return Annotation(earlier.captions + later.captions, earlier.label or later.label, earlier.split or later.split)


def _by_short_name(names: Iterable[str], shorten: Callable[[str], str]) -> dict[str, str | None]:
    """Short name -> the full name; None if several names have that short name."""
    full_names: dict[str, str | None] = {}
    for name in names:
        short = shorten(name)
        full_names[short] = None if short in full_names else name
    return full_names


def _without_extension(name: str) -> str:
    start, _, extension = name.rpartition(".")
    return start if f".{extension.lower()}" in EXTENSIONS else name


def _stem(name: str) -> str:
    return _without_extension(name.rpartition("/")[2])


def _folder(name: str) -> str:
    return PurePosixPath(name).parent.name


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and (value.isascii() or not LONE_SURROGATE.search(value))
