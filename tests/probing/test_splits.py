"""Division of videos into training and test videos of a probe."""

import logging
from collections import Counter
from pathlib import Path

import pytest

from gpdit_lightning.errors import InputError
from gpdit_lightning.probing import splits
from gpdit_lightning.probing.splits import (
    LabelledVideo,
    check_splits,
    fitting_split,
    split_by_folders,
    split_by_hash,
    split_by_lists,
    split_by_ucf_groups,
)

CLASSES = ("Archery", "HandStandPushups")
VIDEOS = [
    Path(f"ucf/{label}/v_{label}_g{group:02d}_c{clip:02d}.avi")
    for label in CLASSES
    for group in range(1, 26)
    for clip in (1, 2)
]


def groups_of(videos: list[LabelledVideo], split: str) -> set[str]:
    return {video.group for video in videos if video.split == split}


@pytest.mark.parametrize(("split", "first", "last"), [(1, 1, 7), (2, 8, 14), (3, 15, 21)])
def test_ucf_101_tests_on_seven_groups_of_each_class(split: int, first: int, last: int) -> None:
    labelled = split_by_ucf_groups(VIDEOS, split)
    assert [video.path for video in labelled] == VIDEOS
    assert {video.label for video in labelled} == set(CLASSES)
    expected = {f"v_{label}_g{group:02d}" for label in CLASSES for group in range(first, last + 1)}
    assert groups_of(labelled, "test") == expected
    assert len(groups_of(labelled, "train")) == 2 * 18


def test_lists_give_the_published_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    by_name = split_by_ucf_groups(VIDEOS, 1)
    folder = {"HandStandPushups": "HandstandPushups"}  # the spelling of the published lists
    lines = {"train": ["HandstandPushups/v_HandStandPushups_g09_c07.avi 2"], "test": []}
    for video in by_name:
        number = f" {CLASSES.index(video.label) + 1}" if video.split == "train" else ""
        lines[video.split].append(f"{folder.get(video.label, video.label)}/{video.path.name}{number}\r\n")
    for split, names in lines.items():
        (tmp_path / split).write_text("\n".join(names))
    with caplog.at_level(logging.WARNING, logger=splits.log.name):
        by_list = split_by_lists([*VIDEOS, Path("ucf/Archery/other.avi")], tmp_path / "train", tmp_path / "test")
    renamed = [video._replace(label=folder.get(video.label, video.label)) for video in by_name]
    assert sorted(by_list) == sorted(renamed)
    assert "1 of 73 videos" in caplog.text
    assert "g09_c07" in caplog.text


def test_names_that_differ_in_case_are_different_videos(tmp_path: Path) -> None:
    names = ["Cat/A_g1.avi", "Cat/a_g1.avi", "Dog/d_g1.avi", "Dog/e_g2.avi", "Dog/caf\udce9_g2.avi"]
    (tmp_path / "train").write_text("\ufeff# training\r\ncat/A_g1.avi 1\r\nDog/D_G1.avi 2\r\nCat/A_g1.avi 1\r\n")
    (tmp_path / "test").write_text("Cat/a_g1.avi\nDog/e_g2.avi\nDog/caf\\xe9_g2.avi\n")
    labelled = split_by_lists(map(Path, names), tmp_path / "train", tmp_path / "test", r"(.)_g\d")
    assert [(str(video.path), video.split) for video in labelled] == [
        ("Dog/d_g1.avi", "train"),  # cat/A_g1.avi may be either of two files
        ("Cat/A_g1.avi", "train"),
        ("Cat/a_g1.avi", "test"),
        ("Dog/e_g2.avi", "test"),
        ("Dog/caf\udce9_g2.avi", "test"),
    ]
    (tmp_path / "test").write_bytes("Dog/e_g2.avi".encode("utf-16"))
    with pytest.raises(InputError, match=r"test line 1 is not UTF-8 \(it is UTF-16\): save"):
        split_by_lists(map(Path, names), tmp_path / "train", tmp_path / "test", ".+")


def test_folders_give_the_split_and_a_pattern_the_groups() -> None:
    videos = [Path(f"set/{split}/{label}/{label}-{person}-{take}.mp4") for split, person in
              (("train", "ann"), ("test", "bob"), ("test", "eve")) for label in "ab" for take in (1, 2)]  # fmt: skip
    labelled = split_by_folders(videos, r"-(\w+)-")
    assert labelled[0] == (videos[0], "a", "ann", "train")
    assert groups_of(labelled, "test") == {"bob", "eve"}
    assert len(groups_of(split_by_folders(videos, ".+"), "test")) == 8


def train_video(label: str, group: str = "1") -> LabelledVideo:
    return LabelledVideo(Path(), label, group, "train")


def held_out_video(label: str, group: str = "2") -> LabelledVideo:
    return LabelledVideo(Path(), label, group, "test")


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        (
            [train_video("a"), held_out_video("a"), held_out_video("a", "3")],
            "all training videos \\(1\\) are of the class 'a', but a classifier needs two classes",
        ),
        (
            [train_video("a"), train_video("b"), held_out_video("a")],
            "all test videos \\(1\\) are of the group '2', but a confidence interval needs two groups",
        ),
        (
            [train_video("a"), train_video("b"), held_out_video("a"), held_out_video("c", "3")],
            "class 'c' has test videos only",
        ),
        (
            [train_video("a"), train_video("b"), held_out_video("a"), held_out_video("b", "1")],
            "group '1' has training and test videos",
        ),
    ],
)
def test_unusable_splits_are_refused(videos: list[LabelledVideo], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_splits(videos)


@pytest.mark.parametrize(
    ("split", "groups", "message"),
    [
        (
            1,
            range(1, 8),
            r"all videos \(14\) are test videos \(UCF-101's split 1 tests on the groups g01 to g07\), and none are "
            r"left to train on: add videos of other groups, or give --split classes for videos in folders",
        ),
        (2, range(9, 12), r"all videos \(6\) are test videos \(UCF-101's split 2 tests on the groups g08 to g14\)"),
        (
            3,
            range(1, 8),
            r"all videos \(14\) are training videos \(UCF-101's split 3 tests on the groups g15 to g21\), and none are "
            r"left to test on: add videos of these groups, or give --split classes for videos in folders",
        ),
    ],
)
def test_groups_of_one_split_only_are_named_as_the_cause(split: int, groups: range, message: str) -> None:
    videos = [Path(f"ucf/{label}/v_{label}_g{group:02d}_c01.avi") for label in CLASSES for group in groups]
    with pytest.raises(InputError, match=message):
        split_by_ucf_groups(videos, split)


def test_one_folder_or_class_only_is_named_as_the_cause() -> None:
    def videos(*folders: str) -> list[Path]:
        return [Path(f"set/{folder}/v_x_g{number:02d}_c01.avi") for folder in folders for number in (1, 2, 3)]

    for folders, message in (
        (
            ("test/a", "test/b"),
            r"all videos \(6\) are test videos, and none are left to train on: add folders train/CLASS",
        ),
        (("train/a", "train/b"), r"all videos \(6\) are training videos, .* to test on: add folders test/CLASS"),
        (("train/a", "test/a"), r"all training videos \(3\) are of the class 'a', but a classifier needs two classes"),
        (("train/a", "test/b"), r"of the class 'a' \('b' has test videos only\), but"),
        ((), "there are no videos"),
    ):
        with pytest.raises(InputError, match=message):
            split_by_folders(videos(*folders), ".+")


def test_a_quarter_of_the_videos_of_each_class_are_test_videos() -> None:
    counts = {"walk": 9, "run": 4, "jump": 3, "hop": 2}
    videos = [Path(f"mine/{label}/{number}.mp4") for label, count in counts.items() for number in range(count)]
    assert fitting_split(videos) == "classes"
    labelled = split_by_hash(videos)
    assert {video.path for video in labelled} == set(videos)
    test = Counter(video.label for video in labelled if video.split == "test")
    assert test == {"walk": 2, "run": 1, "jump": 1}
    moved = split_by_hash([Path("elsewhere") / Path(*path.parts[1:]) for path in reversed(videos)])
    assert {video.group: video.split for video in moved} == {video.group: video.split for video in labelled}
    with pytest.raises(
        InputError, match=r"training videos \(a class needs three groups .* add videos to the folder of"
    ):
        split_by_hash([video for video in videos if video.stem in "01"])
    with pytest.raises(
        InputError, match=r"of the class 'mine', .* give a folder with a folder of videos for each class"
    ):
        split_by_hash([Path(f"mine/{number}.mp4") for number in range(4)])


def test_groups_of_several_classes_are_not_divided() -> None:
    videos = [Path(f"mine/{label}/person{number}_{take}.mp4") for label in "ab" for number in range(8) for take in "xy"]
    labelled = split_by_hash(videos, r"(person\d+)")
    assert len(groups_of(labelled, "test")) == 2
    assert not groups_of(labelled, "test") & groups_of(labelled, "train")


def test_the_split_follows_from_the_names() -> None:
    assert fitting_split(VIDEOS) == 1
    folders = [
        Path(f"set/{split}/{label}/{number}.mp4") for split in ("train", "test") for label in "ab" for number in "01"
    ]
    assert fitting_split(folders) == "folders"
    assert len(groups_of(split_by_folders(folders), "test")) == 4
    assert fitting_split([*folders, *VIDEOS]) == "classes"


def test_unusable_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cat.avi is not named v_CLASS_gGROUP_cCLIP"):
        split_by_ucf_groups([*VIDEOS, Path("cat.avi")], 1)
    with pytest.raises(InputError, match="have the same name"):
        split_by_ucf_groups([*VIDEOS, Path("copy/Archery") / VIDEOS[0].name], 1)
    with pytest.raises(InputError, match="is not in a folder train/CLASS or test/CLASS"):
        split_by_folders(VIDEOS)
    with pytest.raises(InputError, match="does not match the group pattern"):
        split_by_folders([Path("train/a/cat.avi")], r"g(\d+)")
    with pytest.raises(InputError, match=r"is not a regular expression \(missing"):
        split_by_folders([Path("train/a/cat.avi")], "(")
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("\n".join(str(path) for path in VIDEOS))
    other.write_text("Archery/unknown.avi")
    with pytest.raises(InputError, match="nowhere cannot be read"):
        split_by_lists(VIDEOS, one, tmp_path / "nowhere")
    with pytest.raises(InputError, match="other lists 1 videos, but --videos has none of them"):
        split_by_lists(VIDEOS, one, other)
    with pytest.raises(InputError, match=r"v_Archery_g01_c01.avi is listed twice"):
        split_by_lists(VIDEOS, one, one)
