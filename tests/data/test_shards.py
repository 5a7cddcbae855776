import errno
import gc
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import tarfile
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import webdataset

from gpdit_lightning import retries
from gpdit_lightning.data.buckets import Bucket
from gpdit_lightning.data.shard_entry import ShardEntry
from gpdit_lightning.data.shard_writer import ShardSetWriter, ShardWriter
from gpdit_lightning.data.shards import DamagedSampleError, ShardReader, build_index, checksum
from gpdit_lightning.errors import InputError, TransientError
from gpdit_lightning.regular_files import sha256_of

SHAPE = (3, 4, 2, 5)


def latent(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=SHAPE).astype(np.float32)


def write(directory: Path, count: int = 4) -> ShardEntry:
    writer = ShardWriter(directory, "train-video", "train", "video", SHAPE)
    for number in range(count):
        writer.write(f"sample-{number}", latent(number), {"source": f"vidéo {number}.mp4", "stride": 3})
    return writer.close()


class Bomb:
    """Ends the test run if it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.exit, ("a member was unpickled", 1)


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def test_samples_are_read_in_half_precision(tmp_path: Path) -> None:
    reader = ShardReader(tmp_path, write(tmp_path))
    assert len(reader) == 4
    for number in (2, 0, 3, 1):
        values, metadata = reader.read(number)
        assert np.array_equal(values, latent(number).astype(np.float16))
        assert metadata == {
            "key": f"sample-{number}",
            "kind": "video",
            "source": f"vidéo {number}.mp4",
            "stride": 3,
        }


def test_frames_reads_the_first_latent_frames(tmp_path: Path) -> None:
    reader = ShardReader(tmp_path, write(tmp_path))
    assert np.array_equal(reader.read(1, frames=2)[0], latent(1).astype(np.float16)[:2])
    for frames in (0, 4):
        with pytest.raises(InputError, match=f"has 3 latent frames and {frames} were requested"):
            reader.read(1, frames=frames)
    with pytest.raises(IndexError):
        reader.read(4)
    with pytest.raises(IndexError):
        reader.read(-1)


def test_webdataset_reads_a_shard(tmp_path: Path) -> None:
    entry = write(tmp_path)
    samples = list(webdataset.WebDataset(str(tmp_path / entry.path), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"sample-{number}" for number in range(4)]
    for number, sample in enumerate(samples):
        values = np.load(io.BytesIO(sample["latent.npy"]), allow_pickle=False)
        assert np.array_equal(values, latent(number).astype(np.float16))
        assert json.loads(sample["json"])["source"] == f"vidéo {number}.mp4"


def test_the_same_samples_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write(tmp_path / "a")
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert write(tmp_path / "b").sha256 == first.sha256
    assert write(tmp_path / "c", count=3).sha256 != first.sha256


def test_a_shard_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train-video", "train", "video", SHAPE)
    writer.write("a", latent(0), {})
    assert [path.name for path in tmp_path.iterdir()] == ["train-video.tar.partial"]
    writer.discard()
    assert list(tmp_path.iterdir()) == []
    write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train-video.index.npy", "train-video.tar"]


def test_invalid_samples_are_rejected_and_not_written(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "x", "train", "video", SHAPE)
    with pytest.raises(InputError, match=r"key 'a\.b'"):
        writer.write("a.b", latent(0), {})
    with pytest.raises(InputError, match=r"has shape \(1, 4, 2, 5\)"):
        writer.write("a", latent(0)[:1], {})
    for value in (1e6, np.nan, np.inf):
        with pytest.raises(InputError, match=r"the latents of big\.mp4 are not finite in float16"):
            writer.write("a", np.full(SHAPE, value, np.float32), {"source": "big.mp4"})
    writer.write("a", latent(0), {})
    assert writer.close().count == 1


def test_a_set_writes_separate_shards_for_each_split_kind_and_shape(tmp_path: Path) -> None:
    with ShardSetWriter(tmp_path, shard_size=2) as writer:
        for number in range(5):
            writer.write("train", "video", latent(number), {})
        writer.write("train", "image", latent(0)[:1], {})
        writer.write("validation", "video", latent(1), {})
        with pytest.raises(InputError, match="float16"):
            writer.write("validation", "image", np.full((1, 4, 2, 2), np.inf), {})
        entries = writer.close()
    assert [(entry.split, entry.kind, entry.shape, entry.count) for entry in entries] == [
        ("train", "image", (1, 4, 2, 5), 1),
        ("train", "video", SHAPE, 2),
        ("train", "video", SHAPE, 2),
        ("train", "video", SHAPE, 1),
        ("validation", "video", SHAPE, 1),
    ]
    keys = [ShardReader(tmp_path, entry).read(number)[1]["key"] for entry in entries for number in range(entry.count)]
    assert len(set(keys)) == 7
    assert len(list(tmp_path.iterdir())) == 10


def test_an_exception_leaves_no_incomplete_shard(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ShardSetWriter(tmp_path) as writer:
            writer.write("train", "video", latent(0), {})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_bit_damages_only_its_sample(tmp_path: Path) -> None:
    entry = write(tmp_path)
    reader = ShardReader(tmp_path, entry)
    offset = int(reader.index[2, 0]) + 200
    byte = (tmp_path / entry.path).read_bytes()[offset]
    overwrite(tmp_path / entry.path, offset, bytes([byte ^ 4]))
    with pytest.raises(
        DamagedSampleError, match=r"sample 2 of .*train-video\.tar is damaged \(its checksum differs\): copy"
    ):
        reader.read(2)
    assert np.array_equal(reader.read(1)[0], latent(1).astype(np.float16))


def test_broken_metadata_damages_the_sample(tmp_path: Path) -> None:
    entry = write(tmp_path)
    reader = ShardReader(tmp_path, entry)
    overwrite(tmp_path / entry.path, int(reader.index[0, 1]), b"\xff")
    with pytest.raises(DamagedSampleError, match="sample 0"):
        reader.read(0)


def test_a_truncated_or_missing_tar_damages_the_missing_samples(tmp_path: Path) -> None:
    entry = write(tmp_path)
    reader = ShardReader(tmp_path, entry)
    path = tmp_path / entry.path
    path.write_bytes(path.read_bytes()[: int(reader.index[3, 0]) + 50])
    assert reader.read(1)
    with pytest.raises(DamagedSampleError, match="sample 3"):
        reader.read(3)
    path.unlink()
    with pytest.raises(DamagedSampleError, match="No such file"):
        ShardReader(tmp_path, entry).read(1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(SHAPE, np.float32), "it is not a float16 array"),
        (np.zeros((3, 2, 4, 5), np.float16), r"it is not a float16 array \(3, 4, 2, 5\)"),
        (np.asfortranarray(np.zeros(SHAPE, np.float16)), "it is not a float16 array"),
        (np.full(SHAPE, np.nan, np.float16), "not finite"),
        (np.full(SHAPE, -np.inf, np.float16), "not finite"),
        (np.array([Bomb() for _ in range(math.prod(SHAPE))], dtype=object).reshape(SHAPE), "it is not a float16 array"),
    ],
)
def test_unexpected_arrays_are_rejected(tmp_path: Path, values: np.ndarray, message: str) -> None:
    """Even if their checksums match; and nothing is unpickled."""
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=True)
    content = buffer.getvalue()
    entry = write(tmp_path, count=1)
    (tmp_path / entry.path).write_bytes(content + b"{}")
    size = math.prod(SHAPE[1:]) * 2
    checksums = [checksum(content[start : start + size]) for start in range(128, 128 + 3 * size, size)]
    np.save(tmp_path / entry.index, np.array([[0, len(content), 2, checksum(b"{}"), *checksums]]))
    entry = replace(entry, index_sha256=sha256_of(tmp_path / entry.index))
    with pytest.raises(DamagedSampleError, match=message):
        ShardReader(tmp_path, entry).read(0)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x.pickle", "file"),
        ("../sample-0.json", "file"),
        ("/etc/sample-9.json", "file"),
        ("s.json", "link"),
        ("sample-0.json", "file"),
    ],
)
def test_a_tar_with_other_members_is_rejected(tmp_path: Path, name: str, kind: str) -> None:
    entry = write(tmp_path, count=2)
    content = pickle.dumps(Bomb())
    with tarfile.open(tmp_path / entry.path, "a") as tar:
        member = tarfile.TarInfo(name)
        if kind == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        member.size = 0 if kind == "link" else len(content)
        tar.addfile(member, io.BytesIO(content))
    with pytest.raises(InputError, match=r"which does not belong to a shard of latents: do not use this file"):
        build_index(tmp_path / entry.path, SHAPE)
    assert np.array_equal(ShardReader(tmp_path, entry).read(1)[0], latent(1).astype(np.float16))


@pytest.mark.parametrize("frames", [1, 2])
def test_damage_after_the_frames_that_are_read_is_ignored(tmp_path: Path, frames: int) -> None:
    entry = write(tmp_path)
    reader = ShardReader(tmp_path, entry)
    after = int(reader.index[2, 0]) + 128 + frames * math.prod(SHAPE[1:]) * 2
    overwrite(tmp_path / entry.path, after, b"\xff\xff\xff")
    assert np.array_equal(reader.read(2, frames)[0], latent(2).astype(np.float16)[:frames])
    with pytest.raises(DamagedSampleError):
        reader.read(2, frames + 1)


@pytest.mark.parametrize("content", [np.zeros((3, 7), np.int64), np.zeros((4, 7), np.float64), b"no array", None])
def test_an_invalid_index_is_reported(tmp_path: Path, content: Any) -> None:
    entry = write(tmp_path)
    index = tmp_path / entry.index
    if content is None:
        index.unlink()
    elif isinstance(content, bytes):
        index.write_bytes(content)
    else:
        np.save(index, content)
    with pytest.raises(InputError, match=r"train-video\.index\.npy"):
        ShardReader(tmp_path, entry).read(0)


def test_a_reader_that_is_no_longer_used_closes_its_file(tmp_path: Path) -> None:
    entry = write(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ShardReader(tmp_path, entry).read(0)
        gc.collect()
    assert not [str(warning.message) for warning in caught if warning.category is ResourceWarning]


def test_a_pickled_reader_does_not_contain_its_index(tmp_path: Path) -> None:
    reader = ShardReader(tmp_path, write(tmp_path, count=200))
    expected = [reader.read(number)[0] for number in range(20)]
    assert len(pickle.dumps(reader)) < 1000
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            found = pool.map(reader.read, range(20))
        assert all(np.array_equal(ours, theirs) for ours, (theirs, _) in zip(expected, found, strict=True))


def failing_pread(monkeypatch: pytest.MonkeyPatch, times: int, error: OSError) -> None:
    """Let the first reads fail, and return at most 100 bytes from the others."""
    pread, calls = os.pread, itertools.count()

    def read(file: int, size: int, offset: int) -> bytes:
        if next(calls) < times:
            raise error
        return pread(file, min(size, 100), offset)

    monkeypatch.setattr(os, "pread", read)
    monkeypatch.setattr(retries, "RETRY_DELAYS", (0.0, 0.0))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EINTR, errno.ETIMEDOUT])
def test_a_failed_read_is_attempted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    reader = ShardReader(tmp_path, write(tmp_path))
    expected, metadata = reader.read(1)
    failing_pread(monkeypatch, 2, OSError(number, os.strerror(number)))
    latents, text = reader.read(1)
    assert np.array_equal(latents, expected)
    assert text == metadata


def test_a_disk_that_fails_ends_the_training_and_replaces_no_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = write(tmp_path)
    bucket = Bucket([(SimpleNamespace(directory=tmp_path), entry)], [entry.shape[0]])  # type: ignore[list-item]
    failing_pread(monkeypatch, 3, OSError(errno.EIO, os.strerror(errno.EIO)))
    with pytest.raises(TransientError, match=r"\.tar could not be read \(Input/output error\): check its disk"):
        bucket.read(1)
    assert bucket.read(1).damaged == ()


def test_reads_that_end_early_are_not_called_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ShardReader(tmp_path, write(tmp_path))
    monkeypatch.setattr(os, "pread", lambda *_: b"")
    monkeypatch.setattr(retries, "RETRY_DELAYS", (0.0, 0.0))
    with pytest.raises(TransientError, match="a read ended before the end of the file"):
        reader.read(1)
