"""Input files of a preparation: odd names, links, and the choice of held-out files."""

import io
import json
import os
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gpdit_lightning.data.manifest import NOTES_NAME, SKIPPED_NAME, Manifest
from gpdit_lightning.data.shards import ShardReader
from gpdit_lightning.media.video_writer import write_video
from gpdit_lightning.names import as_text, printable
from gpdit_lightning.preparation import PrepareOptions, prepare, summary
from gpdit_lightning.preparation.inspection import explain
from gpdit_lightning.preparation.records import Records
from gpdit_lightning.preparation.summary import read_left_out
from tests.preparation.earlier_version import remove_hashes


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Five frames, enough for one clip."""
    write_video(tmp_path / "video.mp4", torch.zeros((5, 3, 16, 16), dtype=torch.uint8), fps=8)
    return tmp_path / "video.mp4"


def prepared(root: Path, **options: Any) -> Manifest:
    """Prepare `root / "set"`, unless the options name other inputs, in `root / "out"`."""
    inputs: dict[str, Any] = {"out": root / "out"}
    if not options.keys() & {"videos", "image_tars"}:
        inputs["videos"] = [root / "set"]
    defaults = {"codec": "pca", "stride": 1, "clip_frames": 5, "video_sizes": ["16x16"], "image_sizes": ["16x16"]}
    manifest = prepare(PrepareOptions(**defaults | {"device": "cpu", "workers": 0} | inputs | options))
    assert manifest is not None
    return manifest


def splits(manifest: Manifest) -> dict[str, str]:
    """Return the split of each source."""
    return {
        ShardReader(manifest.directory, entry).read(number)[1]["source"]: entry.split
        for entry in manifest.shards
        for number in range(entry.count)
    }


def test_one_odd_name_never_ends_a_preparation_and_can_be_explained(tmp_path: Path, video: Path) -> None:
    names = [
        "clip:1.mp4",
        "caf\udce9.mp4",
        "a\u2028b.mp4",
        "new\nline.mp4",
        "-d.mp4",
        "x#1.mp4",
        "%03d.mp4",
        "*[a]{b}.mp4",
    ]
    for name in names:
        (tmp_path / "set").mkdir(exist_ok=True)
        shutil.copy(video, tmp_path / "set" / name)
    bad = ["bad\u2028.mp4", "b\udcffd.mp4"]
    for name in bad:
        (tmp_path / "set" / name).write_bytes(b"no video")
    skipped = {*map(as_text, bad), "gone\n.mp4"}
    (tmp_path / "set" / "gone\n.mp4").symlink_to("nowhere")
    manifest = prepared(tmp_path, labels=True)
    assert set(splits(manifest)) == set(map(as_text, names))
    assert {entry.source for entry in read_left_out(tmp_path / "out" / SKIPPED_NAME)} == skipped
    for path in tmp_path.glob("out/**/*.json*"):
        path.read_bytes().decode()  # valid UTF-8
    assert all(line == printable(line) for line in summary(manifest).split("\n"))
    assert rf"b\xffd.mp4: {printable(str(tmp_path))}/set/b\xffd.mp4 is not a readable video" in summary(manifest)
    for name in names:
        for query in (str(tmp_path / "set" / name), as_text(name)):
            first, *others = explain(manifest, query).split("\n")
            assert first.startswith(f"{printable(as_text(name))}: video of {video.stat().st_size} bytes")
            assert "samples: 1" in others
    assert "skipped: " in explain(manifest, str(tmp_path / "set" / bad[1]))
    assert "is a link to nowhere, which does not exist" in explain(manifest, "gone\n.mp4")
    assert prepared(tmp_path, labels=True) == manifest  # all names are found again in the records


def test_a_file_and_its_links_are_one_recording(tmp_path: Path, video: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(4):
        shutil.copy(video, folder / f"r{number}.mp4")
        (folder / f"a{number}.mp4").symlink_to(f"r{number}.mp4")
        os.link(folder / f"r{number}.mp4", folder / f"s{number}.mp4")
    manifest = prepared(tmp_path, validation_fraction=0.5)
    assert set(splits(manifest)) == {f"r{number}.mp4" for number in range(4)}
    assert manifest.validation["train_sources"] + manifest.validation["validation_sources"] == 4
    repeated = {entry.source: entry.reason for entry in read_left_out(tmp_path / "out" / NOTES_NAME)}
    assert repeated == {
        f"{link}{number}.mp4": f"it is the same file as r{number}.mp4 and is used under that name"
        for link in "as"
        for number in range(4)
    }
    assert "note: it is the same file as r0.mp4" in explain(manifest, "a0.mp4")
    (tmp_path / "elsewhere.mp4").symlink_to(folder / "r1.mp4")
    assert explain(manifest, str(tmp_path / "elsewhere.mp4")).startswith("r1.mp4: video of")
    # A new link whose name precedes the recorded one changes nothing.
    (folder / "0.mp4").symlink_to("r0.mp4")
    assert prepared(tmp_path, validation_fraction=0.5).shards == manifest.shards


def test_a_held_out_link_holds_out_its_file(tmp_path: Path, video: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / "set").mkdir(exist_ok=True)
        shutil.copy(video, tmp_path / "set" / f"{name}.mp4")
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "x.mp4").symlink_to("../set/b.mp4")
    manifest = prepared(tmp_path, validation_videos=[tmp_path / "held"])
    assert splits(manifest) == {"a.mp4": "train", "c.mp4": "train", "held/x.mp4": "validation"}
    (tmp_path / "list.csv").write_text("source,split\nlink.mp4,validation\n")
    (tmp_path / "set" / "link.mp4").symlink_to("c.mp4")
    by_list = prepared(tmp_path, annotations=[tmp_path / "list.csv"], out=tmp_path / "out2")
    assert splits(by_list) == {"a.mp4": "train", "b.mp4": "train", "link.mp4": "validation"}


def write_tar(path: Path, images: dict[str, bytes], members: dict[str, bytes] | None = None) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        contents = {f"{key}.png": image for key, image in images.items()} | (members or {})
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (number * 7 % 256, number * 31 % 256, number)).save(file, "PNG")
    return file.getvalue()


def test_an_image_in_two_tars_is_in_one_split(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars" / "0.tar", {f"a{number}": png(number) for number in range(40)})
    write_tar(tmp_path / "tars" / "1.tar", {f"b{39 - number}": png(number) for number in range(40)})
    manifest = prepared(tmp_path, image_tars=[str(tmp_path / "tars")], validation_fraction=0.4)
    split = splits(manifest)
    assert set(Counter(split.values())) == {"train", "validation"}
    assert all(split[f"0.tar/a{number}"] == split[f"1.tar/b{39 - number}"] for number in range(40))
    assert manifest.validation["hashed"]["images in tars"] == "bytes of the image file"
    assert any("the hash of its bytes is" in line for line in explain(manifest, "1.tar/b3").split("\n"))


def test_tars_of_an_older_version_stay_held_out_by_name(tmp_path: Path) -> None:
    """The records of a killed preparation of an older version lack what is hashed."""
    write_tar(tmp_path / "tars" / "0.tar", {f"a{number}": png(number) for number in range(40)})
    options = {"image_tars": [str(tmp_path / "tars")], "validation_fraction": 0.4}
    by_bytes = splits(prepared(tmp_path, **options))
    records = tmp_path / "out" / "preparation"
    remove_hashes(records)
    lines = (records / "part-00000.sources.jsonl").read_text().replace(', "hashed": "bytes"', "")
    for path in (tmp_path / "out").iterdir():
        if path.is_file():
            path.unlink()
    (records / "part-00000.json").unlink()
    (records / "part-00000.sources.jsonl").write_text(lines)
    assert Records(tmp_path / "out").files[0].hashed == "name"
    manifest = prepared(tmp_path, **options)
    by_name = splits(manifest)
    assert by_name != by_bytes
    assert manifest.validation["hashed"]["images in tars"].startswith("TAR/KEY")
    shown = explain(manifest, "0.tar/a3")
    assert f"split: {by_name['0.tar/a3']}, since the hash of 0.tar/a3 is" in shown


def test_annotations_that_list_none_of_the_files_are_named(
    tmp_path: Path, video: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A list of another data set would be ignored without a word, and the files be split by a hash."""
    (tmp_path / "set").mkdir()
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(video, tmp_path / "set" / name)
    (tmp_path / "used.csv").write_text("source,caption\na,text\n")
    (tmp_path / "other.csv").write_text("source,split\nc,train\n")
    (tmp_path / "classInd.txt").write_text("1 c\n")  # lists no files
    lists = [tmp_path / name for name in ("used.csv", "other.csv", "classInd.txt")]
    with caplog.at_level("WARNING", "gpdit_lightning"):
        prepared(tmp_path, annotations=lists)
    assert [message for message in caplog.messages if "lists none of the input files" in message] == [
        f"warning: {tmp_path / 'other.csv'} lists none of the input files, so it has no effect: compare its names with "
        "the paths in the folders"
    ]


def test_notes_are_not_counted_as_skipped(tmp_path: Path) -> None:
    images = {f"{number:02d}": png(number) for number in range(10)} | {"90": b"no image", "caf\udce9": png(99)}
    captions = {f"{number:02d}.txt": b"\xff\xfe" for number in range(6)}
    members = {name: content for key in images for name, content in _members(key, images, captions)}
    write_tar(tmp_path / "tars" / "0.tar", {}, members)
    manifest = prepared(tmp_path, image_tars=[str(tmp_path / "tars")])
    assert sum(shard.count for shard in manifest.shards) == 11
    assert manifest.skipped == 1
    assert [entry.source for entry in read_left_out(tmp_path / "out" / SKIPPED_NAME)] == ["0.tar/90"]
    notes = list(read_left_out(tmp_path / "out" / NOTES_NAME))
    assert [entry.source for entry in notes] == [f"0.tar/{number:02d}" for number in range(6)]
    assert all("the rest of the sample was used" in entry.reason for entry in notes)
    assert "skipped: 1 (full list: " in summary(manifest)
    assert "notes: 6 (full list: " in summary(manifest)
    assert "note: 00.txt of" in explain(manifest, "0.tar/00")
    assert r"0.tar/caf\xe9" in splits(manifest)
    assert "samples: 1" in explain(manifest, r"0.tar/caf\xe9").split("\n")
    # A record of an older version has no notes; its entries stay where they are.
    path = tmp_path / "out" / "preparation" / "part-00000.json"
    remove_hashes(path.parent)
    record = json.loads(path.read_text())
    record["skipped"] += record.pop("notes")
    path.write_text(json.dumps(record))
    assert len(Records(tmp_path / "out").result(0).skipped) == 7
    assert Records(tmp_path / "out").result(0).notes == ()


def _members(key: str, images: dict[str, bytes], captions: dict[str, bytes]) -> list[tuple[str, bytes]]:
    caption = f"{key}.txt"
    return [(f"{key}.png", images[key]), *([(caption, captions[caption])] if caption in captions else [])]
