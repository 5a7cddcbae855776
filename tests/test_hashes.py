"""Hashes of files that are remembered."""

import errno
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from gpdit_lightning import files, hashes
from gpdit_lightning.errors import InputError, TransientError
from gpdit_lightning.files import process_lock
from gpdit_lightning.hashes import remembered_sha256
from gpdit_lightning.regular_files import open_regular


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose hash is remembered although it is new."""
    monkeypatch.setattr(hashes, "FOLDER", tmp_path / "hashes")
    monkeypatch.setattr(hashes, "TIME_RESOLUTION", 0.0)
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 50_000)
    return path


@pytest.fixture
def reads(file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that gets one line for each time that a file is read, by any process."""
    log, compute = file.with_name("reads"), hashes._compute

    def recorded(*arguments: Any) -> Any:
        with log.open("a") as lines:
            lines.write("read\n")
        time.sleep(0.1)
        return compute(*arguments)

    monkeypatch.setattr(hashes, "_compute", recorded)
    log.touch()
    return log


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_is_read_again_only_after_a_change(file: Path, reads: Path) -> None:
    for _ in range(3):
        assert remembered_sha256(file) == sha256(file)
    assert reads.read_text().count("read") == 1
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[70_000] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # a program cannot set back the change time
    assert remembered_sha256(file) == hashlib.sha256(content).hexdigest()
    os.replace(file, file.with_name("moved"))
    file.write_bytes(content[::-1])
    assert remembered_sha256(file) == hashlib.sha256(content[::-1]).hexdigest()
    assert reads.read_text().count("read") == 3


def test_a_file_that_changed_just_now_is_not_remembered(
    file: Path, reads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could change again within the resolution of the file system's times."""
    monkeypatch.setattr(hashes, "TIME_RESOLUTION", 60.0)
    for _ in range(2):
        remembered_sha256(file)
    assert reads.read_text().count("read") == 2


@pytest.mark.parametrize("record", ["", "{}", '{"identity": [], "sha256": "0"}', "[" * 100_000, "\0" * 10])
def test_damaged_records_are_ignored(file: Path, record: str) -> None:
    remembered_sha256(file)
    (path,) = (file.parent / "hashes").glob("*.json")
    assert json.loads(path.read_text())["path"] == str(file)
    written = path.read_text()
    path.write_text(record)
    assert remembered_sha256(file) == sha256(file)
    last = sha256(file)[-1]
    path.write_text(written.replace(f'{last}"', f'{"1" if last == "0" else "0"}"'))  # a digit of the sha256
    assert remembered_sha256(file) == sha256(file)


def test_the_processes_of_a_machine_read_a_file_once(file: Path, reads: Path) -> None:
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            os._exit(0 if remembered_sha256(file) == sha256(file) else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert reads.read_text().count("read") == 1


def test_a_process_that_stopped_while_it_read_is_not_waited_for(
    file: Path, reads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "ABANDONED_AFTER", 0.3)
    monkeypatch.setattr(hashes, "_recall", lambda *_: None)
    remembered_sha256(file)
    (lock,) = (file.parent / "hashes" / "locks").iterdir()
    ready, child = os.pipe(), os.fork()
    if child == 0:
        with process_lock(lock):
            os.write(ready[1], b".")
            time.sleep(30)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        assert remembered_sha256(file) == sha256(file)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


@pytest.mark.parametrize("existing", ["nothing", "records", "locks"])
def test_without_a_home_folder_that_can_be_written_files_are_read_each_time(
    existing: str, file: Path, reads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On compute nodes, a home folder with records of other machines may be read-only."""
    if existing == "nothing":
        monkeypatch.setattr(hashes, "FOLDER", file / "not a folder")
    else:
        monkeypatch.setattr(hashes, "FOLDER", file.with_name(existing))
        locks = file.with_name(existing) / "locks"
        locks.parent.mkdir()
        locks.touch() if existing == "records" else locks.mkdir()

    def no_write(path: Path, flags: int = os.O_RDONLY) -> Any:
        if flags != os.O_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return open_regular(path, flags)

    monkeypatch.setattr(hashes, "open_regular", no_write)
    monkeypatch.setattr(files, "open_regular", no_write)
    assert [remembered_sha256(file) for _ in range(2)] == [sha256(file)] * 2
    assert reads.read_text().count("read") == 2


def test_what_is_not_a_file_and_what_changes_meanwhile_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(file.with_name("pipe"))
    with pytest.raises(InputError, match="pipe is not a regular file"):
        remembered_sha256(file.with_name("pipe"))

    class Growing:
        """A hash during whose computation the file grows."""

        def update(self, _: Any) -> None:
            with file.open("ab") as end:
                end.write(b"more")

    monkeypatch.setattr(
        hashes.hashlib, "sha256", lambda *given: Growing() if not given else hashlib.new("sha256", *given)
    )
    with pytest.raises(TransientError, match="weights changed while it was read"):
        hashes._compute(file)
