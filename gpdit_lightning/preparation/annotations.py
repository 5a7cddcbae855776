"""Reading of published annotation files: captions, labels and splits of input files."""

import csv
import json
import re
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, get_args

from gpdit_lightning.data.shard_entry import Split
from gpdit_lightning.errors import InputError
from gpdit_lightning.names import MAX_DIGITS
from gpdit_lightning.path_kinds import SEARCHED_EXTENSIONS, VIDEO_EXTENSIONS
from gpdit_lightning.preparation.imagenet import (
    VALIDATION,
    ImageNetLists,
    is_binary_list,
    is_imagenet_list,
    read_imagenet_list,
)
from gpdit_lightning.regular_files import read_lines
from gpdit_lightning.schema import parse_json

FIELDS = ("source", "caption", "label", "split")
SUPPORTED = (
    "give UCF-101's trainlist, testlist or classInd, MSR-VTT's videodatainfo.json, a list of ImageNet "
    "(synset_words.txt, LOC_val_solution.csv, ILSVRC2012_validation_ground_truth.txt with meta.mat), or JSON lines, "
    "CSV or TSV with "
    f"{', '.join(FIELDS)}"
)
SPLITS: tuple[Split, ...] = get_args(Split)
MSR_VTT_SPLITS: dict[str, Split] = {"train": "train", "validate": "validation", "test": "validation"}

EXTENSIONS = (*VIDEO_EXTENSIONS, *SEARCHED_EXTENSIONS)
FILE = rf"(?P<name>\S.*(?:{'|'.join(map(re.escape, EXTENSIONS))}))"
# The lines of UCF-101's trainlist, testlist and classInd, and the split of the files in each.
UCF101_LISTS: tuple[tuple[re.Pattern[str], Split | None], ...] = (
    (re.compile(rf"{FILE}\s+(?P<number>\d{{1,{MAX_DIGITS}}})", re.IGNORECASE), "train"),
    (re.compile(FILE, re.IGNORECASE), "validation"),
    (re.compile(rf"(?P<number>\d{{1,{MAX_DIGITS}}})\s+(?P<name>\S+)"), None),
)
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")  # may occur in JSON, but UTF-8 cannot encode it


class Annotation(NamedTuple):
    """Captions, label and split of one input file."""

    captions: tuple[str, ...] = ()
    label: str | None = None
    split: Split | None = None


@dataclass(frozen=True)
class Table:
    """Content of one annotation file, with file names as written there."""

    path: Path
    entries: dict[str, Annotation] = field(default_factory=dict)
    classes: set[tuple[int, str]] = field(default_factory=set)
    """Numbers and names of classes; a class is the name of a folder."""
    is_ucf101_list: bool = False

    def get(self, name: str) -> Annotation:
        """Return the annotation of an input file, by its name, else its path without extension, else its stem.

        The extension of the input file may be any, for example that of an unusual container.
        """
        entry = self.entry_of(name)
        return Annotation() if entry is None else self.entries[entry]

    def entry_of(self, name: str) -> str | None:
        """Return the name under which this file contains an input file; None if it does not."""
        if name in self.entries:
            return name
        for path in dict.fromkeys((_without_extension(name), _without_any_extension(name))):
            if entry := self._by_path.get(path) or self._by_stem.get(path.rpartition("/")[2]):
                return entry
        return None

    def add(self, line: int, name: str, annotation: Annotation) -> None:
        """Add the annotation of a line.

        Raises:
            InputError: the annotation contradicts that of an earlier line.
        """
        name = name.removeprefix("./")
        if earlier := self.entries.get(name):
            if conflict := _find_conflict(earlier, annotation):
                attribute, later_value, earlier_value = conflict
                raise InputError(
                    f"{self.path} line {line} has {later_value!r} as {attribute} of {name!r}, but an earlier line has "
                    f"{earlier_value!r}: remove one of them."
                )
            annotation = _merge(earlier, annotation)
        self.entries[name] = annotation

    # Built only if a full name is not found: a table of millions of full names then needs no second dictionary.
    @cached_property
    def _by_path(self) -> dict[str, str | None]:
        return _by_short_name(self.entries, _without_extension)

    @cached_property
    def _by_stem(self) -> dict[str, str | None]:
        return _by_short_name(self.entries, _stem)


@dataclass(frozen=True)
class Annotations:
    """Content of several annotation files."""

    tables: tuple[Table, ...] = ()
    labels: tuple[str, ...] = ()
    """Names of all classes in the order of their numbers in UCF-101's lists, or of ImageNet's sorted synsets; empty
    without such a list."""

    def get(self, name: str) -> Annotation:
        """Return the annotation of an input file; an empty one if no annotation file contains it.

        Args:
            name: path of the input file relative to its folder, with slashes. An annotation file may contain the full
                name, the name without extension, or the stem alone if only one of its entries has that stem.

        Raises:
            InputError: two annotation files have different labels or splits for this file.
        """
        merged = Annotation()
        for i, table in enumerate(self.tables):
            annotation = table.get(name)
            if conflict := _find_conflict(merged, annotation):
                attribute, value, earlier_value = conflict
                other = next(other.path for other in self.tables[:i] if _find_conflict(other.get(name), annotation))
                raise InputError(
                    f"{table.path} has {value!r} as {attribute} of {name!r}, but {other} has {earlier_value!r}: "
                    "correct or omit one of them."
                )
            merged = _merge(merged, annotation)
        return merged

    def unused(self, names: Collection[str]) -> list[Path]:
        """Return the annotation files that list files, but none of these."""
        listing = [table for table in self.tables if table.entries]
        return [table.path for table in listing if all(table.entry_of(name) is None for name in names)]


def read_annotations(paths: Sequence[Path]) -> Annotations:
    """Read annotation files. The format is detected from the content:

    - UCF-101's lists: a list with class numbers is for training, a list without them for validation, and classInd.txt
      contains the class names. The label of a file is the name of its folder, if any list has a class number for it.
    - MSR-VTT's `videodatainfo.json`: captions in the order of `sen_id`, and splits ("validate" and "test" are both
      validation). Categories are ignored: they are numbers without names, and topics rather than classes.
    - ImageNet's lists (`imagenet.py`): classes, and the classes of its validation images.
    - JSON lines, CSV and TSV with the fields `FIELDS`, of which only "source" is required. Several captions are given
      as a list or on several lines.

    Raises:
        InputError: a file is missing, has none of these formats or contradicts itself, or class numbers differ.
    """
    imagenet = ImageNetLists()
    tables = tuple(table for path in paths if (table := _read_table(path, imagenet)) is not None)
    if imagenet.files:
        tables = (*tables, _imagenet_table(imagenet))
    classes = sorted({pair for table in tables for pair in table.classes})
    by_number, by_name = dict[int, str](), dict[str, int]()
    for number, name in classes:
        other, other_number = by_number.setdefault(number, name), by_name.setdefault(name, number)
        if other != name or other_number != number:
            raise InputError(
                f"the class numbers in {', '.join(map(str, paths))} differ ({other_number} {other}, {number} {name}): "
                "give lists of one data set."
            )
    labels = tuple(name for _, name in classes)
    for table in tables:
        if table.is_ucf101_list:
            _label_by_folder(table, set(labels))
    return Annotations(tables, labels)


def _imagenet_table(lists: ImageNetLists) -> Table:
    """Return the content of ImageNet's lists as one table."""
    table = Table(lists.files[0], classes=set(enumerate(lists.classes())))
    for image, synset in lists.labels_of_images().items():
        table.entries[image] = Annotation((), synset, "validation" if image.startswith(VALIDATION) else "train")
    return table


def _read_table(path: Path, imagenet: ImageNetLists) -> Table | None:
    """Read an annotation file in the format of its first line that is not empty.

    Args:
        path: the file.
        imagenet: receives the content of a list of ImageNet, for which the result is None.
    """
    is_text = not is_binary_list(path)
    first = next((line.strip() for _, line in _read_lines(path) if line.strip()), "") if is_text else ""
    if is_imagenet_list(path, first):
        read_imagenet_list(path, _read_lines(path) if is_text else (), imagenet)
        return None
    if first.startswith("{"):
        return _read_msr_vtt(path) if _begins_msr_vtt(first) else _build_table(path, _read_json_lines(path))
    delimiter = "\t" if "\t" in first else ","
    if "source" in (cell.strip('"') for cell in first.split(delimiter)):
        return _build_table(path, _read_csv(path, delimiter))
    for pattern, split in UCF101_LISTS:
        if pattern.fullmatch(first):
            return _read_ucf101_list(path, pattern, split)
    raise InputError(f"{path} begins with {first[:80]!r}, which is not a supported format: {SUPPORTED}.")


def _read_ucf101_list(path: Path, pattern: re.Pattern[str], split: Split | None) -> Table:
    table = Table(path, is_ucf101_list=True)
    for number, line in _read_lines(path):
        if not line.strip() or line.startswith("#"):
            continue
        match = pattern.fullmatch(line.strip())
        if not match:
            raise InputError(
                f"{path} line {number} is {line.strip()[:80]!r}, which has another format than the lines before: "
                f"{SUPPORTED}."
            )
        values = match.groupdict()
        if split:
            table.add(number, values["name"], Annotation(split=split))
        label = _folder(values["name"]) if split else values["name"]
        if label and "number" in values:
            table.classes.add((int(values["number"]), label))
    return table


def _label_by_folder(table: Table, classes: set[str]) -> None:
    """Label each entry with the name of its folder, if that is a class."""
    for name, annotation in table.entries.items():
        if _folder(name) in classes:
            table.entries[name] = annotation._replace(label=_folder(name))


def _read_msr_vtt(path: Path) -> Table:
    text = "".join(line for _, line in _read_lines(path))
    captions: dict[str, list[str]] = defaultdict(list)
    try:
        content = parse_json(text.encode(), str(path), SUPPORTED)
        splits = {_text_of(video, "video_id"): MSR_VTT_SPLITS[video["split"]] for video in content["videos"]}
        for sentence in sorted(content["sentences"], key=lambda sentence: sentence["sen_id"]):
            captions[_text_of(sentence, "video_id")].append(_text_of(sentence, "caption").strip())
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path} does not have the fields of MSR-VTT's videodatainfo.json ({error}): {SUPPORTED}."
        ) from None
    names = dict.fromkeys([*splits, *captions])
    return Table(path, {name: Annotation(tuple(captions[name]), split=splits.get(name)) for name in names})


def _text_of(row: Mapping[str, Any], name: str) -> str:
    """Return a field that has to be a text; raises KeyError or TypeError if it is none."""
    if not _is_text(row[name]):
        raise TypeError(f"the {name} {row[name]!r}")
    return str(row[name])


def _begins_msr_vtt(line: str) -> bool:
    """Return whether a first line is the beginning, or the whole, of one JSON document, and not a JSON line."""
    try:
        return "videos" in json.loads(line)
    except (ValueError, RecursionError):
        return True


def _build_table(path: Path, rows: Iterable[tuple[int, dict[str, Any]]]) -> Table:
    table = Table(path)
    for line, values in rows:
        table.add(line, *_parse_row(path, line, values))
    return table


def _read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the object of each line of a JSON lines file."""
    for number, line in _read_lines(path):
        if not line.strip() or line.startswith("#"):
            continue
        values = parse_json(line.encode(), f"{path} line {number}", "correct or remove it")
        if not isinstance(values, dict):
            raise InputError(f"{path} line {number} is not a JSON object: correct or remove it.")
        yield number, values


def _read_csv(path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the cells of each row of a CSV or TSV file below its header, without empty cells."""
    line_number = 0

    def lines() -> Iterator[str]:
        nonlocal line_number
        for line_number, line in _read_lines(path):  # noqa: B007
            yield line

    # Without `strict` an unclosed quote would silently join all lines up to the next quote to one cell.
    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
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
                yield line_number, {name: cell for name, cell in zip(header, row, strict=True) if cell.strip()}
    except csv.Error as error:
        raise InputError(f"{path} line {line_number} is not a row of the table ({error}): correct it.") from None


def _parse_row(path: Path, line: int, values: dict[str, Any]) -> tuple[str, Annotation]:
    """Return the name of the input file in a row, and its annotation; raises InputError for an invalid field."""

    def invalid(name: str, expected: str) -> InputError:
        return InputError(
            f"{path} line {line} has {values.get(name)!r} as {name}, which must be {expected}: correct it."
        )

    for name in values:
        if name not in FIELDS:
            raise InputError(f"{path} line {line} has the unknown field {name!r}: give only {', '.join(FIELDS)}.")
    # Only null and an empty text mean that a field is missing: 0 and false are values of another type.
    source, caption, label, split = (None if values.get(name) == "" else values.get(name) for name in FIELDS)
    captions = caption if isinstance(caption, list) else [] if caption is None else [caption]
    if not isinstance(source, str) or not _is_text(source):
        raise invalid("source", "the path of an input file")
    if not all(_is_text(text) for text in captions):
        raise invalid("caption", "a string or a list of strings")
    if label is not None and not _is_text(label):
        raise invalid("label", "a string")
    if split is not None and split not in SPLITS:
        raise invalid("split", " or ".join(SPLITS))
    return source, Annotation(tuple(text.strip() for text in captions), sys.intern(label) if label else None, split)


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the numbers from 1 and the lines of a file, without the comments (lines that begin with "#") at its head.

    Later lines may be rows of a table whose first cell begins with "#".
    """
    first = True
    for number, line in read_lines(path, SUPPORTED):
        first = first and (not line.strip() or line.startswith("#"))
        if not first:
            yield number, line


def _find_conflict(earlier: Annotation, later: Annotation) -> tuple[str, str, str] | None:
    """Return "label" or "split", the later and the earlier value, if two annotations differ in it."""
    for name, first, second in zip(Annotation._fields[1:], earlier[1:], later[1:], strict=True):
        if first and second and first != second:
            return name, second, first
    return None


def _merge(earlier: Annotation, later: Annotation) -> Annotation:
    return Annotation(earlier.captions + later.captions, earlier.label or later.label, earlier.split or later.split)


def _by_short_name(names: Iterable[str], shorten: Callable[[str], str]) -> dict[str, str | None]:
    """Return a dictionary from short name to full name, with None where several full names have one short name."""
    full_names: dict[str, str | None] = {}
    for name in names:
        short = shorten(name)
        full_names[short] = None if short in full_names else name
    return full_names


def _without_extension(name: str) -> str:
    """Return a name without an extension of videos or images, in Unicode form NFC, since systems use several forms."""
    start, _, extension = name.rpartition(".")
    return unicodedata.normalize("NFC", start if f".{extension.lower()}" in EXTENSIONS else name)


def _without_any_extension(name: str) -> str:
    return unicodedata.normalize("NFC", PurePosixPath(name).with_suffix("").as_posix())


def _stem(name: str) -> str:
    return _without_extension(name).rpartition("/")[2]


def _folder(name: str) -> str:
    return PurePosixPath(name).parent.name


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and (value.isascii() or not LONE_SURROGATE.search(value))
