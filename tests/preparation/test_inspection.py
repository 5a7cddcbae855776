"""The inspection of prepared data, intact and damaged."""

import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from gpdit_lightning.codecs import load_codec
from gpdit_lightning.data.manifest import Manifest, ShardEntry
from gpdit_lightning.data.shard_writer import ShardSetWriter
from gpdit_lightning.data.shards import described, index_path
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.video import write_video
from gpdit_lightning.preparation import PrepareOptions, PreparePairsOptions, prepare, prepare_pairs
from gpdit_lightning.preparation.inspection import explain, overview, unlisted_files, verify, write_sheet
from gpdit_lightning.preparation.inspection.sampling import balanced, evenly_spaced
from gpdit_lightning.preparation.inspection.statistics import LatentStatistics
from gpdit_lightning.preparation.records import Records

BUCKET = "train-video-2x2x3-00000-00000"


def draw_video(path: Path, frames: int = 12, height: int = 32, width: int = 48) -> Path:
    numbers = np.random.default_rng(sum(map(ord, path.name)))
    image = torch.from_numpy(numbers.random((1, 3, 5, 7)))
    wide = torch.nn.functional.interpolate(image, (height, width + frames), mode="bilinear")[0]
    pixels = torch.stack([wide[..., frame : frame + width] for frame in range(frames)])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, (pixels * 255).to(torch.uint8), fps=24)
    return path


def draw_tar(path: Path) -> None:
    """Four images with captions; 0002 is broken."""
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as tar:
        for number in range(4):
            image = io.BytesIO(b"" if number != 2 else b"not an image")
            if number != 2:
                Image.new("RGB", (20 + 8 * number, 20), (50 * number, 100, 50)).save(image, "PNG")
            for ending, content in (("png", image.getvalue()), ("txt", f"caption {number}\nof two lines".encode())):
                member = tarfile.TarInfo(f"{number:04d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Videos, images and a tar of images, some of them broken or too short. Tests must not change it."""
    root = tmp_path_factory.mktemp("prepared")
    for number in range(6):
        draw_video(root / "videos" / ("ball" if number % 2 else "dog") / f"v_{number // 2}_c{number}.mp4")
    draw_video(root / "videos" / "ball" / "same.mp4", frames=9)
    draw_video(root / "videos" / "dog" / "same.mp4", frames=5, height=48, width=32)
    draw_video(root / "videos" / "short.mp4", frames=3)
    (root / "videos" / "broken.mp4").write_bytes(b"no video")
    (root / "images").mkdir()
    for name, size in (("wide", (30, 20)), ("square", (20, 20)), ("tall", (20, 30))):
        Image.new("RGB", size, (200, 100, 50)).save(root / "images" / f"{name}.png")
    draw_tar(root / "tars" / "00000.tar")
    return prepared(
        root,
        images=[root / "images"],
        image_tars=[str(root / "tars")],
        image_sizes=["16x16", "24x16"],
        labels=True,
        validation_fraction=0.2,
    )


def prepared(root: Path, **options: Any) -> Manifest:
    """`root / "videos"` prepared in `root / "out"`, with these options."""
    usual = {
        "codec": "pca",
        "stride": 1,
        "clip_frames": 5,
        "video_sizes": ["16x24", "24x16"],
        "device": "cpu",
        "workers": 0,
    }
    places = {"out": root / "out", "videos": [root / "videos"]}
    manifest = prepare(PrepareOptions(**usual | places | options))
    assert manifest is not None
    return manifest


@pytest.fixture
def copy(whole: Manifest, tmp_path: Path) -> Path:
    """A copy of the shards, to be damaged."""
    shutil.copytree(whole.directory, tmp_path / "copy")
    return tmp_path / "copy"


def faults(folder: Path) -> list[str]:
    return list(verify(Manifest.load(folder, check_files=False), workers=1))


def lines(manifest: Manifest, file: str | Path) -> dict[str, str]:
    """The lines about an input file, by the text before their first colon."""
    split = (line.strip().partition(": ") for line in explain(manifest, str(file)).splitlines())
    return {topic: text for topic, _, text in split}


# --- statistics


def test_statistics_are_those_of_all_values_together() -> None:
    numbers = np.random.default_rng(0)
    latents = [numbers.normal(1000, 0.1, (frames, 3, 2, width)) for frames, width in ((1, 1), (4, 7), (2, 3))]
    statistics = LatentStatistics(3)
    assert np.isnan(statistics.std).all()
    for latent in latents:
        statistics.add(latent)
    together = np.concatenate([latent.swapaxes(0, 1).reshape(3, -1) for latent in latents], axis=1)
    np.testing.assert_allclose(statistics.mean, together.mean(axis=1), rtol=1e-14)
    np.testing.assert_allclose(statistics.std, together.std(axis=1), rtol=1e-9)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Crops of two photographs, for which the codec's constants are right."""
    root = tmp_path_factory.mktemp("photographs")
    (root / "images").mkdir()
    for number, photograph in enumerate(load_sample_images().images):
        for place in range(12):
            top, left = place // 4 * 140, place % 4 * 160
            Image.fromarray(photograph[top : top + 140, left : left + 140]).save(
                root / "images" / f"{number}_{place}.png"
            )
    return prepared(root, videos=(), images=[root / "images"], image_sizes=["64x64"])


def with_codec(manifest: Manifest, **constants: Callable[[np.ndarray], np.ndarray]) -> str:
    changed = {name: tuple(change(np.array(getattr(manifest.codec, name)))) for name, change in constants.items()}
    return overview(replace(manifest, codec=replace(manifest.codec, **changed))).splitlines()[-1]


def test_constants_of_another_codec_are_noticed(photographs: Manifest) -> None:
    assert with_codec(photographs).endswith(": as expected")
    for change in (
        {"std": lambda std: std * 4},
        {"std": lambda std: std / 4},
        {"std": np.ones_like, "mean": np.zeros_like},
        {"mean": lambda mean: mean + 3},
    ):
        assert with_codec(photographs, **change).startswith("WARNING: whitened: mean")


def test_a_few_unusual_channels_give_no_warning(photographs: Manifest) -> None:
    def change(std: np.ndarray) -> np.ndarray:
        return std * np.where(np.isin(np.arange(16), (3, 7)), 4, 1)

    assert re.search(r"^whitened: .*channels 3, 7 are outside the usual range", with_codec(photographs, std=change))


def test_damaged_samples_are_named_and_skipped_in_the_statistics(copy: Path) -> None:
    flip(copy / f"{BUCKET}.tar", latent_of(copy, BUCKET, 1))
    said = overview(Manifest.load(copy))
    assert f"Sample 1 of {copy / BUCKET}.tar is damaged" in said
    total = sum(entry.count for entry in Manifest.load(copy).of_split("train"))
    assert f"over {total - 1} of {total} samples" in said


def shard(count: int, kind: str = "video") -> ShardEntry:
    return ShardEntry(f"{kind}{count}.tar", "", "train", kind, (1, 1, 1, 1), count, 1, "", "")


def test_samples_are_evenly_spaced() -> None:
    shards = [shard(count) for count in (5, 1, 14)]
    everything = [(entry, number) for entry in shards for number in range(entry.count)]
    assert evenly_spaced(shards, 20) == evenly_spaced(shards, 99) == everything
    assert evenly_spaced(shards, 4) == [everything[place] for place in (2, 7, 12, 17)]
    assert evenly_spaced([], 4) == []


def test_every_bucket_has_an_equal_share_as_far_as_it_has_samples() -> None:
    shards = [shard(2, "image"), shard(30, "video"), shard(9, "sequence")]
    picked = balanced(shards, 12)
    assert [sum(entry.kind == kind for entry, _ in picked) for kind in ("image", "video", "sequence")] == [2, 5, 5]
    assert [number for entry, number in picked if entry.kind == "video"] == [3, 9, 15, 21, 27]
    assert len(balanced(shards, 2)) == 2
    assert len(balanced(shards, 99)) == 41


# --- verify


def latent_of(folder: Path, name: str, number: int) -> int:
    """Where a sample's latents begin in a tar."""
    return int(np.load(folder / f"{name}.index.npy")[number, 0])


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 16
    path.write_bytes(content)


def test_intact_shards_have_no_faults(whole: Manifest) -> None:
    assert isinstance(whole.directory, Path)
    assert faults(whole.directory) == []
    assert unlisted_files(whole) == []


@pytest.mark.parametrize("column", [0, 1])
def test_a_flipped_bit_in_latents_or_metadata_names_the_sample(copy: Path, column: int) -> None:
    tar = copy / f"{BUCKET}.tar"
    flip(tar, int(np.load(copy / f"{BUCKET}.index.npy")[2, column]) + 140 * (1 - column))
    found = faults(copy)
    assert len(found) == 2
    assert f"{tar} has another sha256 than in the manifest" in found[0]
    assert f"Sample 2 of {tar} is damaged (its checksum differs): copy the shard again or prepare" in found[1]


@pytest.mark.parametrize("offset", [3, 60, -1])
def test_a_flipped_bit_in_an_index_is_named(copy: Path, offset: int) -> None:
    index = copy / f"{BUCKET}.index.npy"
    flip(index, offset)
    (fault,) = faults(copy)
    assert f"{index} has another sha256" in fault


def test_missing_files_are_named(copy: Path) -> None:
    (copy / f"{BUCKET}.index.npy").unlink()
    (copy / "train-video-2x3x2-00000-00000.tar").unlink()
    first, second = faults(copy)
    assert f"{BUCKET}.index.npy is missing" in first
    assert "train-video-2x3x2-00000-00000.tar is missing" in second


def test_the_lost_samples_of_a_truncated_tar_are_named(copy: Path) -> None:
    tar = copy / f"{BUCKET}.tar"
    tar.write_bytes(tar.read_bytes()[: latent_of(copy, BUCKET, 2) + 100])
    size, broken, *samples = faults(copy)
    assert "so it was truncated or changed" in size
    assert "no readable tar" in broken
    count = len(np.load(copy / f"{BUCKET}.index.npy"))
    assert [f"Sample {number} of" in sample for number, sample in enumerate(samples, 2)] == [True] * (count - 2)


def test_more_than_ten_lost_samples_are_counted(tmp_path: Path) -> None:
    with ShardSetWriter(tmp_path) as writer:
        for number in range(14):
            writer.write("train", "image", np.full((1, 16, 2, 2), number), {"source": f"{number}"})
        shards = writer.close()
    Manifest(tmp_path, load_codec("pca").spec(), shards).save()
    tar = tmp_path / shards[0].path
    tar.write_bytes(tar.read_bytes()[:600])
    found = faults(tmp_path)
    assert sum("Sample" in fault for fault in found) == 10
    assert f"{tar} has 4 more samples with faults" in found[-1]


def test_a_replaced_shard_is_named(copy: Path) -> None:
    """By an intact one with the same names, number of samples and size."""
    entry = next(entry for entry in Manifest.load(copy).shards if entry.path == f"{BUCKET}.tar")
    content = (copy / entry.path).read_bytes()
    with ShardSetWriter(copy, part=0) as writer:
        for number in range(entry.count):
            writer.write("train", "video", np.full(entry.shape, number), {"source": "other"})
        writer.close()
    (copy / entry.path).write_bytes((copy / entry.path).read_bytes().ljust(len(content), b"\0")[: len(content)])
    found = faults(copy)
    assert len(found) == 2
    assert f"{entry.path} has another sha256" in found[0]
    assert f"{entry.index} has another sha256" in found[1]


def test_an_added_member_is_named(copy: Path) -> None:
    tar = copy / f"{BUCKET}.tar"
    with tarfile.open(tar, "a") as file:
        file.addfile(tarfile.TarInfo("evil.py"), io.BytesIO())
    said = "\n".join(faults(copy))
    assert "holds 'evil.py', which is no part of a shard of latents" in said


def test_faults_are_found_though_the_manifest_agrees_with_the_files(copy: Path) -> None:
    """Shards that were renamed, or have another index, with a manifest written for them."""
    manifest = Manifest.load(copy)
    entry = next(entry for entry in manifest.shards if entry.path == f"{BUCKET}.tar")
    for path in (entry.path, entry.index):
        (copy / path).rename(copy / path.replace("-00000.", "-00007."))
    renamed = copy / f"{BUCKET[:-1]}7.tar"
    replace(manifest, shards=(described(renamed, entry.split, entry.kind, entry.shape, entry.count),)).save()
    assert f"has the key '{BUCKET}-000000' instead of '{renamed.stem}-000000'" in faults(copy)[0]

    renamed.rename(copy / entry.path)
    index = np.load(copy / f"{renamed.stem}.index.npy")
    index[[0, 1]] = index[[1, 0]]
    np.save(index_path(copy / entry.path), index)
    replace(manifest, shards=(described(copy / entry.path, entry.split, entry.kind, entry.shape, entry.count),)).save()
    assert f"Sample 0 of {copy / entry.path} has the key '{BUCKET}-000001'" in faults(copy)[0]

    index[[0, 1]] = index[[1, 0]]
    np.save(index_path(copy / entry.path), index[:-1])
    replace(
        manifest, shards=(described(copy / entry.path, entry.split, entry.kind, entry.shape, entry.count - 1),)
    ).save()
    assert f"{entry.path} holds other samples than {copy / entry.index} lists" in faults(copy)[0]


def test_files_in_no_manifest_are_listed(whole: Manifest, copy: Path) -> None:
    others = {"shards": [{"path": "old.tar", "index": "old.index.npy"}]}
    (copy / "manifest-0123456789abcdef.json").write_text(json.dumps(others))
    for name in ("old.tar", "old.index.npy", "notes.txt", "manifest-mine.json", "train-video-2x2x3-00009-00000.tar"):
        (copy / name).touch()
    assert unlisted_files(Manifest.load(copy)) == [
        "manifest-mine.json",
        "notes.txt",
        "train-video-2x2x3-00009-00000.tar",
    ]
    (copy / "preparation" / "part-00000.json").unlink()  # unfinished
    (copy / "train-video-2x2x3-00000-00009.tar.partial").touch()
    assert "train-video-2x2x3-00000-00009.tar.partial" not in unlisted_files(Manifest.load(copy))


# --- show


def test_a_sheet_keeps_the_aspect_ratio_of_images(whole: Manifest, tmp_path: Path) -> None:
    codec, buckets = load_codec("pca"), sorted({(entry.kind, entry.shape, entry.split) for entry in whole.shards})
    assert write_sheet(tmp_path / "sheet.png", whole, len(buckets), codec) == []
    sheet = np.array(Image.open(tmp_path / "sheet.png")).astype(int)
    coloured = sheet.max(axis=2) - sheet.min(axis=2) > 20  # neither background nor text
    for row, (kind, (_, _, height, width), _) in enumerate(buckets):
        if kind == "image":
            columns = np.flatnonzero(coloured[24 + row * 132 :][:128].any(axis=0))
            assert abs(columns[-1] - columns[0] + 1 - 128 * width / height) < 3
    write_sheet(tmp_path / "again.png", whole, len(buckets), codec)
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "sheet.png").read_bytes()


def test_damaged_samples_are_skipped_on_a_sheet(copy: Path, tmp_path: Path) -> None:
    codec, total = load_codec("pca"), sum(entry.count for entry in Manifest.load(copy).shards)
    flip(copy / f"{BUCKET}.tar", latent_of(copy, BUCKET, 1))
    (damaged,) = write_sheet(tmp_path / "sheet.png", Manifest.load(copy), total, codec)
    assert f"Sample 1 of {copy / BUCKET}.tar" in damaged
    for tar in copy.glob("*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    with pytest.raises(InputError, match=r"No sample of .* can be shown; the first: Sample"):
        write_sheet(tmp_path / "sheet.png", Manifest.load(copy), total, codec)


# --- explain


@pytest.fixture
def videos(whole: Manifest) -> Path:
    assert isinstance(whole.directory, Path)
    return whole.directory.parent / "videos"


def test_explain_a_training_video(whole: Manifest, videos: Path) -> None:
    name = next(source.name for source in Records(whole.directory).files_of_part(0) if source.split == "train")
    said = explain(whole, name)
    assert said == explain(whole, str(videos / name))
    said = lines(whole, "dog/v_0_c0.mp4")
    size = (videos / "dog/v_0_c0.mp4").stat().st_size
    assert said["dog/v_0_c0.mp4"] == f"video of {size} bytes, in part 0"
    assert said["split"] == "train: the hash of dog/v_0_c0.mp4 is 0.2719, not below the fraction 0.2"
    assert said["size"] == "32x48 pixels; distances in log aspect ratio: 16x24 0.000 (chosen), 24x16 0.811"
    assert said["frames"] == "12, 12 of them at stride 1: 10 in clips, 2 left over, since a clip has 5 frames"
    assert said["samples"] == "2"
    shown = [(key, text) for key, text in said.items() if key.startswith("train-")]
    assert [text for _, text in shown] == [f"latents 2x16x2x3, 5 frames from {first} on" for first in (0, 5)]
    assert all(re.fullmatch(rf"{BUCKET}-\d{{6}} of {BUCKET}.tar", key) for key, _ in shown)


def test_explain_a_held_out_file(whole: Manifest) -> None:
    name = next(source.name for source in Records(whole.directory).files_of_part(0) if source.split == "validation")
    said = lines(whole, name)
    assert re.fullmatch(r"validation: the hash of \S+ is 0\.[01]\d+, below the fraction 0.2", said["split"])
    assert any(key.startswith("validation-video") for key in said)


def test_explain_a_skipped_file(whole: Manifest) -> None:
    assert "broken.mp4 is no readable video" in lines(whole, "broken.mp4")["skipped"]
    said = lines(whole, "short.mp4")
    assert "has 3 frames at stride 1 but a clip needs 5" in said["skipped"]
    assert said["samples"] == "0"
    assert said["frames"].startswith("3, 3 of them at stride 1: 0 in clips, 3 left over")


def test_explain_takes_the_end_of_a_name_if_it_is_unique(whole: Manifest, videos: Path) -> None:
    assert "dog/v_0_c0.mp4" in lines(whole, "v_0_c0.mp4")
    assert "ball/same.mp4" in lines(whole, "ball/same.mp4")
    assert "ball/same.mp4" in lines(whole, videos / "ball" / "same.mp4")
    with pytest.raises(InputError, match=r"same\.mp4 may mean ball/same\.mp4, dog/same\.mp4: give one of these names"):
        explain(whole, "same.mp4")


def test_explain_an_image_of_a_tar(whole: Manifest, videos: Path) -> None:
    said = lines(whole, "00000.tar/0001")
    assert said["00000.tar/0001"].startswith("image in a tar of")
    assert said["split"] == "train: the hash of 00000.tar/0001 is 0.5942, not below the fraction 0.2"
    assert said["size"].startswith("20x28 pixels; distances in log aspect ratio: 16x16 0.336 (chosen)")
    assert said["samples"] == "1"
    assert lines(whole, videos.parent / "tars" / "00000.tar" / "0001.png") == said
    for name in ("00000.tar/0002", "0002"):
        assert "0002.png of" in lines(whole, name)["skipped"]
    tar = lines(whole, "00000.tar")
    assert tar["samples"] == "3"
    assert "3 of 16x16 pixels for train" in tar
    assert lines(whole, "00000.tar/0009")["samples"] == "0"


def test_explain_a_file_that_is_not_in_the_data(whole: Manifest, tmp_path: Path) -> None:
    assert "nothing.mp4 is not in the data, and no such file" in explain(whole, "nothing.mp4")
    (tmp_path / "notes.doc").touch()
    assert "the extension '.doc' are not prepared" in explain(whole, str(tmp_path / "notes.doc"))
    other = draw_video(tmp_path / "videos" / "cat" / "v_9.mp4", frames=8, height=48, width=32)
    said = lines(whole, other)
    assert f"{other} is not in the data; with the same options, it would be there as cat/v_9.mp4" in said
    assert said["size"].startswith("48x32 pixels; distances in log aspect ratio: 24x16 0.000 (chosen)")
    assert said["samples"] == "1"
    assert "latents 2x16x3x2, 5 frames from 0 on" in said
    draw_tar(tmp_path / "tars" / "more.tar")
    assert lines(whole, tmp_path / "tars" / "more.tar")["samples"] == "3"
    same = draw_video(tmp_path / "same.mp4", frames=4)  # another file than the recorded ones of that name
    assert "has 4 frames" in lines(whole, same)["skipped"]


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
    assert lines(annotated, names[2])["split"] == "validation: the annotations say so"
    assert lines(annotated, names[0])["split"] == "train: the annotations say so"
    assert lines(annotated, names[3])["skipped"].startswith("no annotation file names it")
    assert lines(annotated, tmp_path / names[3])["skipped"].startswith("no annotation file names it")
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
    assert faults(tmp_path / "out") == []
    assert unlisted_files(manifest) == []
    assert write_sheet(tmp_path / "sheet.png", manifest, 3, load_codec("pca")) == []
    with pytest.raises(InputError, match=r"has no folder 'preparation' with records of the input files"):
        explain(manifest, "p0.png")
