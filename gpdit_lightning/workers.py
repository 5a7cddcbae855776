"""Data loaders whose worker processes need no shared memory, and whose failures end in one sentence.

torch sends a tensor from a worker to the main process in a file in /dev/shm. If that is full (a container has 64 MB by
default), or memory or open files run out, the thread of the worker that sends items prints a traceback and drops the
item, for which the main process waits forever. Here the tensors of an item are sent in a file in memory that belongs to
no file system (`memfd_create`), whose descriptor follows the item through the same socket, and every exception of that
thread is sent to the main process instead of the item.
"""

import copy
import errno
import multiprocessing
import os
import re
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection, Pipe
from multiprocessing.context import BaseContext
from multiprocessing.queues import Queue
from multiprocessing.reduction import ForkingPickler
from signal import strsignal
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from gpdit_lightning.errors import InputError
from gpdit_lightning.retries import transient_error
from gpdit_lightning.signals import ignore_signals, signals_delayed

T = TypeVar("T")

INLINE_BYTES = 1024  # tensors up to this size are sent within the message of their item
CURE = "use fewer workers, or free memory, and run the same command again."
SEMAPHORES_CURE = "use fewer workers, or a larger /dev/shm, and run the same command again."
NO_SEMAPHORES_CURE = "mount /dev/shm so that it can be written, or use 0 workers, and run the same command again."
NO_SEMAPHORES_ERRORS = (errno.ENOENT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSYS)
FILES_CURE = "raise the limit of open files (ulimit -n), and run the same command again."
OPEN_FILES_ERRORS = (errno.EMFILE, errno.ENFILE)
ITEM = "an item of a worker process"
NO_THREAD = "can't start new thread"  # the message of Python's RuntimeError


class EndedWorkerError(InputError):
    """A worker process was killed or ended unexpectedly."""


class WorkerLoader(DataLoader[T]):
    """A DataLoader of single items whose iteration raises `InputError` if a worker fails, and never waits for it.

    Args:
        dataset: the dataset; an `InputError` that it raises is raised here with the same message.
        num_workers: number of worker processes; 0 reads in this process.
        settings: other arguments of DataLoader.
    """

    def __init__(self, dataset: Dataset[T], num_workers: int = 0, **settings: Any) -> None:
        if num_workers:
            settings |= {"multiprocessing_context": _worker_context(), "worker_init_fn": _prepare_worker}
        guarded = _GuardedStream(dataset) if isinstance(dataset, IterableDataset) else _GuardedItems(dataset)
        with _any_number_of_workers():
            super().__init__(guarded, batch_size=None, num_workers=num_workers, **settings)

    def __iter__(self) -> Any:
        items: Iterator[Any]
        try:
            with signals_delayed(), _any_number_of_workers():
                items = super().__iter__()  # starts the workers
        except (OSError, RuntimeError) as error:
            # No memory for a process or thread, no open file, or no space in /dev/shm for a semaphore.
            if isinstance(error, RuntimeError) and NO_THREAD not in str(error):
                raise
            number = getattr(error, "errno", None)
            cure = NO_SEMAPHORES_CURE if number in NO_SEMAPHORES_ERRORS else CURE
            cure = SEMAPHORES_CURE if number == errno.ENOSPC else cure
            message = f"{self.num_workers} worker processes could not be started {_cause_and_cure(error, cure)}"
            with _finalizers_silent():
                error.__traceback__ = None  # frees torch's iterator, which is incomplete, so that its finalizer fails
            # Raised with the first item: Lightning's teardown fails on a loader whose iteration never began.
            items = iter([_Failure(InputError(message))])
        return self._checked(items)

    def _checked(self, items: Iterator[Any]) -> Iterator[T]:
        try:
            for item in items:
                if isinstance(item, _Failure):
                    raise item.error
                yield item
        except (RuntimeError, OSError) as error:
            codes = [worker.exitcode for worker in getattr(items, "_workers", ()) if worker.exitcode]
            raise worker_error(error, codes) or transient_error(error, ITEM) or error from None


@contextmanager
def _any_number_of_workers() -> Iterator[None]:
    """Ignore torch's advice on the number: workers that wait for disks and decoders may be more than the CPU cores."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*suggested max number of worker")
        yield


def worker_error(error: BaseException, exit_codes: Iterable[int] = ()) -> EndedWorkerError | None:
    """Return the error to raise if an exception arises from the end of a worker process; else None.

    torch raises it from the handler of SIGCHLD, so wherever the main process is, or at the next request of an item.

    Args:
        error: the exception.
        exit_codes: of the workers that have ended, if they are known: the negative number of a signal, or a status.
    """
    text = f"{error} {error.__cause__}"
    if "Communication with the workers is no longer possible" in text:
        return EndedWorkerError(
            f"an item of a worker process could not be received (too many open files): {FILES_CURE}"
        )
    if NO_THREAD in text and "DataLoader worker" in text:
        return EndedWorkerError(f"a worker process could not start a thread: {CURE}")
    # The process number distinguishes the end of a worker from an exception that arose in it.
    if "DataLoader worker (pid" not in text and "Pin memory thread" not in text:
        return None
    named = re.search(r"killed by signal: ([^.]*)\.", text)
    name = named[1] if named else next((strsignal(-code) for code in exit_codes if code < 0), None)
    how = f"was killed by the signal {name}" if name else "ended unexpectedly"
    hint = {
        "Killed": ", as the system does if memory runs out",
        "Bus error": ", as if a file was truncated or its disk failed while it was read",
    }.get(name or "", "")
    return EndedWorkerError(f"a worker process that reads data {how}{hint}: {CURE}")


def thread_error(error: BaseException) -> InputError | None:
    """Return the error to raise if an exception states that no thread could be started in this process; else None."""
    if isinstance(error, RuntimeError) and NO_THREAD in str(error):
        return InputError(f"a thread could not be started: {CURE}")
    return None


@contextmanager
def _finalizers_silent() -> Iterator[None]:
    """Do not print exceptions of finalizers."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = hook


class _Failure:
    """An error of a worker, sent in place of an item."""

    def __init__(self, error: InputError) -> None:
        self.error = error


class _GuardedItems(Dataset[Any]):
    """A map-style dataset that returns an InputError, or a failure of the machine, as a `_Failure`."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            return _failure_of(error)


class _GuardedStream(IterableDataset[Any]):
    """The same for an iterable dataset."""

    def __init__(self, dataset: IterableDataset[Any]) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.dataset
        except Exception as error:
            yield _failure_of(error)


def _failure_of(error: Exception) -> _Failure:
    """Return an exception that a user can correct as a `_Failure`; raise any other one again."""
    known = error if isinstance(error, InputError) else transient_error(error, ITEM)
    if known is None:
        raise error
    return _Failure(known)


class _Transfer(threading.local):
    """The file with the tensors of the item that a thread sends or receives."""

    file: int | None = None

    def close(self) -> None:
        file, self.file = self.file, None
        if file is not None:
            os.close(file)


_transfer = _Transfer()


class _ItemQueue(Queue):
    """A queue that sends tensors in files, and reports the exceptions of the thread which sends the items of a worker.

    A message is the bytes of the pickled item, and a byte with the descriptor of its file, if it has one.
    """

    _reader: Connection
    _writer: Connection

    def __init__(self, maxsize: int = 0, *, ctx: Any) -> None:
        super().__init__(maxsize, ctx=ctx)
        if sys.platform == "linux":  # sockets, since pipes send no descriptors
            self._reader.close()
            self._writer.close()
            self._reader, self._writer = Pipe(duplex=True)
            self._reset()

    def _reset(self, after_fork: bool = False) -> None:
        super()._reset(after_fork)  # type: ignore[misc]
        if sys.platform == "linux":
            # Not methods: the cycle of references would keep the sockets open.
            self._send_bytes = partial(_send_with_file, self._writer)
            self._recv_bytes = partial(_receive_with_file, self._reader)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        try:
            return super().get(block, timeout)
        finally:
            _transfer.close()

    def put(self, obj: Any, block: bool = True, timeout: float | None = None) -> None:
        """Put (number, item); the first call in a worker starts the thread, or sends the error if that fails."""
        try:
            super().put(obj, block, timeout)
        except RuntimeError as error:
            if get_worker_info() is None:
                raise
            with self._wlock:  # type: ignore[attr-defined]
                self._send_bytes(ForkingPickler.dumps((obj[0], _unsent(error))))

    def _on_queue_feeder_error(self, e: Exception, obj: Any) -> None:
        """Send an exception in place of the item that could not be sent; this is a hook of multiprocessing.

        Args:
            e: the exception.
            obj: (number, item), or its bytes if these could not be written.
        """
        _transfer.close()
        if isinstance(e, BrokenPipeError):  # the main process has ended
            os._exit(1)
        if get_worker_info() is None or not isinstance(obj, tuple) or isinstance(obj[1], _Failure):
            traceback.print_exception(e)
            os._exit(1)  # nothing can be sent
        self.put((obj[0], _unsent(e)))


def _send_with_file(connection: Connection, message: Any) -> None:
    try:
        connection.send_bytes(message)
        with _socket_of(connection) as connected:
            socket.send_fds(connected, [b"\0"], [] if _transfer.file is None else [_transfer.file])
    finally:
        _transfer.close()


def _receive_with_file(connection: Connection) -> bytes:
    message = connection.recv_bytes()
    with _socket_of(connection) as connected:
        _, files, *_ = socket.recv_fds(connected, 1, 1)
    _transfer.file = files[0] if files else None
    return message


@contextmanager
def _socket_of(connection: Connection) -> Iterator[socket.socket]:
    """Provide a socket for the descriptor of a connection, which stays open."""
    connected = socket.socket(fileno=connection.fileno())
    try:
        yield connected
    finally:
        connected.detach()


def _unsent(error: Exception) -> _Failure:
    return _Failure(InputError(f"a worker process could not send an item to the main process {_cause_and_cure(error)}"))


def _cause_and_cure(error: Exception, cure: str = CURE) -> str:
    """Return the end of a message; the cure is another one for too many open files."""
    reason = " ".join((getattr(error, "strerror", None) or str(error) or "memory ran out").split())
    return f"({reason}): {FILES_CURE if getattr(error, 'errno', None) in OPEN_FILES_ERRORS else cure}"


def _worker_context() -> BaseContext:
    """Return the default context of multiprocessing, with queues that report errors."""
    context = copy.copy(multiprocessing.get_context())
    context.Queue = lambda maxsize=0: _ItemQueue(maxsize, ctx=context)  # type: ignore[method-assign]
    return context


def _prepare_worker(worker: int) -> None:
    """Ignore signals, and send tensors without /dev/shm; a `worker_init_fn`."""
    parent = multiprocessing.parent_process()
    if multiprocessing.get_start_method() == "fork" and parent is not None and os.getppid() != parent.pid:
        os._exit(1)  # killed already; torch's watchdog would take the process that adopted this one for it
    ignore_signals(worker)
    if sys.platform == "linux":
        ForkingPickler.register(Tensor, _reduce_tensor)


def _reduce_tensor(tensor: Tensor) -> Any:
    """Pickle a tensor of a worker as the position of its values in the file of its item."""
    values = memoryview(_bytes_of(tensor.contiguous()))
    if len(values) <= INLINE_BYTES:
        return _tensor_of_bytes, (values.tobytes(), tensor.dtype, tensor.shape)
    if _transfer.file is None:
        _transfer.file = os.memfd_create("tensors")
    position, written = os.lseek(_transfer.file, 0, os.SEEK_CUR), 0
    while written < len(values):
        written += os.write(_transfer.file, values[written:])
    return _tensor_of_file, (position, tensor.dtype, tensor.shape)


def _tensor_of_bytes(values: bytes, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    memoryview(_bytes_of(tensor))[:] = values
    return tensor


def _tensor_of_file(position: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    if _transfer.file is None:  # the system drops a descriptor that exceeds the limit of the process which receives it
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    tensor = torch.empty(shape, dtype=dtype)
    values, count = memoryview(_bytes_of(tensor)), 0
    while count < len(values):
        count += os.preadv(_transfer.file, [values[count:]], position + count)
    return tensor


def _bytes_of(tensor: Tensor) -> Any:
    """Return the memory of a contiguous tensor as a NumPy array of bytes."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()
