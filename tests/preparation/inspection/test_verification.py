"""Verification finds every kind of damage to prepared data."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gpdit_lightning.codecs import load_codec
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.shard_writer import ShardSetWriter
from gpdit_lightning.data.shards import index_path, shard_entry
from gpdit_lightning.preparation.inspection import unlisted_files, verify
from tests.preparation.inspection.prepared import SHARD, flip_bit, latent_offset


def faults(folder: Path) -> list[str]:
    return list(verify(Manifest.load(folder, check_files=False), workers=1))


def test_intact_shards_have_no_faults(intact: Manifest) -> None:
    assert isinstance(intact.directory, Path)
    assert faults(intact.directory) == []
    assert unlisted_files(intact) == []


@pytest.mark.parametrize("column", [0, 1])
def test_a_flipped_bit_in_latents_or_metadata_is_reported_with_its_sample(copy: Path, column: int) -> None:
    tar = copy / f"{SHARD}.tar"
    flip_bit(tar, int(np.load(copy / f"{SHARD}.index.npy")[2, column]) + 140 * (1 - column))
    messages = faults(copy)
    assert len(messages) == 2
    assert f"{tar} has another sha256 than in the manifest" in messages[0]
    assert f"sample 2 of {tar} is damaged (its checksum differs): copy the shard again or prepare" in messages[1]


@pytest.mark.parametrize("offset", [3, 60, -1])
def test_a_flipped_bit_in_an_index_is_reported(copy: Path, offset: int) -> None:
    index = copy / f"{SHARD}.index.npy"
    flip_bit(index, offset)
    (fault,) = faults(copy)
    assert f"{index} has another sha256" in fault


def test_an_index_beyond_all_sizes_is_not_read(copy: Path) -> None:
    index = copy / f"{SHARD}.index.npy"
    with index.open("r+b") as file:
        file.truncate(2**42)
    (fault,) = faults(copy)
    assert f"{index} has {2**42} bytes, more than the {2**30}" in fault


def test_missing_files_are_reported(copy: Path) -> None:
    other = next(path for path in sorted(copy.glob("*.tar")) if path.stem > SHARD)
    (copy / f"{SHARD}.index.npy").unlink()
    other.unlink()
    first, second = faults(copy)
    assert f"{SHARD}.index.npy is missing" in first
    assert f"{other.name} is missing" in second


def test_the_lost_samples_of_a_truncated_tar_are_reported(copy: Path) -> None:
    tar = copy / f"{SHARD}.tar"
    tar.write_bytes(tar.read_bytes()[: latent_offset(copy, SHARD, 2) + 100])
    size, broken, *samples = faults(copy)
    assert "(truncated or changed)" in size
    assert "not a readable tar" in broken
    count = len(np.load(copy / f"{SHARD}.index.npy"))
    assert [f"sample {number} of" in sample for number, sample in enumerate(samples, 2)] == [True] * (count - 2)


def test_more_than_ten_lost_samples_are_counted(tmp_path: Path) -> None:
    with ShardSetWriter(tmp_path) as writer:
        for number in range(14):
            writer.write("train", "image", np.full((1, 16, 2, 2), number), {"source": f"{number}"})
        shards = writer.close()
    Manifest(tmp_path, load_codec("pca").spec(), shards).save()
    tar = tmp_path / shards[0].path
    tar.write_bytes(tar.read_bytes()[:600])
    messages = faults(tmp_path)
    assert sum(fault.startswith("sample ") for fault in messages) == 10
    assert f"{tar} has 4 more samples with faults" in messages[-1]


def test_a_replaced_shard_is_reported(copy: Path) -> None:
    """The replacement is intact and has the same names, number of samples and size."""
    entry = next(entry for entry in Manifest.load(copy).shards if entry.path == f"{SHARD}.tar")
    content = (copy / entry.path).read_bytes()
    with ShardSetWriter(copy, part=0) as writer:
        for number in range(entry.count):
            writer.write("train", "video", np.full(entry.shape, number), {"source": "other"})
        writer.close()
    (copy / entry.path).write_bytes((copy / entry.path).read_bytes().ljust(len(content), b"\0")[: len(content)])
    messages = faults(copy)
    assert len(messages) == 2
    assert f"{entry.path} has another sha256" in messages[0]
    assert f"{entry.index} has another sha256" in messages[1]


def test_an_added_member_is_reported(copy: Path) -> None:
    tar = copy / f"{SHARD}.tar"
    with tarfile.open(tar, "a") as file:
        file.addfile(tarfile.TarInfo("evil.py"), io.BytesIO())
    assert "contains 'evil.py', which does not belong to a shard of latents" in "\n".join(faults(copy))


def test_faults_are_found_in_shards_that_match_their_manifest(copy: Path) -> None:
    """A renamed shard, or one with another index, with a manifest written for it."""
    manifest = Manifest.load(copy)
    entry = next(entry for entry in manifest.shards if entry.path == f"{SHARD}.tar")
    for path in (entry.path, entry.index):
        (copy / path).rename(copy / path.replace("-00000.", "-00007."))
    renamed = copy / f"{SHARD[:-1]}7.tar"
    replace(manifest, shards=(shard_entry(renamed, entry.split, entry.kind, entry.shape, entry.count),)).save()
    assert f"has the key '{SHARD}-000000' instead of '{renamed.stem}-000000'" in faults(copy)[0]

    renamed.rename(copy / entry.path)
    index = np.load(copy / f"{renamed.stem}.index.npy")
    index[[0, 1]] = index[[1, 0]]
    np.save(index_path(copy / entry.path), index)
    replace(
        manifest, shards=(shard_entry(copy / entry.path, entry.split, entry.kind, entry.shape, entry.count),)
    ).save()
    assert f"sample 0 of {copy / entry.path} has the key '{SHARD}-000001'" in faults(copy)[0]

    index[[0, 1]] = index[[1, 0]]
    np.save(index_path(copy / entry.path), index[:-1])
    replace(
        manifest, shards=(shard_entry(copy / entry.path, entry.split, entry.kind, entry.shape, entry.count - 1),)
    ).save()
    assert f"{entry.path} contains other samples than its index {copy / entry.index}" in faults(copy)[0]


def test_files_in_no_manifest_are_reported(intact: Manifest, copy: Path) -> None:
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
