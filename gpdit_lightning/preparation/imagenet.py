"""Reading of the published lists of ImageNet (ILSVRC2012): its classes, and the classes of its validation images.

A class is a synset, such as n01440764. Its index is its position among all sorted synsets, as in torchvision's
`ImageFolder` and DiT, whatever the order of a list. The numbers of the development kit have another order.
"""

import io
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from gpdit_lightning.errors import InputError
from gpdit_lightning.names import MAX_DIGITS
from gpdit_lightning.regular_files import BoundedReader

SYNSET = r"n\d{8}"
NUMBER = rf"(?P<number>\d{{1,{MAX_DIGITS}}})"
VALIDATION = "ILSVRC2012_val_"
IMAGE = rf"(?P<image>{VALIDATION}\d{{8}})(?:\.JPEG)?"
KAGGLE_HEADER = "ImageId,PredictionString"
KIT_SUFFIXES = (".tar.gz", ".tgz")
GROUND_TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
MAX_KIT_BYTES = 2**26  # of an unpacked file
KITS_NUMBERS = "meta.mat of the development kit, map_clsloc.txt or ILSVRC2012_mapping.txt"


@dataclass
class ImageNetLists:
    """Content of several lists."""

    synsets: set[str] = field(default_factory=set)
    kit_numbers: dict[int, str] = field(default_factory=dict)
    """Synsets by their number in the development kit, from 1."""
    labels: dict[str, str] = field(default_factory=dict)
    """Synsets by the image's name without extension."""
    kit_labels: dict[str, int] = field(default_factory=dict)
    """Numbers of the development kit by the image's name."""
    indices: dict[str, int] = field(default_factory=dict)
    """Positions among the sorted synsets, from 0, by the image's name."""
    files: list[Path] = field(default_factory=list)

    def classes(self) -> list[str]:
        """Return all synsets in the order of their indices."""
        return sorted(self.synsets | set(self.kit_numbers.values()) | set(self.labels.values()))

    def labels_of_images(self) -> dict[str, str]:
        """Return the synset of every listed image.

        Raises:
            InputError: numbers are given without a list that defines them, or out of its range.
        """
        labels, numbered = dict(self.labels), dict(enumerate(sorted({*self.synsets, *self.kit_numbers.values()})))
        for images, synsets, lists in (
            (self.kit_labels, self.kit_numbers, KITS_NUMBERS),
            (self.indices, numbered, "synset_words.txt or LOC_synset_mapping.txt"),
        ):
            for image, number in images.items():
                if number not in synsets:
                    raise InputError(
                        f"{', '.join(map(str, self.files))}: the class number {number} of {image} is not defined: give "
                        f"the list of classes too, {lists}."
                    )
                labels[image] = synsets[number]
        return labels


Lines = Sequence[tuple[int, str]]
Add = Callable[[ImageNetLists, int, re.Match[str]], None]


def _add_class(lists: ImageNetLists, line: int, match: re.Match[str]) -> None:
    lists.synsets.add(match["synset"])


def _add_kit_number(lists: ImageNetLists, line: int, match: re.Match[str]) -> None:
    lists.kit_numbers[int(match["number"])] = match["synset"]


def _add_kit_label(lists: ImageNetLists, line: int, match: re.Match[str]) -> None:
    lists.kit_labels[f"{VALIDATION}{line:08d}"] = int(match["number"])


def _add_index(lists: ImageNetLists, line: int, match: re.Match[str]) -> None:
    lists.indices[match["image"]] = int(match["number"])


def _add_label(lists: ImageNetLists, line: int, match: re.Match[str]) -> None:
    lists.labels[match["image"]] = match["synset"]


# The forms of a line; a list has one of them in all lines.
FORMS: tuple[tuple[re.Pattern[str], Add], ...] = (
    (re.compile(rf"(?P<synset>{SYNSET})\s+{NUMBER}\s+\S+"), _add_kit_number),  # map_clsloc.txt
    (re.compile(rf"{NUMBER}\s+(?P<synset>{SYNSET})"), _add_kit_number),  # ILSVRC2012_mapping.txt
    (re.compile(NUMBER), _add_kit_label),  # ILSVRC2012_validation_ground_truth.txt
    (re.compile(rf"{IMAGE}\s+{NUMBER}"), _add_index),  # val.txt of Caffe
    (re.compile(rf"{IMAGE}[\s,]+(?P<synset>{SYNSET})(?:\s.*)?"), _add_label),
    (re.compile(rf"(?P<synset>{SYNSET})(?:\s.*)?"), _add_class),  # synset_words.txt, LOC_synset_mapping.txt
)
KAGGLE_ROW = re.compile(rf"(?P<image>[^,]+),(?P<synset>{SYNSET})(?:\s.*)?")


def is_binary_list(path: Path) -> bool:
    """Return whether a file is `meta.mat` or the packed development kit, by its name."""
    return path.name.lower().endswith((".mat", *KIT_SUFFIXES))


def is_imagenet_list(path: Path, first_line: str) -> bool:
    """Return whether a file is a list of ImageNet, by its name or its first line that is not empty."""
    return is_binary_list(path) or first_line == KAGGLE_HEADER or any(form.fullmatch(first_line) for form, _ in FORMS)


def read_imagenet_list(path: Path, lines: Iterable[tuple[int, str]], lists: ImageNetLists) -> None:
    """Read one list.

    Args:
        path: the file.
        lines: its lines and their numbers; not used for a binary file.
        lists: receives the content.

    Raises:
        InputError: the file cannot be read, or a line has another form than the lines before.
    """
    lists.files.append(path)
    if path.name.lower().endswith(KIT_SUFFIXES):
        _read_kit(path, lists)
        return
    if is_binary_list(path):
        with BoundedReader(path) as file:
            lists.kit_numbers |= _read_meta(file, path)
        return
    texts = [(number, line.strip()) for number, line in lines if line.strip()]
    if texts[0][1] == KAGGLE_HEADER:
        forms: tuple[tuple[re.Pattern[str], Add], ...] = ((KAGGLE_ROW, _add_label),)
        texts = texts[1:]
    else:
        forms = FORMS
    matching = [(form, add) for form, add in forms if all(form.fullmatch(text) for _, text in texts)]
    if not matching:
        likely = next((form for form, _ in forms if texts and form.fullmatch(texts[0][1])), KAGGLE_ROW)
        number, text = next((number, text) for number, text in texts if not likely.fullmatch(text))
        raise InputError(
            f"{path} line {number} is {text[:80]!r}, which has another form than the lines before: correct or remove "
            "it."
        )
    form, add = matching[0]
    synsets = [text for _, text in texts]
    if add is _add_class and len(set(synsets)) < len(synsets):  # imagenet_2012_validation_synset_labels.txt
        lists.labels |= {f"{VALIDATION}{i:08d}": text.split()[0] for i, text in enumerate(synsets, start=1)}
        return
    for i, (_, text) in enumerate(texts, start=1):
        match = form.fullmatch(text)
        assert match is not None
        add(lists, i, match)


def _read_kit(path: Path, lists: ImageNetLists) -> None:
    """Read the two lists in the packed development kit, ILSVRC2012_devkit_t12.tar.gz."""
    contents: dict[str, bytes] = {}
    try:
        with BoundedReader(path) as file, tarfile.open(fileobj=file, mode="r:gz") as tar:
            for info in tar:
                name = info.name.rpartition("/")[2]
                if name in (GROUND_TRUTH, META) and info.isreg() and info.size <= MAX_KIT_BYTES:
                    member = tar.extractfile(info)
                    assert member is not None
                    contents[name] = member.read()
        lines = contents[GROUND_TRUTH].decode().splitlines()
        meta = contents[META]
    except InputError:
        raise
    except Exception as error:  # for many kinds of damage tarfile raises arbitrary exceptions
        raise InputError(
            f"{path} is not ImageNet's development kit ({type(error).__name__}: {error}): give "
            f"ILSVRC2012_devkit_t12.tar.gz, or its files {GROUND_TRUTH} and {META}."
        ) from None
    lists.kit_numbers |= _read_meta(io.BytesIO(meta), path)
    read_imagenet_list(path.with_name(GROUND_TRUTH), list(enumerate(lines, start=1)), lists)


def _read_meta(file: BinaryIO, path: Path) -> dict[int, str]:
    """Return the synsets of the classes in the development kit's `meta.mat`, which has their parents too.

    Args:
        file: the file.
        path: its path for messages.
    """
    from scipy.io import loadmat

    try:
        rows: list[dict[str, Any]] = loadmat(file, simplify_cells=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows if int(row.get("num_children", 0)) == 0}
    except Exception as error:  # for a file of another format scipy raises arbitrary exceptions
        raise InputError(
            f"{path} is not meta.mat of ImageNet's development kit ({type(error).__name__}: {error}): give its file "
            "data/meta.mat."
        ) from None
