import asyncio
import errno
import gc
import hashlib
import logging
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.asyn import get_loop, sync
from fsspec.implementations.http import HTTPFileSystem
from upath import UPath

from gpdit_lightning.data import cache as cache_module
from gpdit_lightning.data.cache import CacheConfig, ShardCache
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.remote import RemoteFile
from gpdit_lightning.data.shards import DamagedSampleError, ShardReader
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import process_lock, sha256_of

fork = multiprocessing.get_context("fork")


class Server:
    """Serves bytes over HTTP, counts what is asked for, and fails as it is told.

    Attributes:
        files: what lies at each path.
        faults: for each path, what goes wrong with its next downloads, one after another.
        gets: downloads of each path.
        order: the paths in the order of their downloads.
        go_on: a download that hangs in the middle waits for it.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.gets: Counter[str] = Counter()
        self.order: list[str] = []
        self.go_on = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *arguments: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(send=False)

            def do_GET(self) -> None:
                server.gets[self.path] += 1
                server.order.append(self.path)
                self.answer(send=True)

            def answer(self, send: bool) -> None:
                content = server.files.get(self.path)
                if content is None:
                    return self.send_error(404)
                fault = server.faults[self.path].pop(0) if send and server.faults[self.path] else ""
                if fault == "refused":
                    return self.send_error(503)
                self.send_response(200)
                if fault == "wrong":
                    content = content[:-1] + bytes([content[-1] ^ 1])
                elif fault == "long":
                    content += b"more"
                elif fault == "empty":
                    content = b""
                if fault != "short":  # cut off by a server that does not say how much there is
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if send:
                    half = len(content) // 2
                    self.wfile.write(content[:half])
                    self.wfile.flush()
                    if fault == "hangs":
                        server.go_on.wait(20)
                    if fault not in ("torn", "short"):
                        self.wfile.write(content[half:])

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that was killed

        self.http = Quiet(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def offer(self, name: str, size: int = 20_000, *faults: str) -> RemoteFile:
        content = random.Random(name).randbytes(size)
        self.files[f"/{name}"] = content
        self.faults[f"/{name}"] = list(faults)
        return RemoteFile(f"{self.url}/{name}", hashlib.sha256(content).hexdigest(), size)

    def offer_folder(self, folder: Path) -> str:
        for path in folder.iterdir():
            self.files[f"/{folder.name}/{path.name}"] = path.read_bytes()
        return f"{self.url}/{folder.name}"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.go_on.set()
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "PAUSES", (0.01, 0.02))
    monkeypatch.setattr(cache_module, "POLL", 0.01)


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", gib=1)


def content_of(server: Server, file: RemoteFile) -> bytes:
    return server.files[file.url.removeprefix(server.url)]


def copies(cache: ShardCache) -> set[str]:
    """The names of all that lies in a cache but locks."""
    return {path.name for path in cache.directory.glob("??/*")}


def wait_until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


def begin(target: Callable[..., Any], *arguments: Any) -> Any:
    """A forked process that has started; it dies with this one."""
    process = fork.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("protocol", ["http", "file", "memory"])
def test_a_file_is_fetched_once(server: Server, cache: ShardCache, tmp_path: Path, protocol: str, known: bool) -> None:
    file = server.offer("a.tar", 300_000)
    content = content_of(server, file)
    if protocol == "file":
        (tmp_path / "a.tar").write_bytes(content)
        file = replace(file, url=f"file://{tmp_path}/a.tar")
    elif protocol == "memory":
        fsspec.filesystem("memory").pipe("/there/a.tar", content)
        file = replace(file, url="memory://there/a.tar")
    if not known:
        file = replace(file, bytes=None)
    assert cache.fetch(file).read_bytes() == content
    assert cache.fetch(file) == ShardCache(cache.directory, gib=1).fetch(file)
    assert server.gets == ({"/a.tar": 1} if protocol == "http" else {})
    assert copies(cache) == {file.sha256}


def test_the_same_bytes_at_two_addresses_are_one_copy(server: Server, cache: ShardCache) -> None:
    file = server.offer("a.tar")
    server.files["/b.tar"] = server.files["/a.tar"]
    assert cache.fetch(file) == cache.fetch(replace(file, url=f"{server.url}/b.tar"))
    assert server.gets == {"/a.tar": 1}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("torn", "cannot be read"),
        ("short", "came as 10000 bytes with sha256"),
        ("empty", "came as 0 bytes"),
        ("long", "came as 20004 bytes"),
        ("wrong", "came as 20000 bytes with sha256"),
        ("refused", "cannot be read.*503"),
    ],
)
def test_a_download_that_went_wrong_is_made_again(
    server: Server, cache: ShardCache, caplog: pytest.LogCaptureFixture, fault: str, message: str
) -> None:
    file = server.offer("a.tar", 20_000, fault)
    with caplog.at_level(logging.WARNING):
        assert cache.fetch(file).read_bytes() == content_of(server, file)
    (record,) = caplog.records
    assert re.match(rf"{file.url} {message}.* Trying again in 0\.01 s\.$", record.getMessage())
    assert copies(cache) == {file.sha256}


def test_what_stays_wrong_is_told_with_both_sizes_and_hashes(server: Server, cache: ShardCache) -> None:
    file = server.offer("a.tar", 20_000, *["short"] * 3)
    half = hashlib.sha256(content_of(server, file)[:10_000]).hexdigest()
    with pytest.raises(
        InputError,
        match=rf"^{file.url} came as 10000 bytes with sha256 {half} instead of 20000 with {file.sha256}: copy",
    ):
        cache.fetch(file)
    assert server.gets == {"/a.tar": 3}
    assert copies(cache) == set()
    assert cache.fetch(file).read_bytes() == content_of(server, file)  # the server has come to itself


def test_what_cannot_be_reached_is_named(server: Server, cache: ShardCache) -> None:
    file = server.offer("a.tar")
    with pytest.raises(InputError, match=rf"^{server.url}/gone.tar does not exist: look at the address"):
        cache.fetch(replace(file, url=f"{server.url}/gone.tar"))
    with pytest.raises(InputError, match=r"^http://127.0.0.1:9/a.tar cannot be read \(Client\w+: .*\): look at"):
        cache.fetch(replace(file, url="http://127.0.0.1:9/a.tar"))
    assert copies(cache) == set()


@pytest.mark.parametrize(("processes", "locks"), [(2, True), (4, True), (4, False)])
def test_processes_that_need_a_file_at_once_download_it_once(
    server: Server, cache: ShardCache, monkeypatch: pytest.MonkeyPatch, processes: int, locks: bool
) -> None:
    if not locks:  # as on some network file systems

        def unknown(*arguments: Any) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr("fcntl.lockf", unknown)
    files = [server.offer(f"{number}.tar", 400_000) for number in range(6)]
    together = fork.Barrier(processes)

    def read(seed: int) -> None:
        together.wait()
        for file in random.Random(seed).sample(files, len(files)):
            assert sha256_of(cache.fetch(file)) == file.sha256

    readers = [begin(read, seed) for seed in range(processes)]
    for reader in readers:
        reader.join(20)
    assert [reader.exitcode for reader in readers] == [0] * processes
    assert copies(cache) == {file.sha256 for file in files}
    if locks:
        assert server.gets == {f"/{number}.tar": 1 for number in range(6)}


def test_threads_of_a_process_download_a_file_once(server: Server, cache: ShardCache) -> None:
    file = server.offer("a.tar", 20_000, "hangs")
    found: list[bytes] = []
    threads = [
        # Each with a cache of its own, as the loaders of training and validation have.
        threading.Thread(target=lambda: found.append(ShardCache(cache.directory, 1).fetch(file).read_bytes()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: server.gets["/a.tar"] == 1)
    time.sleep(0.1)
    server.go_on.set()
    for thread in threads:
        thread.join(20)
    assert found == [content_of(server, file)] * 4
    assert server.gets == {"/a.tar": 1}


def test_who_waits_takes_over_from_a_process_that_is_killed(server: Server, cache: ShardCache) -> None:
    file = server.offer("a.tar", 300_000, "hangs")
    killed = begin(cache.fetch, file)
    wait_until(lambda: any(name.endswith(".partial") for name in copies(cache)))
    waiting = begin(cache.fetch, file)
    time.sleep(0.1)
    assert waiting.is_alive()
    killed.kill()
    waiting.join(20)
    assert waiting.exitcode == 0
    assert copies(cache) == {file.sha256}
    assert cache.fetch(file).read_bytes() == content_of(server, file)


def test_what_a_killed_process_leaves_is_removed(server: Server, cache: ShardCache) -> None:
    killed = begin(cache.fetch, server.offer("a.tar", 300_000, "hangs"))
    wait_until(lambda: server.gets["/a.tar"] == 1)
    killed.kill()
    killed.join()
    assert [path.stat().st_size for path in cache.directory.glob("??/*.partial")] == [300_000]
    file = server.offer("b.tar")
    cache.fetch(file)
    assert copies(cache) == {file.sha256}


def test_a_leftover_of_the_very_file_does_not_take_its_room(server: Server, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, gib=50_000 / 2**30)
    file = server.offer("a.tar", 30_000, "hangs")
    killed = begin(cache.fetch, file)
    wait_until(lambda: server.gets["/a.tar"] == 1)
    killed.kill()
    killed.join()
    cache.fetch(file)
    assert copies(cache) == {file.sha256}


def test_a_download_that_runs_is_never_taken_for_a_leftover(server: Server, cache: ShardCache) -> None:
    file = server.offer("a.tar", 20_000, "hangs")
    slow = begin(cache.fetch, file)
    wait_until(lambda: any(name.endswith(".partial") for name in copies(cache)))
    (partial,) = cache.directory.rglob("*.partial")
    age(partial, 100)
    cache.fetch(server.offer("b.tar"))
    assert partial.exists()
    server.go_on.set()
    slow.join(20)
    assert slow.exitcode == 0
    assert server.gets["/a.tar"] == 1


def test_what_was_used_least_recently_makes_room(server: Server, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, gib=70_000 / 2**30)
    first, second, third, fourth = (server.offer(name) for name in "abcd")
    for seconds, file in ((300, first), (200, second), (100, third)):
        age(cache.fetch(file), seconds)
    cache.fetch(first)  # used again
    cache.fetch(fourth)
    assert copies(cache) == {first.sha256, third.sha256, fourth.sha256}
    cache.fetch(replace(second, bytes=None))  # of unknown size
    assert copies(cache) == {first.sha256, second.sha256, fourth.sha256}
    with pytest.raises(InputError, match=r"/e has 80000 bytes, more than all of .* may hold: raise data\.cache\.gib"):
        cache.fetch(server.offer("e", 80_000))
    with pytest.raises(InputError, match=r"/e has 80000 bytes, more than all of"):
        cache.fetch(replace(server.offer("e", 80_000), bytes=None))
    assert copies(cache) == {first.sha256, second.sha256, fourth.sha256}  # nothing made room in vain


def test_processes_that_read_more_than_fits_get_the_right_bytes(tmp_path: Path) -> None:
    size, held = 50_000, 5
    cache = ShardCache(tmp_path / "cache", gib=(held * size + 1) / 2**30)
    files = []
    for number in range(12):
        content = random.Random(number).randbytes(size)
        (tmp_path / f"{number}.tar").write_bytes(content)
        files.append(RemoteFile(f"file://{tmp_path}/{number}.tar", hashlib.sha256(content).hexdigest(), size))

    def read(seed: int) -> None:
        numbers = random.Random(seed)
        for _ in range(60):
            cache.prefetch(numbers.sample(files, 2))
            file = numbers.choice(files)
            assert hashlib.sha256(cache.use(file, Path.read_bytes)).hexdigest() == file.sha256

    readers = [begin(read, seed) for seed in range(4)]
    most = 0
    while any(reader.is_alive() for reader in readers):
        # While this process holds the lock, files are removed at most.
        with suppress(BlockingIOError), process_lock(cache.directory / "locks" / "room"):
            total = 0
            for path in cache.directory.glob("??/*"):
                with suppress(FileNotFoundError):
                    total += path.stat().st_size
            most = max(most, total)
        time.sleep(0.002)
    assert [reader.exitcode for reader in readers] == [0] * 4
    assert most == held * size  # never more, and all that is allowed


def test_downloads_wait_for_the_room_that_others_take(server: Server, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, gib=50_000 / 2**30)
    first, second = server.offer("a", 30_000, "hangs"), server.offer("b", 30_000)
    cache.prefetch([first])
    wait_until(lambda: server.gets["/a"] == 1)
    waiting = threading.Thread(target=cache.fetch, args=(second,))
    waiting.start()
    time.sleep(0.1)
    assert server.gets["/b"] == 0
    server.go_on.set()
    waiting.join(20)
    assert copies(cache) == {second.sha256}


@pytest.mark.parametrize("known", [True, False])
def test_a_full_disk_is_told_and_nothing_stays_of_the_file(server: Server, cache: ShardCache, known: bool) -> None:
    small, large = server.offer("a"), server.offer("b", 300_000)
    large = large if known else replace(large, bytes=None)
    answers = fork.Queue()

    def fetch() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        cache.fetch(small)
        try:
            cache.fetch(large)
        except InputError as error:
            answers.put(str(error))

    process = begin(fetch)
    process.join(20)
    assert process.exitcode == 0
    message = answers.get(timeout=5)
    assert message.startswith(f"{cache.directory} has no room left for {large.url} (File too large): free space")
    assert "data.cache.gib" in message
    assert copies(cache) == {small.sha256}


def test_an_unusable_folder_is_named(server: Server, tmp_path: Path) -> None:
    file = server.offer("a")
    (tmp_path / "taken").write_text("")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(
            InputError, match=r"taken.* cannot be a folder for copies of shards \(.*\): give data\.cache"
        ):
            ShardCache(folder, gib=1)
    cache = ShardCache(tmp_path / "cache", gib=1)
    (cache.directory / file.sha256[:2]).write_text("")
    with pytest.raises(InputError, match=r"cache takes no copy of http.*: give data\.cache\.directory"):
        cache.fetch(file)
    for gib in (0, -1, float("nan")):
        with pytest.raises(InputError, match=r"data\.cache\.gib is .*; it must be above 0"):
            ShardCache(tmp_path / "cache", gib)


def test_the_recipe_opens_a_cache_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    cache = CacheConfig(gib=2).open()
    assert cache.directory == tmp_path / ".cache" / "gpdit_lightning" / "shards"
    assert cache.directory.is_dir()
    assert cache.limit == 2 * 2**30


def test_a_file_that_is_evicted_before_it_is_opened_is_fetched_again(server: Server, cache: ShardCache) -> None:
    file = server.offer("a")
    evictions = [True, True, False]

    def read(path: Path) -> bytes:
        if evictions.pop(0):
            path.unlink()
        return path.read_bytes()

    assert cache.use(file, read) == content_of(server, file)
    assert server.gets["/a"] == 3
    evictions = [True] * 20
    with pytest.raises(InputError, match=r"/a was evicted from .* 10 times .*: raise data\.cache\.gib"):
        cache.use(file, read)


def test_files_are_brought_before_they_are_read(server: Server, cache: ShardCache) -> None:
    files = [server.offer(f"{number}", 20_000) for number in range(8)]
    cache.prefetch(files[:5])
    cache.prefetch(files)
    cache.prefetch(files)
    wait_until(lambda: copies(cache) == {file.sha256 for file in files})
    server.files.clear()
    assert all(sha256_of(cache.fetch(file)) == file.sha256 for file in files)
    assert set(server.gets.values()) == {1}


def test_files_are_brought_in_the_order_asked_for(
    server: Server, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "THREADS", 1)
    files = [server.offer(f"{number}") for number in (3, 1, 2, 0)]
    cache.prefetch(files[:2])
    cache.prefetch([files[1], files[3], files[2]])
    wait_until(lambda: copies(cache) == {file.sha256 for file in files})
    assert server.order == ["/3", "/1", "/0", "/2"]


def test_what_cannot_be_brought_is_left_to_the_reader(server: Server, cache: ShardCache) -> None:
    bad, good = server.offer("bad"), server.offer("good")
    del server.files["/bad"]
    cache.prefetch([bad, good])
    wait_until(lambda: good.sha256 in copies(cache))
    with pytest.raises(InputError, match="/bad does not exist"):
        cache.fetch(bad)
    server.offer("bad")
    cache.prefetch([bad])
    wait_until(lambda: copies(cache) == {good.sha256, bad.sha256})


def test_what_another_process_downloads_is_not_waited_for(server: Server, cache: ShardCache) -> None:
    slow, quick = server.offer("slow", 20_000, "hangs"), [server.offer(f"{number}") for number in range(3)]
    other = begin(cache.fetch, slow)
    wait_until(lambda: server.gets["/slow"] == 1)
    cache.prefetch([slow, *quick])
    wait_until(lambda: {file.sha256 for file in quick} <= copies(cache))
    server.go_on.set()
    other.join(20)
    assert other.exitcode == 0
    assert server.gets["/slow"] == 1


def test_a_program_ends_while_files_are_brought(server: Server, cache: ShardCache) -> None:
    server.offer("a.tar", 20_000, "hangs")
    program = (
        "import sys, time; from pathlib import Path; from gpdit_lightning.data.cache import ShardCache\n"
        "from gpdit_lightning.data.remote import RemoteFile\n"
        "cache = ShardCache(Path(sys.argv[1]), 1)\n"
        "cache.prefetch([RemoteFile(sys.argv[2], 'a' * 64, 20_000)])\n"
        "while not list(cache.directory.rglob('*.partial')): time.sleep(0.01)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(cache.directory), f"{server.url}/a.tar"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.timeout(60)
def test_a_cache_travels_to_other_processes(server: Server, cache: ShardCache) -> None:
    files = [server.offer(f"{number}", 20_000, "hangs" if number < 2 else "") for number in range(5)]
    cache.prefetch(files[:3])
    wait_until(lambda: server.gets["/0"] == server.gets["/1"] == 1)  # both threads are at work, the third file waits
    assert len(pickle.dumps(cache)) < 500

    def use(cache: ShardCache, own: RemoteFile) -> None:
        cache.prefetch([own])
        wait_until(lambda: own.sha256 in copies(cache))
        # Still being downloaded, by a thread that was not forked.
        assert sha256_of(cache.fetch(files[0])) == files[0].sha256

    processes = [begin(use, cache, files[3]), begin(use, pickle.loads(pickle.dumps(cache)), files[4])]
    wait_until(lambda: {files[3].sha256, files[4].sha256} <= copies(cache))
    server.go_on.set()
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    wait_until(lambda: copies(cache) == {file.sha256 for file in files})
    assert set(server.gets.values()) == {1}


def test_a_fork_leaves_the_connections_of_its_parent_alone(server: Server, cache: ShardCache) -> None:
    """A filesystem that the child's collector took would close them in the event loop that both share."""
    cache.fetch(server.offer("a"))
    for _ in range(3):
        sync(get_loop(), asyncio.sleep, 0)  # fsspec's thread forgets the file it read last

    def collect() -> None:
        gc.collect()
        os._exit(not any(isinstance(thing, HTTPFileSystem) for thing in gc.get_objects()))

    process = begin(collect)
    process.join(20)
    assert process.exitcode == 0
    cache.fetch(server.offer("b"))


@pytest.fixture
def remote(server: Server, write_shards: Callable[..., Manifest], tmp_path: Path) -> tuple[Manifest, str]:
    """A manifest on this machine, and the address at which the server has the same folder."""
    counts = {("train", "video", (3, 4, 4)): 6, ("validation", "image", (1, 4, 4)): 2}
    manifest = write_shards(tmp_path / "latents", counts, shard_size=4)
    return manifest, server.offer_folder(tmp_path / "latents")


def test_samples_from_elsewhere_are_those_of_the_folder(
    server: Server, cache: ShardCache, remote: tuple[Manifest, str]
) -> None:
    local, url = remote
    there = Manifest.load(url)
    assert there.directory == UPath(url)
    assert replace(there, directory=local.directory) == local
    assert there.fingerprint() == local.fingerprint()
    assert sum(server.gets.values()) == 1  # no request for each shard
    for entry in local.shards:
        ours, theirs = ShardReader(local.directory, entry), ShardReader(there.directory, entry, cache)
        assert len(pickle.dumps(theirs)) < 2000
        for reader in (theirs, pickle.loads(pickle.dumps(theirs))):
            for number in range(entry.count):
                assert np.array_equal(ours.read(number, 1)[0], reader.read(number, 1)[0])
                assert ours.read(number)[1] == reader.read(number)[1]
        assert ours.files == ()
        assert all(path.read_bytes() == content_of(server, file) for file, path in zip(
            theirs.files, map(cache.fetch, theirs.files), strict=True))  # fmt: skip
    assert set(server.gets.values()) == {1}
    assert ShardReader(local.directory, local.shards[0], cache).files == ()


def test_a_shard_elsewhere_needs_a_cache(remote: tuple[Manifest, str]) -> None:
    manifest = Manifest.load(remote[1])
    with pytest.raises(InputError, match=r"\.tar is not on this machine: give data\.cache\.directory a folder"):
        ShardReader(manifest.directory, manifest.shards[0])


def test_a_reader_whose_files_were_evicted_fetches_them_again(
    server: Server, cache: ShardCache, remote: tuple[Manifest, str]
) -> None:
    local, url = remote
    reader = ShardReader(UPath(url), local.shards[0], cache)
    expected = ShardReader(local.directory, local.shards[0]).read(1)[0]
    assert np.array_equal(reader.read(1)[0], expected)
    shutil.rmtree(cache.directory)
    assert np.array_equal(reader.read(1)[0], expected)
    assert {name.rpartition(".")[2]: count for name, count in server.gets.items()} == {"tar": 2, "npy": 1}


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("part", [0, 1])
def test_a_copy_that_the_disk_damaged_is_fetched_again(
    server: Server,
    cache: ShardCache,
    remote: tuple[Manifest, str],
    caplog: pytest.LogCaptureFixture,
    part: int,
    mapped: bool,
) -> None:
    local, url = remote
    reader = ShardReader(UPath(url), local.shards[0], cache)
    if mapped:
        reader.read(0)
    path = cache.fetch(reader.files[part])
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(reader.read(2)[0], ShardReader(local.directory, local.shards[0]).read(2)[0])
    assert [record.getMessage() for record in caplog.records] == [
        f"The copy of {reader.files[part].url} at {path} is damaged and will be fetched again."
    ]
    assert server.gets[reader.files[part].url.removeprefix(server.url)] == 2
    assert sum(server.gets.values()) == 3


def test_a_sample_that_is_damaged_at_its_source_is_named(
    server: Server, cache: ShardCache, remote: tuple[Manifest, str]
) -> None:
    local, url = remote
    entry = local.shards[0]
    path = local.directory / entry.path
    content = bytearray(path.read_bytes())
    content[int(ShardReader(local.directory, entry).index[2, 0]) + 150] ^= 4
    server.files[f"/latents/{entry.path}"] = bytes(content)
    entry = replace(entry, sha256=hashlib.sha256(content).hexdigest())
    reader = ShardReader(UPath(url), entry, cache)
    with pytest.raises(DamagedSampleError, match=rf"Sample 2 of {url}/.*\.tar is damaged \(its checksum differs\)"):
        reader.read(2)
    assert np.array_equal(reader.read(1)[0], ShardReader(local.directory, local.shards[0]).read(1)[0])
    assert set(server.gets.values()) == {1}


def test_a_shard_that_is_gone_is_no_damaged_sample(
    server: Server, cache: ShardCache, remote: tuple[Manifest, str]
) -> None:
    local, url = remote
    reader = ShardReader(UPath(url), local.shards[0], cache)
    del server.files[f"/latents/{local.shards[0].path}"]
    with pytest.raises(InputError, match=r"\.tar does not exist") as caught:
        reader.read(0)
    assert not isinstance(caught.value, DamagedSampleError)
