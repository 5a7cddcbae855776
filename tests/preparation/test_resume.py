"""Interrupting, extending or dividing a preparation neither loses nor duplicates samples."""

import errno
import fcntl
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpdit_lightning import retries
from gpdit_lightning.cli import main
from gpdit_lightning.codecs import load_codec
from gpdit_lightning.data import shard_writer
from gpdit_lightning.data.manifest import SKIPPED_NAME, Manifest
from gpdit_lightning.data.shards import ShardReader
from gpdit_lightning.errors import InputError
from gpdit_lightning.media import video
from gpdit_lightning.media.video_writer import write_video
from gpdit_lightning.preparation import PrepareOptions, clips, parts, prepare
from gpdit_lightning.preparation.input_files import InputFile
from gpdit_lightning.preparation.interleave import read_clips
from gpdit_lightning.preparation.record_formats import PartResult

STOPPED = "stopped: complete shards are kept, and the same command resumes."


def draw(path: Path, frames: int, height: int = 16) -> None:
    pixels = np.random.default_rng(sum(map(ord, path.name))).integers(0, 255, (1, 3, height, 24), dtype=np.uint8)
    moving = [torch.from_numpy(np.roll(pixels[0], shift, axis=2)) for shift in range(frames)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, torch.stack(moving), fps=24)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 videos of 4 to 15 frames, wide and tall, and a file that is not a video."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(40):
        draw(folder / f"{number % 3}" / f"m{number}.mp4", frames=4 + number * 7 % 12, height=16 if number % 4 else 48)
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture
def options(tmp_path: Path, videos: Path) -> PrepareOptions:
    return options_for(tmp_path / "out", videos)


def options_for(out: Path, videos: Path) -> PrepareOptions:
    """Return options for shards of 4 samples, batches of 3 and parts of 25 videos."""
    return PrepareOptions(
        out=out,
        videos=[videos],
        codec="pca",
        stride=1,
        clip_frames=5,
        least_clip_frames=1,
        video_sizes=["16x24", "24x16"],
        validation_fraction=0.2,
        shard_size=4,
        part_size=25,
        batch_size=3,
        workers=0,
        device="cpu",
    )


@pytest.fixture(scope="module")
def uninterrupted(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Result of an uninterrupted run of one process with `options`."""
    return prepared(options_for(tmp_path_factory.mktemp("uninterrupted") / "out", videos))


def prepared(options: PrepareOptions) -> Manifest:
    manifest = prepare(options)
    assert manifest is not None
    return manifest


def identities(manifest: Manifest) -> list[tuple[Any, ...]]:
    """Return split, source and first frame of every sample, in the order of the shards."""
    samples = []
    for entry in manifest.shards:
        reader = ShardReader(manifest.directory, entry)
        for number in range(entry.count):
            metadata = reader.read(number)[1]
            samples.append((entry.split, metadata["source"], metadata["first_frame"]))
    return samples


def records_of(manifest: Manifest) -> dict[str, bytes]:
    """Return the records of a preparation by name."""
    return {path.name: path.read_bytes() for path in (Path(str(manifest.directory)) / "preparation").glob("*.json*")}


def modification_times(out: Path) -> dict[str, int]:
    """Return the modification time of each tar."""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}


def arguments(options: PrepareOptions) -> list[str]:
    """Return the command-line arguments for these options."""
    names = ("codec", "stride", "clip_frames", "least_clip_frames", "validation_fraction", "shard_size", "part_size")
    values = {name: [str(getattr(options, name))] for name in ("out", "batch_size", "workers", "device", *names)}
    values |= {name: [str(value) for value in getattr(options, name)] for name in ("videos", "video_sizes")}
    return [word for name, words in values.items() for word in (f"--{name}", *words)]


def start(options: PrepareOptions, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gpdit_lightning", "prepare", *arguments(options)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def interrupt_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the codec raise KeyboardInterrupt after this many batches."""
    codec = load_codec("pca")
    encode, encoded = codec.encode, Counter[str]()

    def interrupted(pixels: torch.Tensor) -> torch.Tensor:
        encoded["batches"] += 1
        if encoded["batches"] > batches:
            raise KeyboardInterrupt
        return encode(pixels)

    monkeypatch.setattr(codec, "encode", interrupted)
    monkeypatch.setattr(parts, "load_codec", lambda *_: codec)


def prepare_until(batches: int, options: PrepareOptions) -> None:
    """Run a preparation that is interrupted after this many batches."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(batches, patch)
        with pytest.raises(KeyboardInterrupt):
            prepare(options)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_order_of_items_does_not_depend_on_the_number_of_processes(videos: Path, options: PrepareOptions) -> None:
    """There are more files than are interleaved, with different lengths."""
    paths = sorted(videos.rglob("*.mp4"))
    files = [InputFile(path, path.name, "video", "train", path.stat().st_size) for path in paths]
    sequences = []
    for workers in (0, 1, 2, 8):
        items = read_clips(files, options, 4, workers)
        sequences.append([(type(item).__name__, item.file, getattr(item, "metadata", None)) for item in items])
    assert len(sequences[0]) > 2 * len(files)
    assert all(sequence == sequences[0] for sequence in sequences)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_shards_do_not_depend_on_the_number_of_processes(options: PrepareOptions, uninterrupted: Manifest) -> None:
    assert prepared(replace(options, workers=3)).shards == uninterrupted.shards


@pytest.mark.parametrize("batches", [0, 5, 13, 20])
def test_a_resumed_run_writes_the_same_shards(options: PrepareOptions, uninterrupted: Manifest, batches: int) -> None:
    prepare_until(batches, options)
    assert not (options.out / "manifest.json").exists()
    before = modification_times(options.out)
    names = {shard.path for shard in uninterrupted.shards}
    assert before.keys() < names
    assert bool(before) == (batches > 4)
    assert prepared(options).shards == uninterrupted.shards
    assert {name: time for name, time in modification_times(options.out).items() if name in before} == before, (
        "shards were rewritten"
    )


def test_a_repeatedly_interrupted_run_finishes(options: PrepareOptions, uninterrupted: Manifest) -> None:
    for _ in range(3):
        prepare_until(14, options)
    manifest = prepared(options)
    assert manifest.shards == uninterrupted.shards
    assert records_of(manifest) == records_of(uninterrupted)


def test_a_killed_process_leaves_only_complete_shards(options: PrepareOptions, uninterrupted: Manifest) -> None:
    """The process receives SIGKILL at random times."""
    generator = np.random.default_rng(0)
    names = {shard.path for shard in uninterrupted.shards}
    before: dict[str, int] = {}
    for attempt in range(3):
        process = start(replace(options, workers=2 * (attempt % 2)))
        while process.poll() is None and not (options.out / "preparation").exists():
            time.sleep(0.02)  # the imports take seconds
        try:
            process.communicate(timeout=float(generator.uniform(0, 0.6 + attempt / 4)))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        after = modification_times(options.out)
        assert {name: after.get(name) for name in before} == before
        assert after.keys() <= names
        before = after
    assert prepared(options).shards == uninterrupted.shards
    assert not list(options.out.rglob("*.partial"))


def test_a_signal_just_after_a_shard_has_its_name_leaves_it_complete(
    options: PrepareOptions, uninterrupted: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = shard_writer.publish

    def interrupted(path: Path) -> None:
        publish(path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(options)
    assert list(options.out.glob("*.tar"))
    assert prepared(options).shards == uninterrupted.shards


def test_ctrl_c_prints_one_line(
    options: PrepareOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_after(3, monkeypatch)
    assert main(["prepare", *arguments(options)]) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == STOPPED


def test_a_damaged_shard_of_an_interrupted_run_is_reported(options: PrepareOptions, uninterrupted: Manifest) -> None:
    prepare_until(9, options)
    shard = min(options.out.glob("*.tar"))
    intact = shard.read_bytes()
    latents, metadata = np.load(shard.with_suffix(".index.npy"))[0, :2]
    delete = f"delete {shard.name} and {shard.stem}.index.npy and run the same command again"
    for offset in (10, int(latents) + 200, int(metadata) + 5):  # in the name of a member, latents and metadata
        content = bytearray(intact)
        content[offset] ^= 1
        shard.write_bytes(content)
        with pytest.raises(InputError, match=rf"{shard.name} .*(does not match its index: delete it|{delete})"):
            prepare(options)
    shard.write_bytes(intact[: len(intact) // 2])
    with pytest.raises(InputError, match=rf"{shard.name} .*{delete}"):
        prepare(options)
    shard.unlink()  # its samples are encoded again into another shard
    assert Counter(identities(prepared(options))) == Counter(identities(uninterrupted))


def test_a_result_that_lists_a_shard_twice_is_refused(uninterrupted: Manifest) -> None:
    """Its samples would be doubled."""
    shard = uninterrupted.shards[0]
    part = int(re.findall(r"-(\d{5})-", shard.path)[0])
    for shards, expected in (((shard,), None), ((shard, shard), "lists a shard twice")):
        result = PartResult(shards, {"train": 1, "validation": 0}, (), (), (), ())
        content = json.loads(json.dumps(result.to_dict(part)))
        if expected is None:
            assert PartResult.from_dict(content, part, "part.json") == result
        else:
            with pytest.raises(InputError, match=expected):
                PartResult.from_dict(content, part, "part.json")


def test_new_videos_are_added_to_existing_shards(options: PrepareOptions, videos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "growing"

    def copy(paths: list[Path]) -> None:
        for path in paths:
            (folder / path.relative_to(videos)).parent.mkdir(parents=True, exist_ok=True)
            (folder / path.relative_to(videos)).write_bytes(path.read_bytes())

    copy(sorted(videos.rglob("*.mp4"))[:20])
    growing = replace(options, videos=[folder], labels=True)
    first = prepared(growing)
    before = modification_times(options.out)
    copy(sorted(videos.rglob("*.mp4")))
    draw(folder / "0a" / "new.mp4", frames=7)
    second = prepared(growing)
    assert set(first.shards) < set(second.shards)
    after = modification_times(options.out)
    assert {name: after[name] for name in before} == before
    assert second.labels[: len(first.labels)] == first.labels, "the position of a label is its class number"
    assert "0a" in second.labels
    assert max(Counter(identities(second)).values()) == 1
    splits = {source: split for split, source, _ in identities(first)}
    later = {source: split for split, source, _ in identities(second)}
    assert later.keys() > splits.keys() | {"0a/new.mp4"}
    assert {source: later[source] for source in splits} == splits
    previous = options.out / f"manifest-{first.fingerprint()[:16]}.json"
    assert Manifest.load(previous).shards == first.shards, "a training run on the old data can resume"
    assert prepared(growing) == second


def test_a_skipped_file_is_retried_when_it_changes(options: PrepareOptions, tmp_path: Path) -> None:
    folder = tmp_path / "repaired"
    for number in range(3):
        draw(folder / f"{number}.mp4", frames=6)
    content = (folder / "1.mp4").read_bytes()
    (folder / "1.mp4").write_bytes(content[:500])
    first = prepared(replace(options, videos=[folder]))
    assert [json.loads(line)["source"] for line in (first.directory / SKIPPED_NAME).open()] == ["1.mp4"]
    (folder / "1.mp4").write_bytes(content)
    second = prepared(replace(options, videos=[folder]))
    assert second.skipped == 0
    assert (first.directory / SKIPPED_NAME).read_text() == ""
    assert {source for _, source, _ in identities(second)} == {"0.mp4", "1.mp4", "2.mp4"}


def test_skipped_files_are_retried_on_request(options: PrepareOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example, after a failure of the file server."""

    def fail(*_: Any) -> None:
        raise InputError("the server is down")

    monkeypatch.setattr(clips, "video_info", fail)
    with pytest.raises(InputError, match=r"none of the 41 input files .*\. The first reason: the server is down"):
        prepare(options)
    monkeypatch.undo()
    first = prepared(options)
    assert first.skipped == 1
    again = prepared(replace(options, retry_skipped=True))
    assert again.shards == first.shards
    assert again.skipped == 1


def test_images_of_a_retried_tar_are_counted_once(options: PrepareOptions, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "broken.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("folder/image.png"))  # an empty file
    options = replace(options, image_tars=[str(tmp_path / "broken.tar")])
    assert prepared(options).skipped == 2  # the broken video is the other one
    assert prepared(replace(options, retry_skipped=True)).skipped == 2


def test_a_file_that_could_not_be_read_is_retried_by_the_next_run(
    options: PrepareOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading address 0 of a process's memory is a genuine EIO of the kernel; the next run finds the file complete."""
    monkeypatch.setattr(retries, "RETRY_DELAYS", (0.0, 0.0))
    folder = tmp_path / "videos"
    for number in range(3):
        draw(folder / f"{number}.mp4", frames=6)
    link, content = folder / "1.mp4", (folder / "1.mp4").read_bytes()
    size = link.stat().st_size
    link.unlink()
    link.symlink_to("/proc/self/mem")
    first = prepared(replace(options, videos=[folder]))
    (entry,) = [json.loads(line) for line in (first.directory / SKIPPED_NAME).open()]
    assert entry["retry"] is True
    assert "could not be read (Input/output error)" in entry["reason"]
    assert "replace or remove" not in entry["reason"]
    link.unlink()
    link.write_bytes(content)
    assert link.stat().st_size == size
    for _ in range(2):
        second = prepared(replace(options, videos=[folder]))
        assert {source for _, source, _ in identities(second)} == {"0.mp4", "1.mp4", "2.mp4"}
        assert max(Counter(identities(second)).values()) == 1
        assert second.skipped == 0
    assert prepared(replace(options, videos=[folder], retry_skipped=True)).shards == second.shards


def test_a_file_that_grows_while_it_is_read_is_not_called_damaged(options: PrepareOptions, tmp_path: Path) -> None:
    """A copy in progress: the file is complete for the next run."""
    folder = tmp_path / "videos"
    for number in range(3):
        draw(folder / f"{number}.mp4", frames=6)
    growing, content = folder / "1.mp4", (folder / "1.mp4").read_bytes()
    file = InputFile(growing, "1.mp4", "video", "train", len(content))
    growing.write_bytes(content[:500])
    items = list(clips.ClipReader(options, 4).items(0, file))
    assert [type(item) for item in items] == [clips.SkippedInput, clips.EndOfFile]
    assert items[0].retry
    assert f"had {len(content)} bytes when it was listed and has 500 now" in items[0].reason


@pytest.mark.parametrize("failure", ["memory", "disk"])
def test_a_failure_amid_a_file_ends_the_run_which_resumes(
    options: PrepareOptions, uninterrupted: Manifest, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    monkeypatch.setattr(retries, "RETRY_DELAYS", (0.0, 0.0))
    resize, calls = video.resize_and_crop, itertools.count()

    def fail(*args: Any) -> Any:
        if next(calls) > 60:
            raise MemoryError if failure == "memory" else OSError(errno.EIO, "Input/output error")
        return resize(*args)

    monkeypatch.setattr(video, "resize_and_crop", fail)
    with pytest.raises(InputError, match=f"could not be read.*({failure}|Input).*run the same command again"):
        prepare(options)
    monkeypatch.undo()
    assert prepared(options).shards == uninterrupted.shards


def test_several_processes_divide_the_work(options: PrepareOptions, uninterrupted: Manifest) -> None:
    """One process is rank 1 of 2, as set by torchrun; the other has no rank."""
    processes = [start(options, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1"), start(options)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert Manifest.load(options.out).shards == uninterrupted.shards
    assert any("next: python -m gpdit_lightning fit" in output for output, _ in outputs)


@contextmanager
def locked_elsewhere(path: Path) -> Iterator[None]:
    """Hold a lock in another process, since record locks do not exclude the same process."""
    path.touch()
    ready, done = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        with path.open("a") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        yield
    finally:
        os.write(done[1], b"x")
        os.waitpid(child, 0)
        for descriptor in (*ready, *done):
            os.close(descriptor)


def test_a_process_that_ends_before_others_writes_no_manifest(
    options: PrepareOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_until(0, options)
    with locked_elsewhere(options.out / "preparation" / "part-00001.lock"):
        assert main(["prepare", *arguments(options)]) == 0
        assert f"Other processes are still encoding for {options.out}" in capsys.readouterr().out
        assert not (options.out / "manifest.json").exists()
    assert prepared(options)


def test_a_full_disk_is_reported_and_complete_shards_are_kept(options: PrepareOptions, uninterrupted: Manifest) -> None:
    """A limit on file sizes simulates a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"out has no space left \(File too large\): free some space and run"):
            prepare(options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(options.out.rglob("*.partial"))
    assert not (options.out / "manifest.json").exists()
    assert prepared(options).shards == uninterrupted.shards


def test_an_output_folder_that_is_not_writable_is_reported(options: PrepareOptions, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match=r"file.* cannot be written to \(.*\): give another --out"):
        prepare(replace(options, out=tmp_path / "file" / "out"))


def test_a_killed_decoding_process_is_reported(options: PrepareOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips, "video_info", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(
        InputError, match=r"was killed by the signal Killed.*fewer workers.*reading one of these files: .*mp4"
    ):
        prepare(replace(options, workers=2))
    monkeypatch.undo()
    assert prepared(options)
