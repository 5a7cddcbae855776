import asyncio
import errno
import gc
import hashlib
import itertools
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
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.asyn import get_loop, sync
from fsspec.implementations.http import HTTPFileSystem
from upath import UPath

from gpdit_lightning import retries
from gpdit_lightning.data import cache as cache_module
from gpdit_lightning.data.buckets import Bucket
from gpdit_lightning.data.cache import CacheConfig, ShardCache
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.remote import RemoteFile, _download_error, _not_too_slow, read_blocks
from gpdit_lightning.data.shards import DamagedSampleError, ShardReader
from gpdit_lightning.errors import InputError, TransientError
from gpdit_lightning.files import process_lock
from gpdit_lightning.regular_files import sha256_of

fork = multiprocessing.get_context("fork")


class Server:
    """HTTP server that counts downloads and simulates faults.

    Attributes:
        files: the content at each path.
        faults: the faults of the next downloads of each path, in order.
        gets: number of downloads of each path.
        order: paths in the order of their downloads.
        resume: event that downloads with the fault "hangs" wait for.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.gets: Counter[str] = Counter()
        self.order: list[str] = []
        self.resume = threading.Event()
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
                if fault in ("endless header", "endless interim replies"):
                    begin, more = (b"HTTP/1.1 200 OK\r\nX: ", b"a")
                    if fault == "endless interim replies":
                        begin = more = b"HTTP/1.1 100 Continue\r\n\r\n"
                    self.wfile.write(begin)
                    while not server.resume.wait(0.05):  # ends when the client closes the connection
                        self.wfile.write(more)
                    return None
                self.send_response(200)
                if fault == "wrong":
                    content = content[:-1] + bytes([content[-1] ^ 1])
                elif fault == "long":
                    content += b"more"
                elif fault == "empty":
                    content = b""
                if fault != "short":  # truncated, by a server that does not send the length
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if send:
                    half = len(content) // 2
                    self.wfile.write(content[:half])
                    self.wfile.flush()
                    if fault == "hangs":
                        server.resume.wait(20)
                    if fault not in ("torn", "short"):
                        self.wfile.write(content[half:])

        class QuietServer(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # of clients that were killed

        self.http = QuietServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def add(self, name: str, size: int = 20_000, *faults: str) -> RemoteFile:
        content = random.Random(name).randbytes(size)
        self.files[f"/{name}"] = content
        self.faults[f"/{name}"] = list(faults)
        return RemoteFile(f"{self.url}/{name}", hashlib.sha256(content).hexdigest(), size)

    def add_folder(self, folder: Path) -> str:
        for path in folder.iterdir():
            self.files[f"/{folder.name}/{path.name}"] = path.read_bytes()
        return f"{self.url}/{folder.name}"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.resume.set()
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "DOWNLOAD_DELAYS", (0.01, 0.02))
    monkeypatch.setattr(cache_module, "POLL_INTERVAL", 0.01)


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", gib=1)


def content_of(server: Server, file: RemoteFile) -> bytes:
    return server.files[file.url.removeprefix(server.url)]


def copies(cache: ShardCache) -> set[str]:
    """Return the names of all files of a cache except locks."""
    return {path.name for path in cache.directory.glob("??/*")}


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "the condition was not met in time"
        time.sleep(0.005)


def start(target: Callable[..., Any], *arguments: Any) -> Any:
    """Start a forked process that ends with this one."""
    process = fork.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("protocol", ["http", "file", "memory"])
def test_a_file_is_downloaded_once(
    server: Server, cache: ShardCache, tmp_path: Path, protocol: str, known: bool
) -> None:
    file = server.add("a.tar", 300_000)
    content = content_of(server, file)
    if protocol == "file":
        (tmp_path / "a.tar").write_bytes(content)
        file = replace(file, url=f"file://{tmp_path}/a.tar")
    elif protocol == "memory":
        fsspec.filesystem("memory").pipe("/folder/a.tar", content)
        file = replace(file, url="memory://folder/a.tar")
    if not known:
        file = replace(file, bytes=None)
    assert cache.fetch(file).read_bytes() == content
    assert cache.fetch(file) == ShardCache(cache.directory, gib=1).fetch(file)
    assert server.gets == ({"/a.tar": 1} if protocol == "http" else {})
    assert copies(cache) == {file.sha256}


def test_the_same_bytes_at_two_addresses_share_a_copy(server: Server, cache: ShardCache) -> None:
    file = server.add("a.tar")
    server.files["/b.tar"] = server.files["/a.tar"]
    assert cache.fetch(file) == cache.fetch(replace(file, url=f"{server.url}/b.tar"))
    assert server.gets == {"/a.tar": 1}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("torn", "cannot be read"),
        ("short", "has 10000 bytes with sha256"),
        ("empty", "has 0 bytes"),
        ("long", "has 20004 bytes"),
        ("wrong", "has 20000 bytes with sha256"),
        ("refused", "cannot be read.*503"),
    ],
)
def test_a_failed_download_is_repeated(
    server: Server, cache: ShardCache, caplog: pytest.LogCaptureFixture, fault: str, message: str
) -> None:
    file = server.add("a.tar", 20_000, fault)
    with caplog.at_level(logging.WARNING):
        assert cache.fetch(file).read_bytes() == content_of(server, file)
    (record,) = caplog.records
    assert re.match(rf"another attempt follows in 0\.01 s: {file.url} {message}", record.getMessage())
    assert copies(cache) == {file.sha256}


def test_a_persistent_mismatch_is_reported_with_both_sizes_and_hashes(server: Server, cache: ShardCache) -> None:
    file = server.add("a.tar", 20_000, *["short"] * 3)
    half = hashlib.sha256(content_of(server, file)[:10_000]).hexdigest()
    with pytest.raises(
        InputError,
        match=rf"^{file.url} has 10000 bytes with sha256 {half} instead of 20000 with {file.sha256}: copy",
    ):
        cache.fetch(file)
    assert server.gets == {"/a.tar": 3}
    assert copies(cache) == set()
    assert cache.fetch(file).read_bytes() == content_of(server, file)  # the server has no more faults


def test_an_unreachable_file_is_reported(server: Server, cache: ShardCache) -> None:
    file = server.add("a.tar")
    with pytest.raises(InputError, match=rf"^{server.url}/missing.tar does not exist: check the address"):
        cache.fetch(replace(file, url=f"{server.url}/missing.tar"))
    with pytest.raises(InputError, match=r"^http://127.0.0.1:9/a.tar cannot be read \(Client\w+: .*\): check"):
        cache.fetch(replace(file, url="http://127.0.0.1:9/a.tar"))
    assert copies(cache) == set()


@pytest.mark.parametrize(("processes", "locks"), [(2, True), (4, True), (4, False)])
def test_concurrent_processes_download_a_file_once(
    server: Server, cache: ShardCache, monkeypatch: pytest.MonkeyPatch, processes: int, locks: bool
) -> None:
    if not locks:  # as on some network file systems

        def fail(*arguments: Any) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr("fcntl.lockf", fail)
    files = [server.add(f"{number}.tar", 400_000) for number in range(6)]
    barrier = fork.Barrier(processes)

    def read(seed: int) -> None:
        barrier.wait()
        for file in random.Random(seed).sample(files, len(files)):
            assert sha256_of(cache.fetch(file)) == file.sha256

    readers = [start(read, seed) for seed in range(processes)]
    for reader in readers:
        reader.join(20)
    assert [reader.exitcode for reader in readers] == [0] * processes
    assert copies(cache) == {file.sha256 for file in files}
    if locks:
        assert server.gets == {f"/{number}.tar": 1 for number in range(6)}


def test_concurrent_threads_download_a_file_once(server: Server, cache: ShardCache) -> None:
    file = server.add("a.tar", 20_000, "hangs")
    contents: list[bytes] = []
    threads = [
        # Each with a separate cache object, like the loaders of training and validation.
        threading.Thread(target=lambda: contents.append(ShardCache(cache.directory, 1).fetch(file).read_bytes()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: server.gets["/a.tar"] == 1)
    time.sleep(0.1)
    server.resume.set()
    for thread in threads:
        thread.join(20)
    assert contents == [content_of(server, file)] * 4
    assert server.gets == {"/a.tar": 1}


def test_a_waiting_process_takes_over_from_a_killed_one(server: Server, cache: ShardCache) -> None:
    file = server.add("a.tar", 300_000, "hangs")
    killed = start(cache.fetch, file)
    wait_until(lambda: any(name.endswith(".partial") for name in copies(cache)))
    waiting = start(cache.fetch, file)
    time.sleep(0.1)
    assert waiting.is_alive()
    killed.kill()
    waiting.join(20)
    assert waiting.exitcode == 0
    assert copies(cache) == {file.sha256}
    assert cache.fetch(file).read_bytes() == content_of(server, file)


def test_partial_files_of_killed_processes_are_removed(server: Server, cache: ShardCache) -> None:
    killed = start(cache.fetch, server.add("a.tar", 300_000, "hangs"))
    wait_until(lambda: server.gets["/a.tar"] == 1)
    killed.kill()
    killed.join()
    assert [path.stat().st_size for path in cache.directory.glob("??/*.partial")] == [300_000]
    file = server.add("b.tar")
    cache.fetch(file)
    assert copies(cache) == {file.sha256}


def test_a_partial_file_of_the_same_download_is_removed_before_space_is_reserved(
    server: Server, tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path, gib=50_000 / 2**30)
    file = server.add("a.tar", 30_000, "hangs")
    killed = start(cache.fetch, file)
    wait_until(lambda: server.gets["/a.tar"] == 1)
    killed.kill()
    killed.join()
    cache.fetch(file)
    assert copies(cache) == {file.sha256}


def test_a_running_download_is_not_removed_as_abandoned(server: Server, cache: ShardCache) -> None:
    file = server.add("a.tar", 20_000, "hangs")
    slow = start(cache.fetch, file)
    wait_until(lambda: any(name.endswith(".partial") for name in copies(cache)))
    (partial,) = cache.directory.rglob("*.partial")
    age(partial, 100)
    cache.fetch(server.add("b.tar"))
    assert partial.exists()
    server.resume.set()
    slow.join(20)
    assert slow.exitcode == 0
    assert server.gets["/a.tar"] == 1


def test_least_recently_used_copies_are_evicted(server: Server, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, gib=70_000 / 2**30)
    first, second, third, fourth = (server.add(name) for name in "abcd")
    for seconds, file in ((300, first), (200, second), (100, third)):
        age(cache.fetch(file), seconds)
    cache.fetch(first)  # used again
    cache.fetch(fourth)
    assert copies(cache) == {first.sha256, third.sha256, fourth.sha256}
    cache.fetch(replace(second, bytes=None))  # of unknown size
    assert copies(cache) == {first.sha256, second.sha256, fourth.sha256}
    with pytest.raises(InputError, match=r"/e has 80000 bytes, more than the limit of .*: raise data\.cache\.gib"):
        cache.fetch(server.add("e", 80_000))
    with pytest.raises(InputError, match=r"/e has 80000 bytes, more than the limit of"):
        cache.fetch(replace(server.add("e", 80_000), bytes=None))
    assert copies(cache) == {first.sha256, second.sha256, fourth.sha256}  # nothing was evicted for it


def test_concurrent_readers_of_more_files_than_fit_get_the_right_bytes(tmp_path: Path) -> None:
    size, capacity = 50_000, 5
    cache = ShardCache(tmp_path / "cache", gib=(capacity * size + 1) / 2**30)
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

    readers = [start(read, seed) for seed in range(4)]
    most = 0
    while any(reader.is_alive() for reader in readers):
        # While this process holds the lock, files may be removed but not added.
        with suppress(BlockingIOError), process_lock(cache.directory / "locks" / "capacity"):
            total = 0
            for path in cache.directory.glob("??/*"):
                with suppress(FileNotFoundError):
                    total += path.stat().st_size
            most = max(most, total)
        time.sleep(0.002)
    assert [reader.exitcode for reader in readers] == [0] * 4
    assert most == capacity * size  # the limit is used in full and never exceeded


def test_downloads_wait_for_space_that_other_downloads_use(server: Server, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, gib=50_000 / 2**30)
    first, second = server.add("a", 30_000, "hangs"), server.add("b", 30_000)
    cache.prefetch([first])
    wait_until(lambda: server.gets["/a"] == 1)
    waiting = threading.Thread(target=cache.fetch, args=(second,))
    waiting.start()
    time.sleep(0.1)
    assert server.gets["/b"] == 0
    server.resume.set()
    waiting.join(20)
    assert copies(cache) == {second.sha256}


@pytest.mark.parametrize("known", [True, False])
def test_a_full_disk_is_reported_and_leaves_no_partial_file(server: Server, cache: ShardCache, known: bool) -> None:
    small, large = server.add("a"), server.add("b", 300_000)
    large = large if known else replace(large, bytes=None)
    answers = fork.Queue()

    def fetch() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        cache.fetch(small)
        try:
            cache.fetch(large)
        except InputError as error:
            answers.put(str(error))

    process = start(fetch)
    process.join(20)
    assert process.exitcode == 0
    message = answers.get(timeout=5)
    assert message.startswith(f"{cache.directory} has no space left for {large.url} (File too large): free space")
    assert "data.cache.gib" in message
    assert copies(cache) == {small.sha256}


def test_an_unusable_folder_is_reported(server: Server, tmp_path: Path) -> None:
    file = server.add("a")
    (tmp_path / "taken").write_text("")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(
            InputError, match=r"taken.* cannot be a folder for copies of shards \(.*\): set data\.cache"
        ):
            ShardCache(folder, gib=1)
    cache = ShardCache(tmp_path / "cache", gib=1)
    (cache.directory / file.sha256[:2]).write_text("")
    with pytest.raises(
        InputError, match=r"a copy of http.* cannot be written to .*cache .*: set data\.cache\.directory"
    ):
        cache.fetch(file)
    for gib in (0, -1, float("nan")):
        with pytest.raises(InputError, match=r"data\.cache\.gib is .*; it must be above 0"):
            CacheConfig(str(tmp_path / "cache"), gib).open()


def test_the_default_cache_is_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    cache = CacheConfig(gib=2).open()
    assert cache.directory == tmp_path / ".cache" / "gpdit_lightning" / "shards"
    assert cache.directory.is_dir()
    assert cache.limit == 2 * 2**30


def test_a_copy_that_is_evicted_before_it_is_opened_is_fetched_again(server: Server, cache: ShardCache) -> None:
    file = server.add("a")
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


def test_prefetched_files_are_not_downloaded_again(server: Server, cache: ShardCache) -> None:
    files = [server.add(f"{number}", 20_000) for number in range(8)]
    cache.prefetch(files[:5])
    cache.prefetch(files)
    cache.prefetch(files)
    wait_until(lambda: copies(cache) == {file.sha256 for file in files})
    server.files.clear()
    assert all(sha256_of(cache.fetch(file)) == file.sha256 for file in files)
    assert set(server.gets.values()) == {1}


def test_files_are_prefetched_in_the_order_of_the_requests(
    server: Server, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "PREFETCH_THREADS", 1)
    files = [server.add(f"{number}") for number in (3, 1, 2, 0)]
    cache.prefetch(files[:2])
    cache.prefetch([files[1], files[3], files[2]])
    wait_until(lambda: copies(cache) == {file.sha256 for file in files})
    assert server.order == ["/3", "/1", "/0", "/2"]


def test_errors_of_prefetching_are_left_to_the_reader(server: Server, cache: ShardCache) -> None:
    bad, good = server.add("bad"), server.add("good")
    del server.files["/bad"]
    cache.prefetch([bad, good])
    wait_until(lambda: good.sha256 in copies(cache))
    with pytest.raises(InputError, match="/bad does not exist"):
        cache.fetch(bad)
    server.add("bad")
    cache.prefetch([bad])
    wait_until(lambda: copies(cache) == {good.sha256, bad.sha256})


def test_prefetching_skips_files_that_another_process_downloads(server: Server, cache: ShardCache) -> None:
    slow, quick = server.add("slow", 20_000, "hangs"), [server.add(f"{number}") for number in range(3)]
    other = start(cache.fetch, slow)
    wait_until(lambda: server.gets["/slow"] == 1)
    cache.prefetch([slow, *quick])
    wait_until(lambda: {file.sha256 for file in quick} <= copies(cache))
    server.resume.set()
    other.join(20)
    assert other.exitcode == 0
    assert server.gets["/slow"] == 1


def test_a_program_can_exit_while_files_are_prefetched(server: Server, cache: ShardCache) -> None:
    server.add("a.tar", 20_000, "hangs")
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
def test_a_cache_can_be_forked_and_pickled(server: Server, cache: ShardCache) -> None:
    files = [server.add(f"{number}", 20_000, "hangs" if number < 2 else "") for number in range(5)]
    cache.prefetch(files[:3])
    wait_until(lambda: server.gets["/0"] == server.gets["/1"] == 1)  # both threads are busy, the third file is queued
    assert len(pickle.dumps(cache)) < 500

    def use(cache: ShardCache, file: RemoteFile) -> None:
        cache.prefetch([file])
        wait_until(lambda: file.sha256 in copies(cache))
        # Still being downloaded by a thread of the parent, which was not forked.
        assert sha256_of(cache.fetch(files[0])) == files[0].sha256

    processes = [start(use, cache, files[3]), start(use, pickle.loads(pickle.dumps(cache)), files[4])]
    wait_until(lambda: {files[3].sha256, files[4].sha256} <= copies(cache))
    server.resume.set()
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    wait_until(lambda: copies(cache) == {file.sha256 for file in files})
    assert set(server.gets.values()) == {1}


def test_a_forked_process_does_not_close_connections_of_its_parent(server: Server, cache: ShardCache) -> None:
    """A filesystem object that the child frees would close them in the event loop that both share."""
    cache.fetch(server.add("a"))
    for _ in range(3):
        sync(get_loop(), asyncio.sleep, 0)  # fsspec's thread drops its reference to the last file

    def collect() -> None:
        gc.collect()
        os._exit(not any(isinstance(instance, HTTPFileSystem) for instance in gc.get_objects()))

    process = start(collect)
    process.join(20)
    assert process.exitcode == 0
    cache.fetch(server.add("b"))


@pytest.fixture
def remote(server: Server, write_shards: Callable[..., Manifest], tmp_path: Path) -> tuple[Manifest, str]:
    """A local manifest, and the address of a remote copy of its folder."""
    counts = {("train", "video", (3, 4, 4)): 6, ("validation", "image", (1, 4, 4)): 2}
    manifest = write_shards(tmp_path / "latents", counts, shard_size=4)
    return manifest, server.add_folder(tmp_path / "latents")


def test_remote_samples_equal_local_ones(server: Server, cache: ShardCache, remote: tuple[Manifest, str]) -> None:
    local, url = remote
    remote_manifest = Manifest.load(url)
    assert remote_manifest.directory == UPath(url)
    assert replace(remote_manifest, directory=local.directory) == local
    assert remote_manifest.fingerprint() == local.fingerprint()
    assert sum(server.gets.values()) == 1  # no request for each shard
    for entry in local.shards:
        local_reader = ShardReader(local.directory, entry)
        remote_reader = ShardReader(remote_manifest.directory, entry, cache)
        assert len(pickle.dumps(remote_reader)) < 2000
        for reader in (remote_reader, pickle.loads(pickle.dumps(remote_reader))):
            for number in range(entry.count):
                assert np.array_equal(local_reader.read(number, 1)[0], reader.read(number, 1)[0])
                assert local_reader.read(number)[1] == reader.read(number)[1]
        assert local_reader.files == ()
        assert all(cache.fetch(file).read_bytes() == content_of(server, file) for file in remote_reader.files)
    assert set(server.gets.values()) == {1}
    assert ShardReader(local.directory, local.shards[0], cache).files == ()


def test_a_remote_shard_needs_a_cache(remote: tuple[Manifest, str]) -> None:
    manifest = Manifest.load(remote[1])
    with pytest.raises(InputError, match=r"\.tar is not on this machine: set data\.cache\.directory to a folder"):
        ShardReader(manifest.directory, manifest.shards[0])


def test_a_reader_fetches_evicted_files_again(server: Server, cache: ShardCache, remote: tuple[Manifest, str]) -> None:
    local, url = remote
    reader = ShardReader(UPath(url), local.shards[0], cache)
    expected = ShardReader(local.directory, local.shards[0]).read(1)[0]
    assert np.array_equal(reader.read(1)[0], expected)
    shutil.rmtree(cache.directory)
    assert np.array_equal(reader.read(1)[0], expected)
    assert {name.rpartition(".")[2]: count for name, count in server.gets.items()} == {"tar": 2, "npy": 1}


@pytest.mark.parametrize(("part", "opened"), [(0, False), (1, False), (1, True)])  # an index is read once
def test_a_damaged_copy_is_fetched_again(
    server: Server,
    cache: ShardCache,
    remote: tuple[Manifest, str],
    caplog: pytest.LogCaptureFixture,
    part: int,
    opened: bool,
) -> None:
    local, url = remote
    reader = ShardReader(UPath(url), local.shards[0], cache)
    if opened:
        reader.read(0)
    path = cache.fetch(reader.files[part])
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(reader.read(2)[0], ShardReader(local.directory, local.shards[0]).read(2)[0])
    assert [record.getMessage() for record in caplog.records] == [
        f"the copy of {reader.files[part].url} at {path} is damaged or cannot be read, and will be fetched again."
    ]
    assert server.gets[reader.files[part].url.removeprefix(server.url)] == 2
    assert sum(server.gets.values()) == 3


def test_a_sample_that_is_damaged_at_its_source_is_reported(
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
    with pytest.raises(DamagedSampleError, match=rf"sample 2 of {url}/.*\.tar is damaged \(its checksum differs\)"):
        reader.read(2)
    assert np.array_equal(reader.read(1)[0], ShardReader(local.directory, local.shards[0]).read(1)[0])
    assert set(server.gets.values()) == {1}


def test_a_missing_shard_is_not_a_damaged_sample(
    server: Server, cache: ShardCache, remote: tuple[Manifest, str]
) -> None:
    local, url = remote
    reader = ShardReader(UPath(url), local.shards[0], cache)
    del server.files[f"/latents/{local.shards[0].path}"]
    with pytest.raises(InputError, match=r"\.tar does not exist") as caught:
        reader.read(0)
    assert not isinstance(caught.value, DamagedSampleError)


@pytest.mark.parametrize("fault", ["torn", "short", "empty", "refused"])
def test_a_failed_request_for_a_manifest_is_repeated(
    server: Server, remote: tuple[Manifest, str], caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    server.faults["/latents/manifest.json"] = [fault]
    assert Manifest.load(remote[1]).fingerprint() == remote[0].fingerprint()
    (record,) = caplog.records
    assert record.getMessage().startswith("another attempt follows in 0.01 s: ")
    server.faults["/latents/manifest.json"] = [fault] * 3
    with pytest.raises(TransientError, match="manifest"):
        Manifest.load(remote[1])


def test_a_server_determines_the_wait_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(retries.time, "sleep", waits.append)
    for headers, wait in (({"Retry-After": "7"}, 7.0), ({"Retry-After": "9" * 50}, retries.MAX_WAIT), ({}, 0.01)):
        error = FileNotFoundError("a")
        error.__cause__ = ServerError(headers)
        calls = iter([_download_error(error, "http://a")])

        @retries.retried
        def read() -> str:
            for failure in calls:  # noqa: B023
                raise failure
            return "read"

        assert read() == "read"
        assert waits.pop() == wait
    error.__cause__ = ServerError({}, status=403)
    assert not isinstance(_download_error(error, "http://a"), TransientError)


class ServerError(Exception):
    """A reply of a server, as aiohttp raises it."""

    def __init__(self, headers: dict[str, str], status: int = 503) -> None:
        self.headers, self.status = headers, status


def test_a_slow_reply_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    times = itertools.count(0.0, 3.0)
    monkeypatch.setattr("gpdit_lightning.data.remote.time.monotonic", lambda: next(times))
    with pytest.raises(TransientError, match=r"http://a arrives at \d bytes per second"):
        list(_not_too_slow(SimpleNamespace(read=lambda _: b"byte"), "http://a"))
    blocks = iter([bytes(2**20)] * 100)
    assert len(list(_not_too_slow(SimpleNamespace(read=lambda _: next(blocks, b"")), "http://a"))) == 100


@pytest.mark.parametrize("fault", ["endless header", "endless interim replies"])
def test_headers_without_an_end_are_given_up(
    server: Server, cache: ShardCache, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpdit_lightning.data.remote.HEADER_SECONDS", 0.5)
    file = server.add("a", 20_000, fault)
    assert cache.fetch(file).read_bytes() == content_of(server, file)
    assert server.gets["/a"] == 2


def test_a_reply_without_an_end_is_refused(server: Server) -> None:
    server.files["/manifest.json"] = bytes(2**20)
    with pytest.raises(InputError, match="has more than 1000 bytes"):
        list(read_blocks(f"{server.url}/manifest.json", 1000))


@pytest.mark.parametrize("name", ["path", "index"])
def test_a_shard_with_other_content_at_its_source_is_replaced(
    name: str, server: Server, cache: ShardCache, remote: tuple[Manifest, str]
) -> None:
    """Although it holds one sample; its file is downloaded three times, and not again for the next sample."""
    local, url = remote
    shards = local.of_split("train")
    changed = f"/latents/{getattr(shards[1], name)}"
    server.files[changed] = server.files[changed][:-1] + b"?"  # such as of a preparation between two reads
    bucket = Bucket([(Manifest.load(url), entry) for entry in shards], [3], cache)
    for _ in range(2):
        sample = bucket.read(shards[0].count)
        assert sample.metadata == bucket.read(0).metadata
        assert sample.damaged == (f"sample 0 of {url}/{shards[1].path}",)
    assert server.gets[changed] == 3


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_a_copy_that_is_no_regular_file_is_removed_or_named(
    server: Server, cache: ShardCache, make: Callable[[Path], None]
) -> None:
    """A folder cannot be removed like a file, nor can a copy in a folder that is not writable."""
    file = server.add("a.tar")
    path = cache.fetch(file)
    path.unlink()
    make(path)
    if path.is_dir():
        with pytest.raises(InputError, match=f"a copy of .*a.tar cannot be written to {cache.directory} .*: set"):
            cache.remove_if_damaged(file)
    else:
        assert cache.remove_if_damaged(file)
        assert cache.fetch(file).read_bytes() == content_of(server, file)
