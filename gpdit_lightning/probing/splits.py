"""Videos with their classes, divided into training and test videos of a classifier."""

import hashlib
import logging
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from gpdit_lightning.errors import InputError
from gpdit_lightning.names import as_text
from gpdit_lightning.regular_files import read_lines

log = logging.getLogger(__name__)

Split = Literal["train", "test"]

UCF_NAME = r"(v_(.+)_g(\d+))_c\d+"
# Test groups of every class in the published splits of UCF-101, testlist01 to testlist03.
UCF_TEST_GROUPS = {1: range(1, 8), 2: range(8, 15), 3: range(15, 22)}


class LabelledVideo(NamedTuple):
    """A video with its class and split. Videos of the same group (one recording, one person) are dependent."""

    path: Path
    label: str
    group: str
    split: Split


class SplitRule(NamedTuple):
    """How videos were divided, for the messages of :func:`check_splits`."""

    reason: str
    """In parentheses; may be empty."""
    to_train: str
    """How to get training videos."""
    to_test: str
    """How to get test videos."""
    to_classes: str = "add training videos of another class"
    """How to get classes."""


UNKNOWN_RULE = SplitRule("", "add training videos", "add test videos")
CLASSES_RULE = SplitRule(
    " (a class needs three groups for a test video)",
    "add videos to each class",
    "add videos to the folder of each class",
    "give a folder with a folder of videos for each class",
)
FOLDERS_RULE = SplitRule("", "add folders train/CLASS with videos", "add folders test/CLASS with videos")


def split_by_ucf_groups(videos: Iterable[Path], split: int) -> list[LabelledVideo]:
    """Divide videos by the published split 1, 2 or 3 of UCF-101, by the file names `v_CLASS_gGROUP_cCLIP.avi`.

    Raises:
        InputError: a file name has another form, or two videos have the same name; also as :func:`check_splits`.
    """
    labelled = []
    for path in _by_name(videos).values():
        name = re.fullmatch(UCF_NAME, path.stem)
        if name is None:
            raise InputError(
                f"{path} is not named v_CLASS_gGROUP_cCLIP like the videos of UCF-101: give --split classes for videos "
                "in folders of their classes, --split folders for train/CLASS and test/CLASS, or --train_list and "
                "--test_list."
            )
        is_test = int(name[3]) in UCF_TEST_GROUPS[split]
        labelled.append(LabelledVideo(path, as_text(name[2]), as_text(name[1]), "test" if is_test else "train"))
    tested = UCF_TEST_GROUPS[split]
    reason = f" (UCF-101's split {split} tests on the groups g{tested[0]:02d} to g{tested[-1]:02d})"
    others = ", or give --split classes for videos in folders of their classes"
    check_splits(
        labelled, SplitRule(reason, f"add videos of other groups{others}", f"add videos of these groups{others}")
    )
    return labelled


def fitting_split(videos: Sequence[Path]) -> Literal[1, "folders", "classes"]:
    """Return the first kind of split that the names of all videos fit; see the option `split` of `probe`."""
    if all(re.fullmatch(UCF_NAME, path.stem) for path in videos):
        return 1
    return "folders" if all(path.parent.parent.name in ("train", "test") for path in videos) else "classes"


def split_by_hash(videos: Iterable[Path], group_pattern: str | None = None) -> list[LabelledVideo]:
    """Divide videos in folders of their classes: a quarter of the groups of each class are test videos.

    The groups are selected by a hash of their names, so the split is the same on every machine. At least one group of a
    class is selected, and at least two are not, for cross-validation.

    Args:
        videos: paths CLASS/FILE.
        group_pattern: as for :func:`split_by_folders`.

    Raises:
        InputError: two videos have the same name, or a file name has no group; also as :func:`check_splits`.
    """
    paths = _by_name(videos).values()
    by_group: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        by_group[_group(path, group_pattern, _name(path))].append(path)
    labels = {group: {as_text(path.parent.name) for path in members} for group, members in by_group.items()}
    total = Counter(label for of_group in labels.values() for label in of_group)
    tested: Counter[str] = Counter()
    test_groups = set()
    for group in sorted(labels, key=lambda group: hashlib.sha256(group.encode()).digest()):
        if all(tested[label] < min(max(1, total[label] // 4), total[label] - 2) for label in labels[group]):
            tested.update(labels[group])
            test_groups.add(group)
    labelled = [
        LabelledVideo(path, as_text(path.parent.name), group, "test" if group in test_groups else "train")
        for group, members in by_group.items()
        for path in members
    ]
    check_splits(labelled, CLASSES_RULE)
    return labelled


def split_by_lists(
    videos: Iterable[Path], train_list: Path, test_list: Path, group_pattern: str | None = None
) -> list[LabelledVideo]:
    """Divide videos by two list files in the format of UCF-101: lines `CLASS/FILE`, optionally with a class number.

    Videos that are not listed are not used. Listed videos that do not exist are left out with a warning.

    Args:
        videos: paths CLASS/FILE.
        train_list, test_list: list files.
        group_pattern: as for :func:`split_by_folders`.

    Raises:
        InputError: a list cannot be read or lists none of the videos, a video is listed twice, two videos have the same
            name, or a file name has no group; also as :func:`check_splits`.
    """
    paths = _by_name(videos)
    by_folded_name = _unique_by_folded_name(paths)
    labelled: dict[str, LabelledVideo] = {}
    lists: tuple[tuple[Split, Path], ...] = (("train", train_list), ("test", test_list))
    for split, file in lists:
        names = [(name, _find(_name(name), paths, by_folded_name)) for name in _read_list(file)]
        missing = [name for name, found in names if found is None]
        if len(missing) == len(names):
            raise InputError(f"{file} lists {len(names)} videos, but --videos has none of them: give those videos.")
        if missing:
            log.warning("warning: %d of %d videos in %s do not exist: %s", len(missing), len(names), file, missing[0])
        for name, found in names:
            if found in labelled:
                raise InputError(f"{name} is listed twice in {train_list} and {test_list}: list it once.")
            if found is not None:
                group = _group(paths[found], group_pattern, found)
                labelled[found] = LabelledVideo(paths[found], name.parent.name, group, split)
    check_splits(labelled.values())
    return list(labelled.values())


def split_by_folders(videos: Iterable[Path], group_pattern: str | None = None) -> list[LabelledVideo]:
    """Divide videos by the folders `train/CLASS` and `test/CLASS` that contain them.

    Args:
        videos: paths.
        group_pattern: regular expression, searched in the file name without suffix. The group of a video is the match
            of the first parentheses, or the whole match if there are none. None: `UCF_NAME`; each video with another
            name is a group.

    Raises:
        InputError: a video is in another folder, or a file name has no group; also as :func:`check_splits`.
    """
    labelled = []
    for path in videos:
        split, label = path.parent.parent.name, as_text(path.parent.name)
        if split not in ("train", "test"):
            raise InputError(f"{path} is not in a folder train/CLASS or test/CLASS: move it into one.")
        group = _group(path, group_pattern, f"{split}/{_name(path)}")
        labelled.append(LabelledVideo(path, label, group, "train" if split == "train" else "test"))
    check_splits(labelled, FOLDERS_RULE)
    return labelled


def check_splits(videos: Iterable[LabelledVideo], rule: SplitRule = UNKNOWN_RULE) -> None:
    """Check that a classifier can be trained and tested.

    Args:
        videos: the videos.
        rule: how they were divided, for the messages.

    Raises:
        InputError: there are no training or no test videos, fewer than two training classes or test groups, a test
            class has no training videos, or a group is in both splits.
    """
    by_split: dict[Split, list[LabelledVideo]] = {"train": [], "test": []}
    for video in videos:
        by_split[video.split].append(video)
    train, test = by_split["train"], by_split["test"]
    if not train and not test:
        raise InputError("there are no videos to train and test a classifier on: give some.")
    if not train:
        raise InputError(
            f"all videos ({len(test)}) are test videos{rule.reason}, and none are left to train on: {rule.to_train}."
        )
    if not test:
        raise InputError(
            f"all videos ({len(train)}) are training videos{rule.reason}, and none are left to test on: {rule.to_test}."
        )
    classes = {video.label for video in train}
    unknown = {video.label for video in test} - classes
    if len(classes) < 2:
        others = f" ({min(unknown)!r} has test videos only)" if unknown else ""
        raise InputError(
            f"all training videos ({len(train)}) are of the class {min(classes)!r}{others}, but a classifier needs two "
            f"classes: {rule.to_classes}."
        )
    if unknown:
        raise InputError(f"class {min(unknown)!r} has test videos only: give training videos of it, or leave it out.")
    groups = {video.group for video in test}
    if shared := {video.group for video in train} & groups:
        raise InputError(f"group {min(shared)!r} has training and test videos: put whole groups into one split.")
    if len(groups) < 2:
        raise InputError(
            f"all test videos ({len(test)}) are of the group {min(groups)!r}, but a confidence interval needs two "
            "groups: add test videos of another group, or give another --group_pattern or split."
        )


def _read_list(file: Path) -> list[Path]:
    """Return the names in a list, without class numbers, empty lines and comments (lines that begin with "#")."""
    lines = [line.strip() for _, line in read_lines(file, "give a text file with lines CLASS/FILE")]
    return [Path(re.sub(r"\s+\d+$", "", line)) for line in lines if line and not line.startswith("#")]


def _by_name(videos: Iterable[Path]) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for path in videos:
        if paths.setdefault(_name(path), path) != path:
            raise InputError(f"{paths[_name(path)]} and {path} have the same name: leave one out.")
    return paths


def _name(path: Path) -> str:
    """Return the name of a video in lists and folders."""
    return as_text(f"{path.parent.name}/{path.name}")


def _find(name: str, names: Container[str], by_folded_name: Mapping[str, str]) -> str | None:
    """Return the name of a listed video as it is spelled in `names`; None if there is no such video."""
    return name if name in names else by_folded_name.get(_folded(name))


def _unique_by_folded_name(names: Iterable[str]) -> dict[str, str]:
    """Return a dictionary from folded name to name, without those that several names share."""
    by_folded_name: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_folded_name[_folded(name)].append(name)
    return {folded: same[0] for folded, same in by_folded_name.items() if len(same) == 1}


def _folded(name: str) -> str:
    """Return a name without case (UCF-101 spells HandstandPushups in two ways), in Unicode form NFC."""
    return unicodedata.normalize("NFC", name).casefold()


def _group(path: Path, pattern: str | None, name: str) -> str:
    """Return the group of a video; without a pattern, its `name` if the name of the file is not that of UCF-101."""
    if pattern is None:
        ucf = re.search(UCF_NAME, path.stem)
        return as_text(ucf[1]) if ucf else name
    try:
        match = re.search(pattern, path.stem)
    except re.error as error:
        raise InputError(f"--group_pattern {pattern!r} is not a regular expression ({error}): correct it.") from None
    if match is None:
        raise InputError(
            f"the name of {path} does not match the group pattern {pattern!r}: give another --group_pattern, or '.+' "
            "if the videos are independent."
        )
    return as_text(match[1] if match.re.groups else match[0])
