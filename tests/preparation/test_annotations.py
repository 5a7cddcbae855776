"""Annotation files: formats, errors, and lookup of input files."""

import json
from pathlib import Path
from typing import Any

import pytest

from gpdit_lightning.errors import InputError
from gpdit_lightning.preparation.annotations import Annotation, Annotations, read_annotations

TRAIN = "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\r\nArchery/v_Archery_g08_c01.avi 3\r\n"
TEST = "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\r\nArchery/v_Archery_g01_c01.avi\r\n"
CLASSES = "1 ApplyEyeMakeup\r\n2 ApplyLipstick\r\n3 Archery\r\n"

VIDEODATAINFO = {
    "info": {"contributor": "Microsoft MSM group", "data_created": "2016-04-14 14:30:20", "version": "1.0"},
    "videos": [
        {"category": 9, "url": "https://x", "video_id": "video0", "start time": 137.7, "split": "train", "id": 0},
        {"category": 16, "url": "https://y", "video_id": "video6513", "start time": 0, "split": "validate", "id": 6513},
        {"category": 3, "url": "https://z", "video_id": "video7010", "start time": 0, "split": "test", "id": 7010},
    ],
    "sentences": [
        {"caption": "a man is driving", "video_id": "video0", "sen_id": 2},
        {"caption": "a car is shown", "video_id": "video0", "sen_id": 1},
        {"caption": "ein Fußballspiel", "video_id": "video6513", "sen_id": 3},
    ],
}


def read(folder: Path, *contents: str | bytes) -> Annotations:
    """Read annotations from files with these contents; the names are `0`, `1`, ..., since only the content matters."""
    paths = [folder / str(number) for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_annotations(paths)


def lines(*values: Any) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def test_ucf101_lists_contain_splits_labels_and_class_numbers(tmp_path: Path) -> None:
    annotations = read(tmp_path, TRAIN, TEST, CLASSES)
    assert annotations.get("Archery/v_Archery_g08_c01.avi") == Annotation(label="Archery", split="train")
    assert annotations.get("Archery/v_Archery_g01_c01.avi") == Annotation(label="Archery", split="validation")
    assert annotations.get("v_ApplyEyeMakeup_g01_c01.mp4") == Annotation(label="ApplyEyeMakeup", split="validation")
    assert annotations.get("Archery/v_Archery_g25_c07.avi") == Annotation()
    assert annotations.labels == ("ApplyEyeMakeup", "ApplyLipstick", "Archery")


def test_class_numbers_without_files(tmp_path: Path) -> None:
    annotations = read(tmp_path, "10 b\n9 a\n")
    assert annotations.labels == ("a", "b")
    assert annotations.get("a") == Annotation()


def test_a_folder_without_class_number_is_not_a_label(tmp_path: Path) -> None:
    annotations = read(tmp_path, "clips/one.mp4\nclips/two words.MP4\n")
    assert annotations.get("clips/two words.MP4") == Annotation(split="validation")
    assert annotations.labels == ()


@pytest.mark.parametrize("other", ["1 Archery\n", "2 ApplyEyeMakeup\n"], ids=["one_number", "one_name"])
def test_contradicting_class_numbers_are_refused(tmp_path: Path, other: str) -> None:
    with pytest.raises(InputError, match=r"the class numbers in .* differ"):
        read(tmp_path, CLASSES, other)


def test_a_hundred_thousand_classes_are_compared_in_linear_time(tmp_path: Path) -> None:
    many = [f"{number} c{number}" for number in range(1, 100_001)]
    assert len(read(tmp_path, "\n".join(many)).labels) == len(many)


@pytest.mark.parametrize("indent", [None, 1])
def test_msr_vtt_captions_are_in_order_of_sen_id(tmp_path: Path, indent: int | None) -> None:
    annotations = read(tmp_path, json.dumps(VIDEODATAINFO, indent=indent))
    assert annotations.get("TrainValVideo/video0.mp4") == Annotation(
        ("a car is shown", "a man is driving"), split="train"
    )
    assert annotations.get("video6513.mp4") == Annotation(("ein Fußballspiel",), split="validation")
    assert annotations.get("video7010.mp4") == Annotation(split="validation")
    assert annotations.get("video1.mp4") == Annotation()
    assert annotations.labels == ()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"videos": [{"video_id": "video0", "split": "dev"}]}, "dev"),
        ({"videos": [{"video_id": "video0"}]}, "split"),
        ({"videos": 3}, "not iterable"),
        ({"videos": [{"video_id": 5, "split": "train"}]}, "the video_id 5"),
        ({"sentences": [{"video_id": None, "sen_id": 1, "caption": "a"}]}, "the video_id None"),
        ({"sentences": [{"video_id": "video0", "sen_id": 1, "caption": 7}]}, "the caption 7"),
    ],
)
def test_invalid_msr_vtt_fields_are_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=rf"0 does not have the fields of MSR-VTT's videodatainfo\.json \(.*{named}"):
        read(tmp_path, json.dumps(VIDEODATAINFO | change))


def test_json_lines_with_optional_fields(tmp_path: Path) -> None:
    annotations = read(
        tmp_path,
        lines(
            {"source": "a/x.mp4", "caption": "one ", "label": "ball", "split": "validation"},
            {"source": "./y.mp4", "caption": ["two", "three"], "label": None},
            {"source": "y.mp4", "caption": "four"},
            {"source": "z.mp4"},
        )
        + "\n",
    )
    assert annotations.get("a/x.mp4") == Annotation(("one",), "ball", "validation")
    assert annotations.get("y.mp4") == Annotation(("two", "three", "four"))
    assert annotations.get("z.mp4") == Annotation()
    assert annotations.labels == ()


@pytest.mark.parametrize(
    ("content", "delimiter"),
    [
        ("source,caption,split\na.mp4,\"red, and\nblue\",train\n\nb.mp4,,\n", ","),
        ("source\tcaption\tsplit\r\na.mp4\t\"red, and\nblue\"\ttrain\r\nb.mp4\t \t\r\n", "\t"),
    ],
    ids=["csv", "tsv"],
)  # fmt: skip
def test_csv_and_tsv(tmp_path: Path, content: str, delimiter: str) -> None:
    annotations = read(tmp_path, "\ufeff" + content)
    assert annotations.get("a.mp4") == Annotation(("red, and\nblue",), split="train")
    assert annotations.get("b.mp4") == Annotation()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"source": "a", "text": "b"}\n', "line 1 has the unknown field 'text'"),
        ('{"source": "a"}\n\n{"caption": "b"}\n', "line 3 has None as source, which must be the path"),
        ('{"source": "a"}\n{"source": 3}\n', "line 2 has 3 as source"),
        (
            '{"source": "a", "caption": ["b", 3]}\n',
            r"has \['b', 3\] as caption, which must be a string or a list",
        ),
        ('{"source": "a", "caption": {"en": "b"}}\n', "as caption"),
        ('{"source": "a", "caption": "\\ud83d"}\n', "as caption"),
        ('{"source": "a", "label": 3}\n', "line 1 has 3 as label, which must be a string"),
        ('{"source": "a", "label": 0}\n', "line 1 has 0 as label, which must be a string"),
        ('{"source": "a", "caption": false}\n', "line 1 has False as caption"),
        ('{"source": "a", "label": "b", "label": "c"}\n', "line 1 is not readable JSON .*'label'"),
        ("a/b.mp4 " + "1" * 5000, "begins with 'a/b.mp4 1*', which is not a supported format"),
        ("9" * 5000 + " a\n", "begins with '9*', which is not a supported format"),
        ("1\n" + "9" * 5000 + "\n", "line 2 is '9*', which has another form"),
        ("source,label\na,\0\n", "line 2 has a null character"),
        ('{"source": "a", "split": "test"}\n', "line 1 has 'test' as split, which must be train or validation"),
        ('{"source": "a", "split": ["train"]}\n', "as split"),
        ('{"source": "a"}\n{"source": "b"\n', "line 2 is not readable JSON"),
        ('{"source": "a"}\n["b"]\n', "line 2 is not a JSON object"),
        ('{"source": "a"}\n' + "[" * 100_000 + "\n", "line 2 is not readable JSON"),
        ('{"source": "a"\n', "is not readable JSON .*line"),
        ("source,text\na,b\n", "line 2 has the unknown field 'text'"),
        ("source,caption\na,b,c\n", "line 2 is not a row of the table .3 cells under a header of 2"),
        ('source,caption\na,"b\nc,d\n', "line 3 is not a row of the table"),
        ("source,caption,caption\na,b,c\n", "line 1 is not a row of the table .two columns have the same name"),
        ("source,caption\n,b\n", "line 2 has None as source"),
        ("a.mp4 1\nb.mp4\n", "line 2 is 'b.mp4', which has another format than the lines before"),
        ("a.mp4\nb.mp4 1\n", "line 2 is 'b.mp4 1', which has another format"),
        ("[1, 2]\n", r"begins with '\[1, 2\]', which is not a supported format: give UCF-101's"),
        ("[" + "1, " * 100_000 + "1]", r"begins with '\[1, 1, "),
        ("Read me first.\n", "begins with 'Read me first.'"),
        ("", "begins with ''"),
        (b"a.mp4\n\xff.mp4\n", "line 2 is not UTF-8"),
        (b'{\n"videos": "\xff"}\n', "line 2 is not UTF-8"),
        ("a,b\n".encode("utf-16"), "line 1 is not UTF-8"),
    ],
)
def test_errors_contain_file_and_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=f"{tmp_path}/0 .*{message}"):
        read(tmp_path, content)


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff# comment\n\nsource,label\na.mp4,x\n#b.mp4,y\n",
        '# comment\n{"source": "a.mp4", "label": "x"}\n# comment\n{"source": "#b.mp4", "label": "y"}\n',
        "# comment\r\nsource\tlabel\r\n'a'.mp4\tz\r\na.mp4\tx\r\n#b.mp4\ty\r\n",
    ],
)
def test_comments_are_ignored_and_names_may_begin_like_them(tmp_path: Path, content: str) -> None:
    annotations = read(tmp_path, content)
    assert [annotations.get(name).label for name in ("a.mp4", "#b.mp4")] == ["x", "y"]


def test_names_match_in_another_unicode_form_or_container(tmp_path: Path) -> None:
    annotations = read(tmp_path, "# names\nsource,label\ncaf\u00e9\u2028.mp4,x\nclip.1,y\ncaf\\xe9,z\n")
    assert annotations.get("cafe\u0301\u2028.mp4").label == "x"
    assert annotations.get("deep/clip.1.unusual").label == "y"
    assert annotations.get(r"caf\xe9.mkv").label == "z"
    ucf = read(tmp_path, "# list\r\n" + TRAIN)
    assert ucf.get("Archery/v_Archery_g08_c01.avi").split == "train"


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.txt cannot be read"):
        read_annotations([tmp_path / "absent.txt"])


def test_lookup_by_full_name_then_path_without_extension_then_stem(tmp_path: Path) -> None:
    annotations = read(
        tmp_path,
        lines(
            {"source": "a/x.mp4", "caption": "whole"},
            {"source": "a/x.avi", "caption": "other ending"},
            {"source": "b/x", "caption": "path"},
            {"source": "c/y.mp4", "caption": "stem"},
            {"source": "clip.1", "caption": "first"},
            {"source": "clip.2", "caption": "second"},
        ),
    )
    for name, caption in {
        "a/x.mp4": "whole",
        "a/x.avi": "other ending",
        "b/x.webm": "path",
        "elsewhere/y.MKV": "stem",
        "clip.2.mp4": "second",
    }.items():
        assert annotations.get(name).captions == (caption,)
    for name in ("a/x.mkv", "d/x.mp4", "clip.mp4", "z.mp4"):  # ambiguous, or in no entry
        assert annotations.get(name) == Annotation()


def test_files_with_different_forms_of_a_name_are_merged(tmp_path: Path) -> None:
    annotations = read(
        tmp_path,
        TRAIN,
        lines({"source": "v_Archery_g08_c01", "caption": "an archer", "split": "train"}),
        "source,caption\nArchery/v_Archery_g08_c01.avi,a bow\n",
    )
    assert annotations.get("Archery/v_Archery_g08_c01.avi") == Annotation(("an archer", "a bow"), "Archery", "train")


def test_contradiction_between_files(tmp_path: Path) -> None:
    name = "Archery/v_Archery_g08_c01.avi"
    annotations = read(tmp_path, TEST, TRAIN, lines({"source": name, "split": "validation"}))
    assert annotations.get("Archery/v_Archery_g01_c01.avi").split == "validation"
    with pytest.raises(
        InputError, match=f"/2 has 'validation' as split of '{name}', but .*/1 has 'train': correct or omit"
    ):
        annotations.get(name)


def test_contradiction_within_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="/0 line 2 has 'b' as label of 'x', but an earlier line has 'a': remove one"):
        read(tmp_path, lines({"source": "x", "label": "a"}, {"source": "x", "label": "b"}))


def test_without_files_annotations_are_empty() -> None:
    assert read_annotations([]).get("a.mp4") == Annotation()
