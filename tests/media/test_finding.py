"""Search of folders and lists for videos and images."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from gpdit_lightning.errors import InputError
from gpdit_lightning.media import finding
from gpdit_lightning.media.finding import (
    VANISHED,
    FoundFile,
    find_media,
    read_file_list,
    search_folder,
    without_repeated,
)
from gpdit_lightning.media.video_writer import write_video
from gpdit_lightning.names import as_text

ODD_NAMES = [
    *("clip:1.mp4", "a\u2028b.mp4", "new\nline.mp4", "-dash.mp4", "x#1.mp4", "{1,2}.mp4", "*.mp4", "[a].mp4"),
    *(
        "frame%03d.mp4",
        " a b ",
        "quo'te\".mp4",
        "UPPER.MP4",
        "upper.mp4",
        "\u00e9.mp4",
        "e\u0301.mp4",
        "n" * 251 + ".mp4",
    ),
    *("caf\udce9.mp4", "concat:a|b.mp4", "deep/~home.mp4"),
]


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """A short mp4, outside of the folder `set`."""
    write_video(tmp_path / "video.mp4", torch.zeros((2, 3, 16, 16), dtype=torch.uint8), fps=8)
    (tmp_path / "set").mkdir()
    return tmp_path / "video.mp4"


def names(folder: Path) -> list[str]:
    return [name for _, name in search_folder(folder, "video").files]


def test_any_name_that_the_file_system_allows_is_found(video: Path) -> None:
    folder = video.parent / "set"
    for name in ODD_NAMES:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(video, folder / name)
    found = search_folder(folder, "video")
    assert {path for path, _ in found.files} == {folder / name for name in ODD_NAMES}
    assert {name for _, name in found.files} == {as_text(name) for name in ODD_NAMES}
    assert found.unusable == []
    shutil.copy(video, folder / r"caf\xe9.mp4")  # as text, the name of another file
    (left_out,) = search_folder(folder, "video").unusable
    assert left_out == (r"caf\xe9.mp4", "has the same name as another file, as text: rename it", False)


def test_a_file_is_what_it_contains_unless_its_extension_is_known(video: Path) -> None:
    folder = video.parent / "set"
    for name in ("a.MTS", "b.unusual", "c", "thumb.jpg", "d.json", "e.json", "f.srt", ".hidden.mp4", "damaged.mp4"):
        shutil.copy(video, folder / name)
    (folder / "g.unusual").write_text("no video")
    Image.new("RGB", (8, 8)).save(folder / "picture", "PNG")
    found = search_folder(folder, "video")
    assert [name for _, name in found.files] == ["a.MTS", "b.unusual", "c", "damaged.mp4"]
    assert found.unusable == [("g.unusual", "is not a readable video (unknown content)", False)]
    assert found.describe_others() == (
        "other files were left out: 2 .json, 1 .jpg, 1 .srt, 1 hidden, 1 without extension (the first is d.json)"
    )
    assert found.has_others("image")
    found.forget_others("image")
    assert not found.has_others("image")
    assert "jpg" not in str(found.describe_others())
    images = search_folder(folder, "image")
    assert [name for _, name in images.files] == ["picture", "thumb.jpg"]


def test_an_empty_file_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of /proc are empty by their size, and reading some of them does not end."""
    for reader in ("is_image", "is_video"):
        monkeypatch.setattr(finding, reader, lambda path: pytest.fail(f"{path} was opened"))
    (tmp_path / "empty").touch()
    assert finding.medium_of(tmp_path / "empty") is None
    assert [name for name, *_ in search_folder(tmp_path, "video").unusable] == ["empty"]


def test_links_are_followed_once_and_circles_end(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = video.parent / "set"
    elsewhere = video.parent / "elsewhere" / "deep"
    elsewhere.mkdir(parents=True)
    shutil.copy(video, elsewhere / "far.mp4")
    (folder / "z").mkdir()
    shutil.copy(video, folder / "z" / "real.mp4")
    for link, target in (
        ("a", folder / "z"),  # precedes the real folder in the order of names
        ("here", "."),
        ("z/above", "../.."),
        ("out", elsewhere.parent),
        ("out2", elsewhere),
        ("gone.mp4", "nowhere"),
        ("self", "self"),
        ("link.mp4", "z/real.mp4"),
    ):
        (folder / link).symlink_to(target)
    os.mkfifo(folder / "pipe.mp4")
    found = search_folder(folder, "video")
    assert [name for _, name in found.files] == ["link.mp4", "out/deep/far.mp4", "z/real.mp4"]
    assert {name: reason.split(",")[0] for name, reason, _ in found.repeated} == {
        "a": "is the same folder as z",
        "here": f"is the same folder as {folder}",
        "out2": "is the same folder as out/deep",
        "z/above": f"is a link to {video.parent}",
    }
    assert {name: reason for name, reason, _ in found.unusable} == {
        "gone.mp4": "is a link to nowhere, which does not exist",
        "self": "is a link to self, which does not exist",
        "pipe.mp4": "is not a regular file",
    }
    kept, repeated = without_repeated(found.files)
    missing = FoundFile(folder / "missing.mp4", "missing.mp4")
    assert without_repeated([missing, *found.files]) == (kept, [*repeated, ("missing.mp4", VANISHED, False)])
    with monkeypatch.context() as patch:  # a link that is removed during the search
        patch.setattr("os.readlink", lambda path: os.stat(folder / "missing"))
        assert ("gone.mp4", VANISHED, False) in search_folder(folder, "video").unusable
    assert [name for _, name in kept] == ["out/deep/far.mp4", "z/real.mp4"]
    assert repeated == [("link.mp4", "is the same file as z/real.mp4 and is used under that name", False)]


def test_a_folder_that_cannot_be_read_is_named(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = video.parent / "set"
    (folder / "private").mkdir()
    shutil.copy(video, folder)
    scandir = os.scandir

    def refuse(path: Path) -> "os._ScandirIterator[str]":  # a test may run as root, who may read everything
        if Path(path).name == "private":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(finding.os, "scandir", refuse)
    found = search_folder(folder, "video")
    assert [name for _, name in found.files] == ["video.mp4"]
    reason = "is a folder that cannot be read (Permission denied): check its permissions"
    assert found.unusable == [("private", reason, False)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("\ufeffa.mp4\r\n# comment\r\n\r\n  b c.mp4\r\n", ["a.mp4", "b c.mp4"]),
        ("#1.mp4\n\"b c.mp4\"\n'a.mp4'", ["#1.mp4", "b c.mp4", "a.mp4"]),
        ("a\u2028.mp4\nd/e.mp4\n./a.mp4", ["a\u2028.mp4", "d/e.mp4", "a.mp4"]),
        ("e\u0301.mp4\ncaf\\xe9.mp4", ["\u00e9.mp4", r"caf\xe9.mp4"]),
    ],
)
def test_lists(tmp_path: Path, content: str, expected: list[str]) -> None:
    (tmp_path / "d").mkdir()
    for name in ("a.mp4", "b c.mp4", "#1.mp4", "a\u2028.mp4", "d/e.mp4", "\u00e9.mp4", "caf\udce9.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_bytes(content.encode())
    found = read_file_list(tmp_path / "list.txt")
    assert [name for _, name in found] == expected
    assert all(path.is_file() for path, _ in found)
    (tmp_path / "list.txt").write_text(f"# absolute\n{tmp_path / 'a.mp4'}\n")
    (tmp_path / "other").mkdir()
    shutil.move(tmp_path / "list.txt", tmp_path / "other")
    assert find_media(tmp_path / "other" / "list.txt", "video").files == [(tmp_path / "a.mp4", "a.mp4")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a.mp4\n".encode("utf-16"), r"list\.txt line 1 is not UTF-8 \(it is UTF-16\): save the file as UTF-8"),
        (
            "a.mp4\n".encode("utf-16-le"),
            "line 1 has a null character, as binary files and UTF-16",
        ),
        ("a.mp4\n".encode("utf-32"), r"line 1 is not UTF-8 \(it is UTF-32\)"),
        ("a.mp4\ncaf\xe9.mp4\n".encode("latin-1"), r"line 2 is not UTF-8 \(invalid continuation byte\): save"),
        (b"a.mp4\n\nb.mp4\n", r"contains .*b\.mp4 in line 3, which does not exist: correct that line"),
        (b"a.mp4\n.\n", "in line 2, which is not a regular file"),
        (b"# nothing\n", "is empty: write one path per line"),
    ],
)
def test_unusable_lists_are_refused_in_one_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        find_media(tmp_path / "list.txt", "video")


def test_a_folder_without_videos_is_refused_with_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(InputError, match=r"has no video files: give another folder; other files were .* 1 \.txt"):
        find_media(tmp_path, "video")
    with pytest.raises(InputError, match="absent does not exist: give a folder, a file or a"):
        find_media(tmp_path / "absent", "video")
