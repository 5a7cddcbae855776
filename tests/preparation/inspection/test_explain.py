"""Explanations of what became of an input file."""

import re
import shutil
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
from tests.preparation.inspection.prepared import BUCKET, draw_tar, draw_video, prepared


def lines(manifest: Manifest, file: str | Path) -> dict[str, str]:
    """The lines about an input file, by the text before their first colon."""
    split = (line.strip().partition(": ") for line in explain(manifest, str(file)).splitlines())
    return {topic: text for topic, _, text in split}


def test_explain_a_training_video(intact: Manifest, videos: Path) -> None:
    name = next(source.name for source in Records(intact.directory).files_of_part(0) if source.split == "train")
    said = explain(intact, name)
    assert said == explain(intact, str(videos / name))
    said = lines(intact, "dog/v_0_c0.mp4")
    size = (videos / "dog/v_0_c0.mp4").stat().st_size
    assert said["dog/v_0_c0.mp4"] == f"video of {size} bytes, in part 0"
    assert said["split"] == "train: the hash of dog/v_0_c0.mp4 is 0.2719, not below the fraction 0.2"
    assert said["size"] == "32x48 pixels; distances in log aspect ratio: 16x24 0.000 (chosen), 24x16 0.811"
    assert said["frames"] == "12, 12 of them at stride 1: 10 in clips, 2 left over, since a clip has 5 frames"
    assert said["samples"] == "2"
    shown = [(key, text) for key, text in said.items() if key.startswith("train-")]
    assert [text for _, text in shown] == [f"latents 2x16x2x3, 5 frames from {first} on" for first in (0, 5)]
    assert all(re.fullmatch(rf"{BUCKET}-\d{{6}} of {BUCKET}.tar", key) for key, _ in shown)


def test_explain_a_held_out_file(intact: Manifest) -> None:
    name = next(source.name for source in Records(intact.directory).files_of_part(0) if source.split == "validation")
    said = lines(intact, name)
    assert re.fullmatch(r"validation: the hash of \S+ is 0\.[01]\d+, below the fraction 0.2", said["split"])
    assert any(key.startswith("validation-video") for key in said)


def test_explain_a_skipped_file(intact: Manifest) -> None:
    assert "broken.mp4 is not a readable video" in lines(intact, "broken.mp4")["skipped"]
    said = lines(intact, "short.mp4")
    assert "has 3 frames at stride 1 but a clip needs 5" in said["skipped"]
    assert said["samples"] == "0"
    assert said["frames"].startswith("3, 3 of them at stride 1: 0 in clips, 3 left over")


def test_explain_takes_the_end_of_a_name_if_it_is_unique(intact: Manifest, videos: Path) -> None:
    assert "dog/v_0_c0.mp4" in lines(intact, "v_0_c0.mp4")
    assert "ball/same.mp4" in lines(intact, "ball/same.mp4")
    assert "ball/same.mp4" in lines(intact, videos / "ball" / "same.mp4")
    with pytest.raises(InputError, match=r"same\.mp4 may mean ball/same\.mp4, dog/same\.mp4: give one of these names"):
        explain(intact, "same.mp4")


def test_explain_an_image_of_a_tar(intact: Manifest, videos: Path) -> None:
    said = lines(intact, "00000.tar/0001")
    assert said["00000.tar/0001"].startswith("image in a tar of")
    assert said["split"] == "train: the hash of 00000.tar/0001 is 0.5942, not below the fraction 0.2"
    assert said["size"].startswith("20x28 pixels; distances in log aspect ratio: 16x16 0.336 (chosen)")
    assert said["samples"] == "1"
    assert lines(intact, videos.parent / "tars" / "00000.tar" / "0001.png") == said
    for name in ("00000.tar/0002", "0002"):
        assert "0002.png of" in lines(intact, name)["skipped"]
    tar = lines(intact, "00000.tar")
    assert tar["samples"] == "3"
    assert "3 of 16x16 pixels for train" in tar
    assert lines(intact, "00000.tar/0009")["samples"] == "0"


def test_explain_a_file_that_is_not_in_the_data(intact: Manifest, tmp_path: Path) -> None:
    assert "nothing.mp4 is not in the data, and no such file" in explain(intact, "nothing.mp4")
    (tmp_path / "notes.doc").touch()
    assert "the extension '.doc' are not prepared" in explain(intact, str(tmp_path / "notes.doc"))
    other = draw_video(tmp_path / "videos" / "cat" / "v_9.mp4", frames=8, height=48, width=32)
    said = lines(intact, other)
    assert f"{other} is not in the data; with the same options, it would be there as cat/v_9.mp4" in said
    assert said["size"].startswith("48x32 pixels; distances in log aspect ratio: 24x16 0.000 (chosen)")
    assert said["samples"] == "1"
    assert "latents 2x16x3x2, 5 frames from 0 on" in said
    draw_tar(tmp_path / "tars" / "more.tar")
    assert lines(intact, tmp_path / "tars" / "more.tar")["samples"] == "3"
    same = draw_video(tmp_path / "same.mp4", frames=4)  # another file than the recorded ones of that name
    assert "has 4 frames" in lines(intact, same)["skipped"]


def test_explain_a_moved_file(copy: Path, videos: Path, tmp_path: Path) -> None:
    manifest, moved = Manifest.load(copy), tmp_path / "elsewhere" / "dog" / "v_0_c0.mp4"
    moved.parent.mkdir(parents=True)
    shutil.copy(videos / "dog" / "v_0_c0.mp4", moved)
    assert lines(manifest, moved)["size"].startswith("32x48 pixels")
    assert (
        lines(manifest, "dog/v_0_c0.mp4")["size"]
        == "16x24 pixels were chosen; for the reason give the path of the file"
    )
    (copy / "preparation" / "part-00000.json").unlink()
    assert "its part is not finished: run the same `prepare` command again" in explain(manifest, str(moved))


def test_explain_gives_the_reasons_of_splits_and_clips(tmp_path: Path) -> None:
    for number in range(4):
        draw_video(tmp_path / "videos" / f"v_{number // 2}_c{number}.mp4", frames=25)
    names = [f"v_{number // 2}_c{number}.mp4" for number in range(4)]

    patterned = prepared(tmp_path, source_pattern=r"v_\d", validation_fraction=0.01, clips_per_video=1, stride=2)
    splits = [lines(patterned, name)["split"] for name in names]
    assert all(re.search(r"the hash of v_\d is 0\.\d+, not below the fraction 0.01", said) for said in splits)
    assert sum(said.endswith("but each split gets at least one input file") for said in splits) == 2
    assert lines(patterned, names[0])["frames"] == (
        "25, 13 of them at stride 2: 5 in clips, 8 left over, since --clips_per_video is 1"
    )
    sibling = draw_video(tmp_path / "videos" / "v_0_c9.mp4", frames=6)
    assert lines(patterned, sibling)["split"].split(":")[0] == splits[0].split(":")[0]
    sibling.unlink()

    (tmp_path / "list.csv").write_text(f"source,split\n{names[0]},train\n{names[1]},train\n{names[2]},validation\n")
    annotated = prepared(
        tmp_path, out=tmp_path / "annotated", annotations=[tmp_path / "list.csv"], validation_fraction=0, clip_frames=9
    )
    assert lines(annotated, names[2])["split"] == "validation: an annotation file assigns it to this split"
    assert lines(annotated, names[0])["split"] == "train: an annotation file assigns it to this split"
    assert lines(annotated, names[3])["skipped"].startswith("the annotation files list other files")
    assert lines(annotated, tmp_path / names[3])["skipped"].startswith("the annotation files list other files")
    assert lines(annotated, names[0])["frames"].endswith("18 in clips, 7 left over, since a clip has 9 frames")

    (tmp_path / "held").mkdir()
    (tmp_path / "videos" / names[0]).rename(tmp_path / "held" / names[0])
    placed = prepared(
        tmp_path, out=tmp_path / "placed", validation_videos=[tmp_path / "held"], least_clip_frames=1, clip_step=7
    )
    assert lines(placed, f"held/{names[0]}")["split"] == "validation: it is in a held-out folder"
    assert lines(placed, names[1])["split"] == "train: it is in no held-out folder"
    assert lines(placed, names[1])["frames"].endswith(
        "a clip has 1 to 5 frames, 1 + 4 k, and the next begins 7 after its first"
    )
    new = draw_video(tmp_path / "x" / "held" / "new.mp4", frames=5)
    assert lines(placed, new)["split"] == "validation: it is in a held-out folder"


def test_sequences_have_no_records_of_input_files(tmp_path: Path) -> None:
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
