"""Whatever fails in a worker process, or while it sends an item, ends the iteration with one sentence."""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from gpdit_lightning.errors import InputError, ResourceError
from gpdit_lightning.estimation.loading import LOADERS, shared_memory_bytes
from gpdit_lightning.workers import EndedWorkerError, WorkerLoader, worker_error

ROOT = Path(__file__).parents[1]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs memfd_create")


class Items(Dataset[tuple[int, Tensor]]):
    """Six tensors of 2 MiB; `act` is called in the worker before item 3 is returned."""

    def __init__(self, act: Callable[[], Any] = lambda: None) -> None:
        self.act = act

    def __len__(self) -> int:
        return 6

    def __getitem__(self, number: int) -> tuple[int, Tensor]:
        if number == 3:
            self.act()
        return number, torch.full((2**19,), float(number))


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield 1
        raise InputError("b.mp4 is no video: remove it.")


def read(dataset: Any, workers: int = 2) -> list[Any]:
    return list(WorkerLoader(dataset, workers, sampler=range(len(dataset))))


def fail(error: BaseException) -> Callable[..., Any]:
    def call(*_: Any) -> Any:
        raise error

    return call


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.int64])
def test_items_arrive_in_order_with_their_values(
    workers: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shapes(Items):
        def __getitem__(self, number: int) -> Any:
            size = [(), (0, 3), (7,), (30, 40), (999, 3)][number % 5]
            return {"strided": torch.full(size, number, dtype=dtype), "view": torch.arange(3000).view(50, 60).T[::2]}

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    with warnings.catch_warnings(action="error"):  # no advice to use fewer workers than asked for
        items = read(Shapes(), workers)
    for number, item in enumerate(items):
        torch.testing.assert_close(item["strided"], Shapes()[number]["strided"], rtol=0, atol=0)
        assert torch.equal(item["view"], torch.arange(3000).view(50, 60).T[::2])
        item["strided"].add_(1)  # writable


@linux_only
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
@pytest.mark.parametrize("enough", [True, False])
def test_the_estimated_shared_memory_suffices_for_larger_items_and_less_is_named(enough: bool) -> None:
    """Items of 2 MiB arrive with 56 KiB; with two pages less there is no space for all semaphores of the queues."""
    size = shared_memory_bytes(2) // LOADERS - (0 if enough else 8192)
    script = (
        "from tests.test_workers import *\n"
        "try:\n"
        "    assert [(n, float(t.sum())) for n, t in read(Items())] == [(n, n * 2**19) for n in range(6)]\n"
        "    print('read')\n"
        "except InputError as error:\n"
        "    print(error)\n"
    )
    mounted = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec {sys.executable} -c "$0"'
    result = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", mounted, script], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    if "unshare" in result.stderr or "mount" in result.stderr:
        pytest.skip(f"no mount namespaces: {result.stderr}")
    missing = (
        "2 worker processes could not be started (No space left on device): use fewer workers, or a larger /dev/shm"
    )
    assert result.stdout.startswith("read\n" if enough else missing), result
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("number", "cure"),
    [(errno.EMFILE, "raise the"), *((number, "mount /dev/shm so that") for number in (errno.ENOENT, errno.EROFS))],
)
def test_workers_that_cannot_be_started_are_reported_with_the_first_item(
    number: int, cure: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lightning's teardown replaces the error of a loader whose iteration never began."""
    error = OSError(number, os.strerror(number))
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", fail(error))
    items = iter(WorkerLoader(Items(), 2, sampler=range(6)))
    expected = rf"2 worker processes could not be started \({os.strerror(number)}\): {cure}"
    with pytest.raises(InputError, match=expected):
        next(items)
    assert "Exception ignored" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("thread", "message"),
    [
        ("", "2 worker processes could not be started"),
        pytest.param("_exit_with_parent", "a worker process could not start a thread", marks=linux_only),
        ("QueueFeederThread", "a worker process could not send an item to the main process"),
    ],
)
def test_threads_that_cannot_be_started_are_named(monkeypatch: pytest.MonkeyPatch, thread: str, message: str) -> None:
    main_process, start = os.getpid(), threading.Thread.start

    def start_some(self: threading.Thread) -> None:
        if thread in self.name and (os.getpid() == main_process) == (not thread):
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", start_some)
    with pytest.raises(InputError, match=rf"^{message}.*: use fewer workers"):
        read(Items())


@linux_only
@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (MemoryError(), "memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "can't allocate memory"),
    ],
)
def test_an_item_that_cannot_be_sent_ends_the_iteration(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, cause: str
) -> None:
    monkeypatch.setattr(os, "memfd_create", fail(error))
    with pytest.raises(InputError, match=f"could not send an item to the main process .*{cause}.*: use fewer workers"):
        read(Items())


@linux_only
def test_too_many_open_files_in_a_worker_are_named() -> None:
    """A worker cannot make a file for item 3; item 1 is received, although it was sent before."""

    def limit_open_files() -> None:
        time.sleep(0.5)  # a thread sends item 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))  # only 0, 1 and 2

    items = iter(WorkerLoader(Items(limit_open_files), 2, sampler=range(6)))
    assert [next(items)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(
        InputError, match=r"could not send an item to the main process \(Too many open files\): raise the limit"
    ):
        next(items)


@linux_only
def test_too_many_open_files_in_the_main_process_are_named() -> None:
    items = iter(WorkerLoader(Items(), 2, sampler=range(6)))
    next(items)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(InputError, match=r"too many open files.*raise the limit"):
            list(items)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@linux_only
def test_no_descriptors_stay_open() -> None:
    """Neither in the main process nor, as the limit shows, in the workers."""

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 2,) * 2)

    class Many(Items):
        def __len__(self) -> int:
            return 200

    assert [number for number, _ in read(Many(few))] == list(range(200))
    # Not the number of descriptors, as garbage collection closes those of earlier tests at any time.
    links = (Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    assert not [link for link in links if link.is_symlink() and "memfd:tensors" in os.readlink(link)]


def test_items_that_cannot_be_pickled_end_the_iteration() -> None:
    class Lambdas(Items):
        def __getitem__(self, number: int) -> Any:
            return lambda: number

    with pytest.raises(InputError, match=r"could not send an item to the main process .*pickle"):
        read(Lambdas())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_input_error_keeps_its_message(workers: int) -> None:
    with pytest.raises(InputError, match=r"^a.mp4 is no video: remove it\.$"):
        read(Items(fail(InputError("a.mp4 is no video: remove it."))), workers)
    with pytest.raises(InputError, match=r"^b.mp4 is no video: remove it\.$"):
        list(WorkerLoader(Stream(), workers))
    with pytest.raises(ResourceError, match="memory ran out"):
        read(Items(fail(MemoryError())), workers)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("bug", [KeyError("a bug"), RuntimeError("a bug")])
def test_an_exception_of_the_dataset_is_not_attributed_to_the_machine(workers: int, bug: Exception) -> None:
    with pytest.raises(type(bug), match="a bug"):
        read(Items(fail(bug)), workers)


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGKILL, "Killed.*memory"), (signal.SIGBUS, "Bus error"), (signal.SIGSEGV, "Segm")]
)
def test_a_killed_worker_ends_the_iteration(number: int, name: str) -> None:
    def die() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), number)

    with pytest.raises(EndedWorkerError, match=f"was killed by the signal {name}"):
        read(Items(die))


def test_a_worker_that_exits_ends_the_iteration() -> None:
    with pytest.raises(EndedWorkerError, match="ended unexpectedly"):
        read(Items(lambda: os._exit(3)))


KILLED_MAIN_PROCESS = """
import os, signal
from gpdit_lightning.workers import WorkerLoader
loader = WorkerLoader([bytes(2**20)] * 100, 2)  # more bytes than a pipe holds, so the workers wait while sending
items = iter(loader._get_iterator())
next(items)
print(*(worker.pid for worker in items._workers), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@linux_only
def test_workers_end_with_a_killed_main_process_while_they_send() -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_MAIN_PROCESS], stdout=subprocess.PIPE, text=True, cwd=ROOT, timeout=60
    )
    workers = [Path("/proc", pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(worker.exists() and "State:\tZ" not in (worker / "status").read_text() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_other_errors_are_not_attributed_to_workers() -> None:
    assert worker_error(RuntimeError("shape '[2]' is invalid")) is None
