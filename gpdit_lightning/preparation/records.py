"""Records of a preparation, from which any process can resume it at any time.

The input files are divided into parts: lists of files, each of which one process encodes into separate shards. The
list of a part is written before any of its files is opened, and its result once all of its shards are complete. In
between, the complete shards of the part are its progress. The records are in the folder `preparation` beside the
manifest:

    options.json             options and codec that determine the shards
    part-00000.sources.jsonl input files of a part, in order; then the number of the part, a hash of these lines, and
                             that of the options, as in options.json
    part-00000.shards.json   the shards of a part and their hashes, each recorded just before it has its final name
    part-00000.json          result of a part

Every file has a hash of its content, and the records of parts have that of the options, so that those of another
preparation are refused; files of earlier versions have none. A list that is damaged, missing or that of another part
is refused, since the parts and their order cannot be known without it. A result that is damaged, or whose shards are
missing, is removed: the part is then encoded again, except for the samples in its complete shards.
"""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from gpdit_lightning.data.shard_entry import SHARD_NAME, ShardEntry
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write, process_lock
from gpdit_lightning.options.prepare import PrepareOptions
from gpdit_lightning.preparation.input_files import InputFile
from gpdit_lightning.preparation.record_formats import COPY_AGAIN, PartResult, RecordedFile, shards_of_part
from gpdit_lightning.regular_files import read_bounded
from gpdit_lightning.retries import retried, transient_error
from gpdit_lightning.schema import (
    CONTENT_HASH,
    MAX_JSON_BYTES,
    OBJECT,
    TEXT,
    check,
    check_content_hash,
    content_hash,
    parse_json,
)
from gpdit_lightning.specs import CodecSpec

log = logging.getLogger(__name__)

FOLDER_NAME = "preparation"
USE_ANOTHER_FOLDER = "give another --out or delete that folder"
LOCK_RETRY_SECONDS = 0.1
PART_FILE = re.compile(r"part-(\d{5})(\.sources\.jsonl|\.json)")


class PartLock(NamedTuple):
    """State of the lock of a part."""

    acquired: bool
    """Whether no other process is encoding the part."""
    exclusive: bool
    """Whether other processes respect the lock; False on a file system without locks."""


class Records:
    """Records of a preparation, read from and written to files.

    Args:
        out: folder of the shards.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / FOLDER_NAME

    @property
    def parts(self) -> range:
        """Numbers of all parts; raises InputError if the list of one of them is missing."""
        lists, results = set[int](), set[int]()
        for path in self.folder.glob("part-*.json*"):
            if match := PART_FILE.fullmatch(path.name):
                (results if match[2] == ".json" else lists).add(int(match[1]))
        if missing := {*range(max(lists | results, default=-1) + 1)} - lists:
            raise InputError(f"{self._files_path(min(missing))} is missing, though later parts exist: {COPY_AGAIN}.")
        return range(len(lists))

    @property
    def unfinished_parts(self) -> list[int]:
        """Numbers of the parts without a result."""
        return [part for part in self.parts if not self.is_finished(part)]

    @property
    def files(self) -> list[RecordedFile]:
        """All recorded input files, in the order of the parts."""
        return [file for part in self.parts for file in self.files_of_part(part)]

    @property
    def latest_parts(self) -> dict[str, int]:
        """The number of the last part of each input file, by name: a file that is retried is in several parts."""
        return {file.name: part for part in self.parts for file in self.files_of_part(part)}

    @property
    def results(self) -> dict[int, PartResult]:
        """Results of the finished parts, by number."""
        return {part: self.result(part) for part in self.parts if self.is_finished(part)}

    def record_settings(self, options: dict[str, Any], codec: CodecSpec) -> None:
        """Record the options and the codec that determine the shards.

        Raises:
            InputError: the recorded options or codec differ, or the folder contains shards without records.
        """
        if self._options_path.exists():
            self.check_options(options)
            self.check_codec(codec)
            return
        if shard := next(self.out.glob("*.tar"), None):
            raise InputError(f"{shard} was not written by this command: give another --out.")
        with atomic_write(self._options_path) as temporary:
            content = _with_hash({"options": options, "codec": codec.to_dict()})
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise InputError if the recorded options differ."""
        recorded = self._recorded_settings()["options"]
        defaults = {field.name: field.default for field in fields(PrepareOptions)}  # of options added since then
        for name, value in json.loads(json.dumps(options)).items():
            before = recorded.get(name, defaults[name])
            if before != value:
                raise InputError(
                    f"{self.out} contains shards of other options (--{name} was {before} and is {value}): "
                    f"{USE_ANOTHER_FOLDER}."
                )

    def check_codec(self, codec: CodecSpec) -> None:
        """Raise InputError if the recorded codec is another one."""
        recorded = CodecSpec.from_dict(self._recorded_settings()["codec"], str(self._options_path), USE_ANOTHER_FOLDER)
        recorded.check_same(codec, f"the shards of {self.out}", "this preparation", USE_ANOTHER_FOLDER)

    def add_parts(self, files: Sequence[InputFile], size: int) -> None:
        """Divide files into parts of at most `size` files, numbered after the existing parts."""
        number, remaining = len(self.parts), iter(files)
        while batch := list(islice(remaining, size)):
            self.record_shards(number, ())  # before the list, since a part without it is of an earlier version
            with atomic_write(self._files_path(number)) as temporary, temporary.open("w", encoding="utf-8") as output:
                lines = "".join(RecordedFile.from_input_file(file).to_json() + "\n" for file in batch)
                end = _end_of_list(number, lines.encode()) | {"options": self._options_hash}
                output.write(f"{lines}{json.dumps(end)}\n")
            number += 1

    def files_of_part(self, part: int) -> list[RecordedFile]:
        """Return the input files of a part, in order; raises InputError if its list is damaged."""
        path = self._files_path(part)
        lines = _read_bytes(path).splitlines(keepends=True)
        end = parse_json(lines[-1], f"{path} line {len(lines)}", COPY_AGAIN) if lines else None
        if isinstance(end, dict) and "sha256" in end:
            lines.pop()
            actual = _end_of_list(part, b"".join(lines))
            if "options" in end:  # lists of earlier versions have none
                actual["options"] = self._options_hash
            if end != actual:
                raise InputError(f"{path} was damaged or edited (it has {actual} and records {end}): {COPY_AGAIN}.")
        elif self._has_hashes or not lines:
            raise InputError(f"{path} lacks its last line, with the hash of the others: {COPY_AGAIN}.")
        files = [RecordedFile.from_json(line, f"{path} line {number}") for number, line in enumerate(lines, start=1)]
        names = {file.name for file in files}
        if len(names) < len(files):
            raise InputError(f"{path} lists {len(files)} files with {len(names)} names: {COPY_AGAIN}.")
        return files

    def is_finished(self, part: int) -> bool:
        """Return whether all shards of a part are complete."""
        return self._result_path(part).exists()

    def result(self, part: int) -> PartResult:
        """Return the result of a finished part; raises InputError if it is damaged or that of another part."""
        path = self._result_path(part)
        return PartResult.from_dict(self._read_of_part(path), part, str(path))

    def shards(self, part: int) -> dict[str, ShardEntry] | None:
        """Return the recorded shards of a part by path; None if an earlier version began the part.

        Raises:
            InputError: the record is damaged or that of another part.
        """
        path = self._shards_path(part)
        if not os.path.lexists(path):
            return None
        return {entry.path: entry for entry in shards_of_part(self._read_of_part(path), part, str(path))}

    def check_parts(self) -> None:
        """Check the lists of all parts, and remove results that are damaged or whose shards are missing.

        The parts of removed results are then unfinished.

        Raises:
            InputError: a list is damaged, or an input file is in two parts.
        """
        earlier: dict[str, int] = {}
        without_samples: dict[int, frozenset[str]] = {}
        for part in self.parts:
            files = self.files_of_part(part)
            for file in files:
                before = earlier.get(file.name)
                if before is not None and file.name not in without_samples.get(before, frozenset()):
                    raise InputError(
                        f"{self._files_path(part)} lists {file.name}, which part {before} contains: {COPY_AGAIN}."
                    )
                earlier[file.name] = part
            if result := self._usable_result(part):
                without_samples[part] = frozenset(result.without_samples)
                used = sum(result.used.values())  # of a tar, its images
                if not files[0].is_tar and used + len(result.without_samples) != len(files):
                    raise InputError(
                        f"{self._files_path(part)} lists {len(files)} files, but {self._result_path(part)} is the "
                        f"result of {used + len(result.without_samples)}: {COPY_AGAIN}."
                    )

    def _usable_result(self, part: int) -> PartResult | None:
        """Return the result of a part; remove it if it is damaged, or if a shard is missing or has another size."""
        if not self.is_finished(part):
            return None
        try:
            result = self.result(part)
            self._check_shards(part, result)
        except InputError as error:
            log.warning("part %d is completed again, since its result cannot be used: %s", part, error)
            self._result_path(part).unlink(missing_ok=True)
            return None
        return result

    def _check_shards(self, part: int, result: PartResult) -> None:
        """Raise InputError if a shard of a result is missing or has another size, or if the result lacks a shard."""
        for entry in result.shards:
            for name, size in ((entry.path, entry.bytes), (entry.index, None)):
                path = self.out / name
                if not path.is_file() or size not in (None, path.stat().st_size):
                    raise InputError(f"{path} is missing or has another size than {size}: copy it again.")
        if not self._has_hashes:  # a result of an earlier version may have lost entries
            listed = {entry.path for entry in result.shards}
            for path in self.out.glob(f"*-{part:05d}-?????.tar"):
                if path.name not in listed and SHARD_NAME.fullmatch(path.stem):
                    raise InputError(f"{self._result_path(part)} does not list {path.name}: {COPY_AGAIN}.")

    def record_shards(self, part: int, shards: Sequence[ShardEntry]) -> None:
        """Record the shards of a part that are complete, or will be as soon as one has its final name."""
        entries = [shard.to_dict() for shard in sorted(shards, key=lambda shard: shard.path)]
        self._write_of_part(self._shards_path(part), {"part": part, "shards": entries})

    def record_result(self, part: int, result: PartResult) -> None:
        """Record the result of a part whose shards are all complete."""
        self._write_of_part(self._result_path(part), result.to_dict(part))

    def _write_of_part(self, path: Path, content: dict[str, Any]) -> None:
        with atomic_write(path) as temporary:
            content = _with_hash(content | {"options": self._options_hash})
            temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

    def _read_of_part(self, path: Path) -> dict[str, Any]:
        """Read a record of a part; raises InputError if it is damaged, or belongs to other options."""
        options = self._options_hash
        content = _read(path, needs_hash=options is not None)
        if content.get("options", options) != options:  # records of earlier versions have none
            raise InputError(f"{path} belongs to a preparation with other options or another codec: {COPY_AGAIN}.")
        return content

    @contextmanager
    def lock_part(self, part: int) -> Iterator[PartLock]:
        """Lock a part during the block, unless another process holds its lock."""
        path = self.folder / f"part-{part:05d}.lock"
        with ExitStack() as stack:
            try:
                exclusive = stack.enter_context(process_lock(path))
            except BlockingIOError:
                yield PartLock(acquired=False, exclusive=True)
                return
            yield PartLock(True, exclusive)
            # A process that opened the lock file in the meantime finds the result of the part.
            path.unlink(missing_ok=True)

    @contextmanager
    def lock_all(self) -> Iterator[None]:
        """Hold the lock for dividing files into parts and writing the manifest during the block; wait for it first."""
        with ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(process_lock(self.folder / "lock"))
                    break
                except BlockingIOError:
                    time.sleep(LOCK_RETRY_SECONDS)
            yield

    def _recorded_settings(self) -> dict[str, Any]:
        path = self._options_path
        return check(_read(path), {"options": OBJECT, "codec": OBJECT}, "", str(path), COPY_AGAIN)

    @property
    def _has_hashes(self) -> bool:
        """Whether all records have hashes, since this or a later version wrote the first of them."""
        return self._options_hash is not None

    @property
    def _options_hash(self) -> str | None:
        return self._recorded_settings().get(CONTENT_HASH)

    @property
    def _options_path(self) -> Path:
        return self.folder / "options.json"

    def _files_path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.sources.jsonl"

    def _shards_path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.shards.json"

    def _result_path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.json"


def _end_of_list(part: int, lines: bytes) -> dict[str, Any]:
    return {"part": part, "files": lines.count(b"\n"), "sha256": hashlib.sha256(lines).hexdigest()}


def _with_hash(content: dict[str, Any]) -> dict[str, Any]:
    return content | {CONTENT_HASH: content_hash(json.loads(json.dumps(content)))}


def _read(path: Path, needs_hash: bool = False) -> dict[str, Any]:
    """Read a record; raises InputError if it is damaged, or lacks the hash of its content and needs one."""
    content = check(parse_json(_read_bytes(path), str(path), COPY_AGAIN), OBJECT, "", str(path), COPY_AGAIN)
    if needs_hash:
        check(content, {CONTENT_HASH: TEXT}, "", str(path), COPY_AGAIN)
    check_content_hash(content, str(path), COPY_AGAIN)
    return content


@retried
def _read_bytes(path: Path) -> bytes:
    try:
        return read_bounded(path, MAX_JSON_BYTES)
    except OSError as error:
        unreadable = InputError(f"{path} cannot be read ({error.strerror}): {COPY_AGAIN}.")
        raise transient_error(error, path) or unreadable from None
