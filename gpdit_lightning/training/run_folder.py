"""A run folder that a failed start leaves as it was."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from gpdit_lightning import path_kinds
from gpdit_lightning.checkpoints.files import CHECKPOINTS
from gpdit_lightning.files import atomic_write
from gpdit_lightning.regular_files import BoundedReader, read_bounded
from gpdit_lightning.training.internals import event_writer
from gpdit_lightning.training.loggers import files_in_run_folder, order_event_files

LOCK, RECIPE = ".lock", path_kinds.RECIPE


class RunFolderFiles:
    """The files that a start of a run may create or replace in the run folder, as they are now.

    These are the lock, the recipe, the folder of checkpoints, and the files of Lightning's loggers.

    Args:
        run_dir: the run folder, which may not exist.

    Raises:
        InputError: the recipe in it, or a log, is not a regular file, or the recipe is larger than a text.
        OSError: one of them cannot be read.

    Attributes:
        step: the optimizer step from which the run resumes; 0 for a new run, or as long as it is unknown.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.step = run_dir, 0
        self._missing_folders = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
        self._existing = set(self._paths())
        self._contents = {
            path: read_bounded(path) if path.name == RECIPE else BoundedReader(path).read()
            for path in self._existing
            if path.name == RECIPE or path.suffix == ".csv"
        }

    def order_event_files(self) -> None:
        """Rename event files whose names have times in the future; `restore` keeps the new names."""
        renamed = order_event_files(self.run_dir)
        self._existing = {renamed.get(path, path) for path in self._existing}

    def restore(self) -> None:
        """Remove the files and empty folders that were created since, and restore those that were replaced."""
        for path in sorted(set(self._paths()) - self._existing, reverse=True):  # a folder after its content
            with suppress(OSError):  # a folder with other content
                path.rmdir() if path.is_dir() else path.unlink()
        for folder in self._missing_folders:
            with suppress(OSError):
                folder.rmdir()
        for path, content in self._contents.items():
            if not path.is_file() or path.read_bytes() != content:
                with atomic_write(path) as temporary:
                    temporary.write_bytes(content)

    def _paths(self) -> Iterator[Path]:
        yield from (self.run_dir / name for name in (LOCK, RECIPE, CHECKPOINTS) if (self.run_dir / name).exists())
        yield from files_in_run_folder(self.run_dir)


@contextmanager
def restored_without_a_step(trainer: Trainer, files: RunFolderFiles) -> Iterator[None]:
    """Restore the run folder if the block raises before the first optimizer step of this process.

    Args:
        trainer: the trainer of this rank; the first rank restores.
        files: the files of the folder before the start.
    """
    try:
        yield
    except BaseException:
        if trainer.is_global_zero and trainer.global_step <= files.step:
            with suppress(OSError):
                close_event_files(trainer.loggers)
                files.restore()
        raise


def close_event_files(loggers: Iterable[object]) -> None:
    """Close the event files of TensorBoard, whose writers would create them again; none is opened for this."""
    for logger in loggers:
        writer = event_writer(logger) if isinstance(logger, TensorBoardLogger) else None
        if writer is not None:
            writer.close()
