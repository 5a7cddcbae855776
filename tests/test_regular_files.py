"""Readers of regular files, within their size."""

import hashlib
import os
from pathlib import Path

import pytest

from gpdit_lightning.errors import InputError
from gpdit_lightning.regular_files import BoundedReader, read_lines, sha256_of


def test_sha256_of(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"content").hexdigest()


def test_a_bounded_reader_reads_what_a_file_has_and_no_pipe(tmp_path: Path) -> None:
    path, pipe = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"0123456789")
    os.mkfifo(pipe)
    with BoundedReader(path) as file:
        assert file.read(2**62) == b"0123456789"
        assert file.seek(7) == 7
        assert file.read(2) + file.read(2**62) + file.read() == b"789"
    for open_pipe in (BoundedReader, lambda path: list(read_lines(path, "give a list"))):
        with pytest.raises(InputError, match=f"{pipe} is not a regular file"):
            open_pipe(pipe)
