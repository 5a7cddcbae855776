"""Videos with their classes, in a half that trains a classifier and a half that tests it."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from gpdit_lightning.errors import InputError

log = logging.getLogger(__name__)

Split = Literal["train", "test"]

UCF_NAME = r"(v_(.+)_g(\d+))_c\d+"
# UCF-101's published splits: the groups of every class that testlist01 to testlist03 hold out; the rest trains.
UCF_TEST_GROUPS = {1: range(1, 8), 2: range(8, 15), 3: range(15, 22)}


class LabelledVideo(NamedTuple):
    """A video with its class and half; those of one group, of one recording or person, are not independent."""

    path: Path
    label: str
    group: str
    split: Split


def split_by_ucf_groups(videos: Iterable[Path], split: int) -> list[LabelledVideo]:
    """UCF-101's published split 1, 2 or 3, from the names `v_CLASS_gGROUP_cCLIP.avi` alone.

    Raises:
        InputError: a name of another form, two videos of one name, or as :func:`check_splits`.
    """
    found = []
    for path in _by_key(videos).values():
        name = re.fullmatch(UCF_NAME, path.stem)
        if name is None:
            raise InputError(
                f"{path} is not named v_CLASS_gGROUP_cCLIP as UCF-101's videos are: list the two halves in files, or "
                "put videos in folders train/CLASS and test/CLASS."
            )
        tested = int(name[3]) in UCF_TEST_GROUPS[split]
        found.append(LabelledVideo(path, name[2], name[1], "test" if tested else "train"))
    check_splits(found)
    return found


def split_by_lists(
    videos: Iterable[Path], train_list: Path, test_list: Path, group_pattern: str = UCF_NAME
) -> list[LabelledVideo]:
    """The halves that two files list as UCF-101's do: a line `CLASS/FILE`, with or without a number behind it.

    Videos that no list names are not used; those that are listed and not there are left out with a warning.

    Args:
        videos: each in a folder of its class.
        train_list, test_list: the files.
        group_pattern: as for :func:`split_by_folders`.

    Raises:
        InputError: a list that cannot be read or names nothing that is there, a video listed twice, two
            of one name, a file name without a group, or as :func:`check_splits`.
    """
    there = _by_key(videos)
    found: dict[str, LabelledVideo] = {}
    halves: tuple[tuple[Split, Path], ...] = (("train", train_list), ("test", test_list))
    for split, file in halves:
        names = _listed(file)
        present = [name for name in names if _key(name) in there]
        if not present:
            raise InputError(f"{file} lists {len(names)} videos, and none of them is there: give the lists of these.")
        if len(present) < len(names):
            absent = next(name for name in names if _key(name) not in there)
            log.warning(
                "warning: %d of %d videos in %s are not there, as %s",
                len(names) - len(present),
                len(names),
                file,
                absent,
            )
        for name in present:
            key = _key(name)
            if key in found:
                raise InputError(f"{name} is listed twice in {train_list} and {test_list}: list it once.")
            found[key] = LabelledVideo(there[key], name.parent.name, _group(there[key], group_pattern), split)
    check_splits(found.values())
    return list(found.values())


def split_by_folders(videos: Iterable[Path], group_pattern: str = UCF_NAME) -> list[LabelledVideo]:
    """Videos that lie in folders `train/CLASS` and `test/CLASS`.

    Args:
        videos: those.
        group_pattern: a regular expression to be found in a file's name without its ending. The group is what its
            first parentheses hold, or else all that it matches; `.+` makes each video a group of its own.

    Raises:
        InputError: a video that lies elsewhere, a file name without a group, or as :func:`check_splits`.
    """
    found = []
    for path in videos:
        half, label = path.parent.parent.name, path.parent.name
        if half not in ("train", "test"):
            raise InputError(f"{path} lies in no folder train/CLASS or test/CLASS: put it into one.")
        found.append(LabelledVideo(path, label, _group(path, group_pattern), "train" if half == "train" else "test"))
    check_splits(found)
    return found


def check_splits(videos: Iterable[LabelledVideo]) -> None:
    """Check that one half can teach what the other asks, and shares nothing with it.

    Raises:
        InputError: fewer than two classes to learn or groups to test on, a class that is only tested, a group in both.
    """
    labels: dict[Split, set[str]] = {"train": set(), "test": set()}
    groups: dict[Split, set[str]] = {"train": set(), "test": set()}
    for video in videos:
        labels[video.split].add(video.label)
        groups[video.split].add(video.group)
    if len(labels["train"]) < 2:
        raise InputError(
            f"The training half holds {len(labels['train'])} classes, where a classifier needs two: give more videos."
        )
    if len(groups["test"]) < 2:
        raise InputError(
            f"The test half holds {len(groups['test'])} groups, where an interval needs two: give more videos, or "
            "another split of them."
        )
    if unknown := labels["test"] - labels["train"]:
        raise InputError(
            f"Class {min(unknown)!r} is in the test half only: give training videos of it, or leave it out."
        )
    if shared := groups["train"] & groups["test"]:
        raise InputError(f"Group {min(shared)!r} is in both halves, which eases the test: hold out whole groups.")


def _listed(file: Path) -> list[Path]:
    """The names in a list."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise InputError(f"{file} is no readable list ({error}): give a text file with lines CLASS/FILE.") from None
    return [Path(re.sub(r"\s+\d+$", "", line.strip())) for line in lines if line.strip()]


def _by_key(videos: Iterable[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in videos:
        if found.setdefault(_key(path), path) != path:
            raise InputError(f"{found[_key(path)]} and {path} have one name: leave one out.")
    return found


def _key(path: Path) -> str:
    """By what a listed name and a file are the same; UCF-101 writes HandstandPushups in two ways."""
    return f"{path.parent.name}/{path.name}".casefold()


def _group(path: Path, pattern: str) -> str:
    try:
        found = re.search(pattern, path.stem)
    except re.error as error:
        raise InputError(f"--group_pattern {pattern!r} is no regular expression ({error}): correct it.") from None
    if found is None:
        raise InputError(
            f"The name of {path} does not match the pattern {pattern!r} of groups: give another --group_pattern, or "
            "'.+' where videos are independent."
        )
    return found[1] if found.re.groups else found[0]
