"""Explanations of how an input file was prepared."""

import hashlib
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpdit_lightning.codecs import load_codec
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.errors import InputError
from gpdit_lightning.preparation import PreparePairsOptions, prepare_pairs
from gpdit_lightning.preparation.inspection import explain, overview, unlisted_files, verify, write_sheet
from gpdit_lightning.preparation.records import Records
from gpdit_lightning.preparation.splits import choose_split_by_hash
from tests.preparation.inspection.prepared import SHARD, draw_tar, draw_video, prepared


def lines(manifest: Manifest, file: str | Path) -> dict[str, str]:
    """Return the lines about an input file as a dictionary from the text before the first colon to the rest."""
    parts = (line.strip().partition(": ") for line in explain(manifest, str(file)).splitlines())
    return {topic: text for topic, _, text in parts}


def test_explain_a_training_video(intact: Manifest, videos: Path) -> None:
    name = next(source.name for source in Records(intact.directory).files_of_part(0) if source.split == "train")
    assert explain(intact, name) == explain(intact, str(videos / name))
    shown = lines(intact, "dog/v_0_c0.mp4")
    size = (videos / "dog/v_0_c0.mp4").stat().st_size
    assert shown["dog/v_0_c0.mp4"] == f"video of {size} bytes, in part 0"
    assert shown["split"] == "train, since the hash of dog/v_0_c0.mp4 is 0.2719, not below the fraction 0.2"
    assert shown["size"] == "32x48 pixels; distances in log aspect ratio: 16x24 0.000 (chosen), 24x16 0.811"
    assert shown["frames"] == "12, 12 of them at stride 1: 10 in clips, 2 left over, since a clip has 5 frames"
    assert shown["samples"] == "2"
    clips = {key: text for key, text in shown.items() if key.startswith("train-")}
    assert list(clips.values()) == [f"latents 2x16x2x3, 5 frames from frame {first}" for first in (0, 5)]
    assert all(re.fullmatch(rf"{SHARD}-\d{{6}} of {SHARD}.tar", key) for key in clips)


def test_explain_a_held_out_file(intact: Manifest) -> None:
    name = next(source.name for source in Records(intact.directory).files_of_part(0) if source.split == "validation")
    shown = lines(intact, name)
    assert re.fullmatch(r"validation, since the hash of \S+ is 0\.[01]\d+, below the fraction 0.2", shown["split"])
    assert any(key.startswith("validation-video") for key in shown)


def test_explain_a_skipped_file(intact: Manifest) -> None:
    assert "broken.mp4 is not a readable video" in lines(intact, "broken.mp4")["skipped"]
    shown = lines(intact, "short.mp4")
    assert "has 3 frames at stride 1 but a clip needs 5" in shown["skipped"]
    assert shown["samples"] == "0"
    assert shown["frames"].startswith("3, 3 of them at stride 1: 0 in clips, 3 left over")


def test_the_unique_end_of_a_name_is_accepted(intact: Manifest, videos: Path) -> None:
    assert "dog/v_0_c0.mp4" in lines(intact, "v_0_c0.mp4")
    assert "ball/same.mp4" in lines(intact, "ball/same.mp4")
    assert "ball/same.mp4" in lines(intact, videos / "ball" / "same.mp4")
    with pytest.raises(InputError, match=r"same\.mp4 matches ball/same\.mp4, dog/same\.mp4: give one of these"):
        explain(intact, "same.mp4")


def test_explain_an_image_of_a_tar(intact: Manifest, videos: Path) -> None:
    shown = lines(intact, "00000.tar/0001")
    assert shown["00000.tar/0001"].startswith("image in a tar of")
    with tarfile.open(videos.parent / "tars" / "00000.tar") as tar_file:
        content = tar_file.extractfile("0001.png")
        assert content is not None
        split, reason = choose_split_by_hash(hashlib.sha256(content.read()).hexdigest(), 0.2, "its bytes")
    assert shown["split"] == f"{split}, since {reason}"
    assert re.fullmatch(r"the hash of its bytes is 0\.\d{4}, (not )?below the fraction 0\.2", reason)
    assert shown["size"].startswith("20x28 pixels; distances in log aspect ratio: 16x16 0.336 (chosen)")
    assert shown["samples"] == "1"
    assert lines(intact, videos.parent / "tars" / "00000.tar" / "0001.png") == shown
    for name in ("00000.tar/0002", "0002"):
        assert "0002.png of" in lines(intact, name)["skipped"]
    tar = lines(intact, "00000.tar")
    assert tar["samples"] == "3"
    assert tar["split"] == "each image is held out if the hash of its bytes is below the fraction 0.2"
    counts = [int(key.partition(" of 16x16 pixels for ")[0]) for key in tar if "of 16x16 pixels for" in key]
    assert sum(counts) == 3
    assert lines(intact, "00000.tar/0009")["samples"] == "0"


def test_explain_a_file_that_is_not_in_the_data(intact: Manifest, tmp_path: Path) -> None:
    assert "nothing.mp4 is not in the data and does not exist" in explain(intact, "nothing.mp4")
    (tmp_path / "notes.doc").touch()
    assert "the extension '.doc' are not prepared" in explain(intact, str(tmp_path / "notes.doc"))
    other = draw_video(tmp_path / "videos" / "cat" / "v_9.mp4", frames=8, height=48, width=32)
    shown = lines(intact, other)
    assert f"{other} is not in the data; the same options would prepare it as cat/v_9.mp4" in shown
    assert shown["size"].startswith("48x32 pixels; distances in log aspect ratio: 24x16 0.000 (chosen)")
    assert shown["samples"] == "1"
    assert "latents 2x16x3x2, 5 frames from frame 0" in shown
    draw_tar(tmp_path / "tars" / "more.tar")
    assert lines(intact, tmp_path / "tars" / "more.tar")["samples"] == "3"
    same = draw_video(tmp_path / "same.mp4", frames=4)  # not one of the recorded files of that name
    assert "has 4 frames" in lines(intact, same)["skipped"]


def test_explain_a_moved_file(copy: Path, videos: Path, tmp_path: Path) -> None:
    manifest, moved = Manifest.load(copy), tmp_path / "elsewhere" / "dog" / "v_0_c0.mp4"
    moved.parent.mkdir(parents=True)
    shutil.copy(videos / "dog" / "v_0_c0.mp4", moved)
    assert lines(manifest, moved)["size"].startswith("32x48 pixels")
    size = lines(manifest, "dog/v_0_c0.mp4")["size"]
    assert size == "16x24 pixels; to see the reason, give the path of the file"
    (copy / "preparation" / "part-00000.json").unlink()
    assert "its part is not finished: run the same `prepare` command again" in explain(manifest, str(moved))


@pytest.fixture
def names(tmp_path: Path) -> list[str]:
    """Names of four videos of 25 frames, two of each recording."""
    names = [f"v_{number // 2}_c{number}.mp4" for number in range(4)]
    for name in names:
        draw_video(tmp_path / "videos" / name, frames=25)
    return names


def test_reasons_with_a_pattern_for_recordings(tmp_path: Path, names: list[str]) -> None:
    manifest = prepared(tmp_path, source_pattern=r"v_\d", validation_fraction=0.01, clips_per_video=1, stride=2)
    splits = [lines(manifest, name)["split"] for name in names]
    assert all(re.search(r"the hash of v_\d is 0\.\d+, not below the fraction 0.01", text) for text in splits)
    assert sum(text.endswith("but at least 1 of 2 recordings are held out") for text in splits) == 2
    frames = lines(manifest, names[0])["frames"]
    assert frames == "25, 13 of them at stride 2: 5 in clips, 8 left over, since --clips_per_video is 1"
    new = draw_video(tmp_path / "videos" / "v_0_c9.mp4", frames=6)
    split = splits[0].partition(",")[0]
    assert lines(manifest, new)["split"] == f"{split}, since files of the same recording were prepared before"


def test_reasons_with_annotations(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "list.csv").write_text(f"source,split\n{names[0]},train\n{names[1]},train\n{names[2]},validation\n")
    manifest = prepared(tmp_path, annotations=[tmp_path / "list.csv"], validation_fraction=0, clip_frames=9)
    assert lines(manifest, names[2])["split"] == "validation, since an annotation file assigns it to this split"
    assert lines(manifest, names[0])["split"] == "train, since an annotation file assigns it to this split"
    assert lines(manifest, names[3])["skipped"].startswith("the annotation files list other files")
    assert lines(manifest, tmp_path / names[3])["skipped"].startswith("the annotation files list other files")
    assert lines(manifest, names[0])["frames"].endswith("18 in clips, 7 left over, since a clip has 9 frames")


def test_reasons_with_a_held_out_folder(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "held").mkdir()
    (tmp_path / "videos" / names[0]).rename(tmp_path / "held" / names[0])
    manifest = prepared(tmp_path, validation_videos=[tmp_path / "held"], least_clip_frames=1, clip_step=7)
    assert lines(manifest, f"held/{names[0]}")["split"] == "validation, since it is in a held-out folder"
    shown = lines(manifest, names[1])
    assert shown["split"] == "train, since it is in no held-out folder"
    reason = "since a clip has 1 to 5 frames, 1 + 4 k, and begins 7 frames after the one before"
    assert shown["frames"].endswith(reason)
    new = draw_video(tmp_path / "x" / "held" / "new.mp4", frames=5)
    assert lines(manifest, new)["split"] == "validation, since it is in a held-out folder"


def test_pairs_can_be_inspected_but_not_explained(tmp_path: Path) -> None:
    for folder in ("colour", "grey"):
        (tmp_path / folder).mkdir()
        for number in range(5):
            pixels = np.random.default_rng(number).integers(0, 255, (24, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"p{number}.png")
    folders = {"sources": tmp_path / "colour", "targets": tmp_path / "grey"}
    manifest = prepare_pairs(
        PreparePairsOptions(out=tmp_path / "out", **folders, held_out_pairs=1, size="16x24", codec="pca", device="cpu")
    )
    assert "sequence 6x16x2x3         train" in overview(manifest)
    assert list(verify(Manifest.load(tmp_path / "out"), workers=1)) == []
    assert unlisted_files(manifest) == []
    assert write_sheet(tmp_path / "sheet.png", manifest, 3, load_codec("pca")) == []
    with pytest.raises(InputError, match=r"has no folder 'preparation' with records of the input files"):
        explain(manifest, "p0.png")
