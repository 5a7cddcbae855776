"""Atomic writes, locks, and checks of output paths."""

import errno
import multiprocessing
import os
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from gpdit_lightning import files
from gpdit_lightning.errors import InputError, file_of
from gpdit_lightning.files import (
    atomic_write,
    check_writable,
    new_partial,
    partial_path,
    process_lock,
    publish,
    remove,
    write_once,
)

fork = multiprocessing.get_context("fork")


def test_atomic_write_creates_folders_and_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    for content in ("first", "second"):
        with atomic_write(path) as partial:
            partial.write_text(content)
            assert partial == partial_path(path)
        assert path.read_text() == content
    assert list(path.parent.iterdir()) == [path]


def test_an_error_of_a_rename_is_that_of_the_file_not_of_the_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(IsADirectoryError) as error, atomic_write(tmp_path / "a.txt") as partial:
        partial.write_text("new")
    assert file_of(error.value, "") == str(tmp_path / "a.txt")


def test_an_error_of_a_write_names_the_file(tmp_path: Path) -> None:
    """That of a full disk has no name; FFmpeg's have none either."""
    with pytest.raises(OSError, match="No space") as error, atomic_write(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert file_of(error.value, "") == str(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a" * 255, "\N{SNOWMAN}" * 85])
def test_atomic_write_of_the_longest_names(tmp_path: Path, name: str) -> None:
    check_writable(tmp_path / name)
    for content in ("first", "second"):
        with atomic_write(tmp_path / name) as partial:
            partial.write_text(content)
            assert partial.suffix == ".partial"
        assert (tmp_path / name).read_text() == content
    assert os.listdir(tmp_path) == [name]


def test_atomic_write_changes_nothing_after_an_exception(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")

    def fail() -> None:
        with atomic_write(path) as partial:
            partial.write_text("incomplete")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("is_folder", [False, True])
def test_writers_of_the_same_file_wait_for_each_other(
    is_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a lock the first writer would publish the incomplete file of the second one."""
    path = tmp_path / "a"

    def write(text: str, begun: Event, may_end: Event) -> None:
        with new_partial(path, is_folder) as partial:
            file = partial / "b" if is_folder else partial
            file.write_text(text[:3])  # closes the file, which would end a record lock
            begun.set()
            may_end.wait(60)
            assert file.read_text() == text[:3]
            file.write_text(text)
            if is_folder:
                remove(path)
            publish(path)

    partial_path(path).symlink_to(tmp_path / "elsewhere")  # a leftover
    events = [fork.Event() for _ in range(4)]
    first = fork.Process(target=write, args=("first", *events[:2]))
    first.start()
    assert events[0].wait(60)
    second = fork.Process(target=write, args=("second", *events[2:]))
    second.start()
    assert not events[2].wait(0.3)
    monkeypatch.setattr(files, "LONGEST_WAIT", 0.0)
    with pytest.raises(InputError, match=f"another process is writing {path}: wait for it or stop it, or give another"):
        write("third", *events[2:])
    events[3].set()
    events[1].set()
    first.join(60)
    second.join(60)
    assert (first.exitcode, second.exitcode) == (0, 0)
    assert (path / "b" if is_folder else path).read_text() == "second"
    assert os.listdir(tmp_path) == ["a"]


def test_publish_flushes_every_entry_before_it_renames_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    (partial_path(path) / "inner").mkdir(parents=True)
    (partial_path(path) / "inner" / "a.txt").write_text("a")
    flushed: list[Path] = []
    monkeypatch.setattr("gpdit_lightning.files.flush", flushed.append)
    publish(path)
    assert flushed == [*(partial_path(path) / name for name in (".", "inner", "inner/a.txt")), tmp_path]
    assert (path / "inner" / "a.txt").read_text() == "a"


def test_process_lock_excludes_other_processes_until_its_process_ends(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "a"
    locked, end = fork.Event(), fork.Event()

    def hold() -> None:
        with process_lock(path) as held:
            assert held
            locked.set()
            end.wait(20)
            os._exit(0)  # without releasing it

    process = fork.Process(target=hold, daemon=True)
    process.start()
    assert locked.wait(20)
    with pytest.raises(BlockingIOError, match="a is held by another process"), process_lock(path):
        pass
    end.set()
    process.join(20)
    with process_lock(path) as held:
        assert held


def test_process_lock_reports_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", fail)
    with process_lock(tmp_path / "a") as held:
        assert not held


def test_check_writable_accepts_new_paths_and_creates_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b.mp4")
    check_writable(tmp_path, is_folder=True)
    check_writable(tmp_path / "a", is_folder=True)
    assert list(tmp_path.iterdir()) == []


def test_check_writable_names_path_reason_and_option(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match=r"file/a cannot be written, since .*/file is not a writable folder: give anot"
    ):
        check_writable(tmp_path / "file" / "a")
    with pytest.raises(InputError, match=r"file cannot be written, since .*/file is not a writable folder"):
        check_writable(tmp_path / "file", is_folder=True)
    for folder in (Path("/"), Path(".")):
        check_writable(folder, is_folder=True)
    for folder in (tmp_path, Path("/")):
        with pytest.raises(InputError, match="cannot be written, since it is a folder: give another --sheet"):
            check_writable(folder, "--sheet")
    with pytest.raises(InputError, match=r"cannot be written \(File name too long\): give another --out"):
        check_writable(tmp_path / ("a" * 256))
    with pytest.raises(InputError, match=r"--out is recipe.yaml: give a name that ends in .png, as"):
        check_writable(Path("recipe.yaml"), extension=".png")


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_file_that_is_written_once_is_complete_and_that_of_the_first_writer(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "a.json"
    if not links:
        monkeypatch.setattr(os, "link", Mock(side_effect=PermissionError))
    write_once(path, "first")
    write_once(path, "second")
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_nlink == 1


def test_an_error_of_an_atomic_write_names_the_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full") as raised, atomic_write(tmp_path / "a") as temporary:
        raise OSError(errno.ENOSPC, "full", str(temporary))
    assert file_of(raised.value, "") == f"{tmp_path}/a"
