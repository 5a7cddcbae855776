"""Writing of the parts of a checkpoint by all ranks together, in a thread while the training continues.

torch.distributed.checkpoint coordinates the ranks: each writes its part, the first one waits for all of them and then
publishes the checkpoint, and a failure of any rank is raised on all. Planner and storage are of this library:

- torch's planner sends a description of each slice of each rank to the first rank at every checkpoint. Here the slices
  follow from the strategy, so a rank sends nothing but the size and the hash of its file.
- torch's `FileSystemWriter` writes an index that is a pickle, and its `HuggingFaceStorageWriter` makes a second copy of
  a part in memory and no hashes. `write_part` writes the latter's format.
"""

import io
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from gpdit_lightning.checkpoints.marks import TRAINING, FileMark
from gpdit_lightning.checkpoints.parts import TensorSlice, part_name, write_hashed, write_part
from gpdit_lightning.files import remove

Publish = Callable[[Mapping[str, FileMark]], None]
"""Called on the first rank with the sizes and hashes of all files by name, when all are on disk."""


def as_bytes(content: dict[str, Any]) -> bytes:
    """Return the content of a checkpoint without its slices as `training.ckpt` has it.

    It is a copy, which the training does not change while it is written.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def save_parts(
    folder: Path, record: bytes, slices: Mapping[str, TensorSlice], group: ProcessGroup, publish: Publish
) -> None:
    """Write a checkpoint in parts; all ranks call it, and return when it is published.

    Args:
        folder: to create; after a failure it is removed.
        record: the content of `training.ckpt`; used on the first rank.
        slices: of this rank, in host memory.
        group: of all ranks, for communication between host memories; not used by another thread at the same time.
        publish: called on the first rank.

    Raises:
        OSError: the first error of any rank, on all of them.
    """
    writer = PartWriter(folder, record, slices, publish)
    try:
        dcp.save({}, storage_writer=writer, planner=NoPlanner(), process_group=group)
    except CheckpointException as error:
        with suppress(OSError):
            if writer.is_coordinator:
                remove(folder)
        raise next(iter(error.failures.values()))[0] from None


class NoPlanner(SavePlanner):
    """Plans nothing: each rank writes its slices."""

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Do nothing."""

    def create_local_plan(self) -> SavePlan:
        """Return an empty plan, which is sent to the first rank."""
        return SavePlan([])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Return the plans unchanged."""
        return all_plans, Metadata({})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Return the plan unchanged."""
        return new_plan

    def resolve_data(self, write_item: Any) -> Any:
        """Not called, since there are no items."""
        raise NotImplementedError


class PartWriter(StorageWriter):
    """Writes the part of this rank and, on the first rank, `training.ckpt`; arguments as of :func:`save_parts`."""

    def __init__(self, folder: Path, record: bytes, slices: Mapping[str, TensorSlice], publish: Publish) -> None:
        self.folder, self.record, self.publish = folder, record, publish
        self.slices = {name: part for name, part in slices.items() if part.values.numel()}
        self.is_coordinator = False

    def reset(self, checkpoint_id: Any = None) -> None:
        """Do nothing: a writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Create the folder, on the first rank; no rank writes before."""
        self.is_coordinator = is_coordinator
        if is_coordinator:
            self.folder.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Name the files of the ranks."""
        return [SavePlan([], storage_data=part_name(rank, len(plans))) for rank in range(len(plans))]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the files of this rank, and wait until they are on disk."""
        marks = {plan.storage_data: write_part(self.folder / plan.storage_data, self.slices)}
        if self.is_coordinator:
            marks[TRAINING] = write_hashed(self.folder / TRAINING, self.record)
        written: Future[list[WriteResult]] = Future()
        written.set_result([WriteResult(MetadataIndex(name), *mark) for name, mark in marks.items()])
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Publish the files of all ranks."""
        files = [result for of_rank in results for result in of_rank]
        self.publish({file.index.fqn: (file.size_in_bytes, file.storage_data) for file in files})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Return True: the folder is an argument of the constructor."""
        return True


class BackgroundTask:
    """Runs one task at a time in a thread.

    The thread ends with the process, so that a disk which does not respond does not keep the process.

    Attributes:
        seconds: duration of the last task; 0 before it has ended.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def has_failed(self) -> bool:
        """Whether the last task has raised an exception that `wait` has not raised yet."""
        return self._error is not None

    @property
    def is_running(self) -> bool:
        """Whether a task has not ended."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, task: Callable[[], None]) -> None:
        """Start a task; call `wait` before the next one."""
        assert self._thread is None

        def run() -> None:
            begun = time.perf_counter()
            try:
                task()
            except BaseException as error:  # raised by `wait`
                self._error = error
            self.seconds = time.perf_counter() - begun

        thread = threading.Thread(target=run, daemon=True, name="checkpoint")
        thread.start()  # raises if there are too many threads or too little memory; then there is none to wait for
        self._thread = thread

    def join(self, seconds: float | None = None) -> None:
        """Wait until the task has ended, but at most some seconds."""
        if self._thread is not None:
            self._thread.join(seconds)

    def wait(self) -> None:
        """Wait until the task has ended, and raise its exception, if it has raised one."""
        self.join()
        error, self._thread, self._error = self._error, None, None
        if error is not None:
            raise error
