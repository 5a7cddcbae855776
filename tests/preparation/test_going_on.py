"""A preparation that is interrupted, extended, or shared by several processes loses and doubles nothing."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpdit_lightning.codecs import load_codec
from gpdit_lightning.data.manifest import SKIPPED_NAME, Manifest
from gpdit_lightning.data.shards import ShardReader
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.video import write_video
from gpdit_lightning.preparation import PrepareOptions, parts, prepare
from gpdit_lightning.preparation.clips import read
from gpdit_lightning.preparation.input_files import InputFile
from gpdit_lightning.preparation.records import Records

COMMAND = Path(__file__).parents[2] / "data_prep" / "shard_latents.py"


def draw(path: Path, frames: int, height: int = 16) -> None:
    pixels = np.random.default_rng(sum(map(ord, path.name))).integers(0, 255, (1, 3, height, 24), dtype=np.uint8)
    moving = [torch.from_numpy(np.roll(pixels[0], shift, axis=2)) for shift in range(frames)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, torch.stack(moving), fps=24)


@pytest.fixture(scope="module")
def movies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 videos of 4 to 15 frames, wide and tall, and one that is none."""
    folder = tmp_path_factory.mktemp("movies")
    for number in range(40):
        draw(folder / f"{number % 3}" / f"m{number}.mp4", frames=4 + number * 7 % 12, height=16 if number % 4 else 48)
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture
def options(tmp_path: Path, movies: Path) -> PrepareOptions:
    """Shards of 4 samples, encoded 3 at a time, in parts of 25 videos."""
    return PrepareOptions(
        out=tmp_path / "out",
        videos=[movies],
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
def whole(movies: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """What an uninterrupted run of one process makes with `options`."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return prepared(options.__wrapped__(out.parent, movies))  # type: ignore[attr-defined]


def prepared(options: PrepareOptions) -> Manifest:
    manifest = prepare(options)
    assert manifest is not None
    return manifest


def identities(manifest: Manifest) -> list[tuple[Any, ...]]:
    """Split, source and first frame of every sample, in the order of shards."""
    found = []
    for entry in manifest.shards:
        reader = ShardReader(manifest.directory, entry)
        for number in range(entry.count):
            metadata = reader.read(number)[1]
            found.append((entry.split, metadata["source"], metadata["first_frame"]))
    return found


def tars(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}


def command(options: PrepareOptions, *more: str) -> list[str]:
    texts = {
        "videos": [str(path) for path in options.videos],
        "video_sizes": list(options.video_sizes),
        **{
            name: [str(getattr(options, name))]
            for name in (
                *("out", "codec", "stride", "clip_frames", "least_clip_frames", "validation_fraction"),
                *("shard_size", "part_size", "batch_size", "workers", "device"),
            )
        },
    }
    return [
        sys.executable,
        str(COMMAND),
        *(word for name, values in texts.items() for word in (f"--{name}", *values)),
        *more,
    ]


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_number_of_processes_changes_nothing(options: PrepareOptions, whole: Manifest, workers: int) -> None:
    assert prepared(replace(options, workers=workers)).shards == whole.shards


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_order_of_items_depends_on_no_process(movies: Path, options: PrepareOptions) -> None:
    """More sources than lanes, of very different lengths."""
    sources = [
        InputFile(path, path.name, "video", "train", path.stat().st_size) for path in sorted(movies.rglob("*.mp4"))
    ]
    sequences = []
    for workers in (0, 1, 2, 8):
        items = list(read(sources, options, 4, workers, set()))
        sequences.append([(type(item).__name__, item.source, getattr(item, "metadata", None)) for item in items])
    assert len(sequences[0]) > 2 * len(sources)
    assert all(sequence == sequences[0] for sequence in sequences)


def interrupt_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the codec die, as by Ctrl-C, when it has encoded so many batches."""
    codec = load_codec("pca")
    encode, done = codec.encode, Counter[str]()

    def dying(pixels: torch.Tensor) -> torch.Tensor:
        done["batches"] += 1
        if done["batches"] > batches:
            raise KeyboardInterrupt
        return encode(pixels)

    monkeypatch.setattr(codec, "encode", dying)
    monkeypatch.setattr(parts, "load_codec", lambda *_: codec)


@pytest.mark.parametrize("batches", [0, 1, 5, 8, 11, 13, 16, 20])
def test_an_interrupted_run_ends_with_the_same_shards(
    options: PrepareOptions, whole: Manifest, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(batches, patch)
        with pytest.raises(KeyboardInterrupt):
            prepare(options)
    assert not (options.out / "manifest.json").exists()
    before = tars(options.out)
    names = {shard.path for shard in whole.shards}
    assert before.keys() < names
    assert bool(before) == (batches > 4)
    assert prepared(options).shards == whole.shards
    assert {name: time for name, time in tars(options.out).items() if name in before} == before, "were written again"


def test_a_run_that_is_interrupted_again_and_again_arrives(
    options: PrepareOptions, whole: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(10):
        with monkeypatch.context() as patch:
            interrupt_after(14, patch)
            try:
                manifest = prepared(options)
                break
            except KeyboardInterrupt:
                pass
    assert manifest.shards == whole.shards
    assert Manifest.load(options.out) == manifest


def test_a_process_that_is_killed_leaves_no_half_shard(options: PrepareOptions, whole: Manifest) -> None:
    """kill -9 at random moments; every shard that is visible is whole, and stays."""
    numbers = np.random.default_rng(0)
    listed = {shard.path: shard.sha256 for shard in whole.shards}
    seen: dict[str, int] = {}
    for attempt in range(7):
        running = subprocess.Popen(
            command(replace(options, workers=int(numbers.choice([0, 2])))),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            # Imports take two seconds and more: count from the first sign of work.
            while running.poll() is None and not (options.out / "preparation").exists():
                time.sleep(0.02)
            _, errors = running.communicate(
                timeout=None if attempt == 6 else float(numbers.uniform(0, 0.6 + attempt / 4))
            )
            assert running.returncode == 0, errors
            break
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
        now = tars(options.out)
        assert {name: now.get(name) for name in seen} == seen
        assert now.keys() <= listed.keys()
        seen = now
    manifest = Manifest.load(options.out)
    assert manifest.shards == whole.shards
    assert not list(options.out.rglob("*.partial"))


def test_a_complete_shard_that_is_damaged_is_named(
    options: PrepareOptions, whole: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(9, patch)
        with pytest.raises(KeyboardInterrupt):
            prepare(options)
    damaged = min(options.out.glob("*.tar"))
    whole_bytes = damaged.read_bytes()
    latents, metadata = np.load(damaged.with_suffix(".index.npy"))[0, :2]
    for place in (10, int(latents) + 200, int(metadata) + 5):  # in the name of a member, and in what it holds
        content = bytearray(whole_bytes)
        content[place] ^= 1
        damaged.write_bytes(content)
        with pytest.raises(
            InputError, match=rf"{damaged.name} .*(is not what was written: delete it|is no readable tar)"
        ):
            prepare(options)
    damaged.unlink()  # its samples are made again, under another number
    assert Counter(identities(prepared(options))) == Counter(identities(whole))


def test_new_videos_extend_what_is_there(options: PrepareOptions, movies: Path, tmp_path: Path) -> None:
    folder = tmp_path / "growing"

    def grow(paths: list[Path]) -> None:
        for path in paths:
            (folder / path.relative_to(movies)).parent.mkdir(parents=True, exist_ok=True)
            (folder / path.relative_to(movies)).write_bytes(path.read_bytes())

    grow(sorted(movies.rglob("*.mp4"))[:20])
    growing = replace(options, videos=[folder], labels=True)
    first = prepared(growing)
    before = tars(options.out)
    grow(sorted(movies.rglob("*.mp4")))
    draw(folder / "0a" / "new.mp4", frames=7)
    second = prepared(growing)
    assert set(first.shards) < set(second.shards)
    assert {name: time for name, time in tars(options.out).items() if name in before} == before
    assert second.labels[: len(first.labels)] == first.labels, "a label is its place in the list"
    assert "0a" in second.labels
    assert Counter(source for _, source, _ in identities(second)).keys() > {"0a/new.mp4"}
    assert max(Counter(identities(second)).values()) == 1
    splits = {source: split for split, source, _ in identities(first)}
    later = {source: split for split, source, _ in identities(second)}
    assert {source: later[source] for source in splits} == splits
    kept = options.out / f"manifest-{first.fingerprint()[:16]}.json"
    assert Manifest.load(kept).shards == first.shards, "a run on the old data can go on"
    assert prepared(growing) == second


def test_what_was_left_out_is_tried_again_when_it_is_mended(options: PrepareOptions, tmp_path: Path) -> None:
    folder = tmp_path / "mended"
    for number in range(3):
        draw(folder / f"{number}.mp4", frames=6)
    good = (folder / "1.mp4").read_bytes()
    (folder / "1.mp4").write_bytes(good[:500])
    mending = replace(options, videos=[folder])
    first = prepared(mending)
    assert [json.loads(line)["source"] for line in (first.directory / SKIPPED_NAME).open()] == ["1.mp4"]
    (folder / "1.mp4").write_bytes(good)
    second = prepared(mending)
    assert second.skipped == 0
    assert (first.directory / SKIPPED_NAME).read_text() == ""
    assert {source for _, source, _ in identities(second)} == {"0.mp4", "1.mp4", "2.mp4"}


def test_what_was_left_out_is_tried_again_when_asked_for(
    options: PrepareOptions, movies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file server that failed for a while."""
    with monkeypatch.context() as patch:
        monkeypatch.setattr(sys.modules[read.__module__], "video_info", lambda *_: _fail())
        patch.setattr(sys.modules[read.__module__], "read_image", None)
        with pytest.raises(InputError, match=r"None of the 41 sources could be used; the first: the server is down"):
            prepare(options)
    monkeypatch.undo()
    first = prepared(options)
    assert first.skipped == 1
    again = prepared(replace(options, retry_skipped=True))
    assert again.shards == first.shards
    assert again.skipped == 1


def _fail() -> None:
    raise InputError("the server is down")


def test_several_processes_share_the_work(options: PrepareOptions, whole: Manifest) -> None:
    """Two ranks, as torchrun sets them, and one that knows of none."""
    ranks = [{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    running = [
        subprocess.Popen(
            command(options), env=os.environ | rank, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in (*ranks, {})
    ]
    outputs = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], outputs
    assert Manifest.load(options.out).shards == whole.shards
    assert any("next: python -m gpdit_lightning fit" in printed for printed, _ in outputs)


def test_a_rank_that_ends_first_says_who_writes_the_manifest(options: PrepareOptions) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(0, patch)
        with pytest.raises(KeyboardInterrupt):
            prepare(options)
    with Records(options.out).held(1) as hold:
        assert hold.free
        # In another process, since a lock is a process's own.
        done = subprocess.run(command(options), capture_output=True, text=True, check=True)
        assert "Others still work" in done.stdout
        assert not (options.out / "manifest.json").exists()
    assert prepared(options)


def test_a_full_disk_is_named_and_leaves_complete_shards_alone(options: PrepareOptions, whole: Manifest) -> None:
    small: Callable[[], None] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))  # noqa: E731
    failed = subprocess.run(command(options), capture_output=True, text=True, check=False, preexec_fn=small)
    assert failed.returncode == 2
    assert (
        failed.stderr.strip().splitlines()[-1].startswith(f"{options.out} has no room left (File too large): free some")
    )
    assert not list(options.out.rglob("*.partial"))
    assert not (options.out / "manifest.json").exists()
    assert prepared(options).shards == whole.shards


def test_a_folder_that_cannot_be_written_to_is_named(options: PrepareOptions, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"file.* cannot be written to \(.*\): give another --out"):
        prepare(replace(options, out=tmp_path / "file" / "out"))


def test_a_decoding_process_that_dies_is_explained(options: PrepareOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[read.__module__], "video_info", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(
        InputError, match=r"A decoding process was killed while these were read: .*\.mp4.*fewer --workers"
    ):
        prepare(replace(options, workers=2))
    monkeypatch.undo()
    assert prepared(options)
