"""Records of a preparation, from which any process can resume it at any time.

The input files are divided into parts: lists of files, each of which one process encodes into separate shards. The
list of a part is written before any of its files is opened, and its result once all of its shards are complete. In
between, the complete shards of the part record its progress. The records are in the folder `preparation` beside the
manifest:

    options.json             options and codec that determine the shards
    part-00000.sources.jsonl input files of a part, in order
    part-00000.json          result of a part
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from gpdit_lightning.data.manifest import Kind, ShardEntry, Split
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write, process_lock
from gpdit_lightning.media.finding import LeftOut
from gpdit_lightning.options.prepare import PrepareOptions
from gpdit_lightning.preparation.input_files import FileFormat, HashedValue, InputFile
from gpdit_lightning.specs import CodecSpec

FOLDER_NAME = "preparation"
USE_ANOTHER_FOLDER = "give another --out or delete that folder"
LOCK_RETRY_SECONDS = 0.1


@dataclass(frozen=True)
class PartResult:
    """Result of encoding a part."""

    shards: tuple[ShardEntry, ...]
    used: dict[str, int]
    """Number of videos and images with samples, by split."""
    labels: tuple[str, ...]
    """Labels of the samples, sorted."""
    skipped: tuple[LeftOut, ...]
    """Every input file, or image in a tar, that could not be used."""
    notes: tuple[LeftOut, ...]
    """Remarks on input files and images that were used. Records of older versions have them among the skipped ones."""
    without_samples: tuple[str, ...]
    """Names of the input files that have no samples."""


@dataclass(frozen=True)
class RecordedFile:
    """Record of an input file."""

    name: str
    kind: Kind
    """Kind of its samples."""
    split: Split | None
    """None for a tar whose images have a split each."""
    bytes: int
    path_hash: str
    reason: str
    hashed: HashedValue = "name"
    """For a tar: what is hashed to hold out its images. Records of older versions lack it."""
    is_tar: bool = False

    @property
    def format(self) -> FileFormat:
        """The format of the file."""
        return "tar" if self.is_tar else "video" if self.kind == "video" else "image"

    @classmethod
    def from_input_file(cls, file: InputFile) -> "RecordedFile":
        """Return the record of an input file."""
        return cls(
            file.name, file.kind, file.split, file.bytes, file.path_hash, file.reason, file.hashed, file.format == "tar"
        )

    @classmethod
    def from_json(cls, line: str) -> "RecordedFile":
        """Parse a line of `part-*.sources.jsonl`."""
        values = json.loads(line)
        is_tar = values.pop("is_tar", values["split"] is None)  # older versions: tars have no split
        return cls(path_hash=values.pop("place"), is_tar=is_tar, **values)

    def to_json(self) -> str:
        """Return the line of `part-*.sources.jsonl` for this file."""
        values = asdict(self)
        values["place"] = values.pop("path_hash")
        if self.split is not None:  # images are not held out by a hash
            del values["hashed"]
        if self.is_tar == (self.split is None):
            del values["is_tar"]
        return json.dumps(values, ensure_ascii=False)

    def input_file(self, current: InputFile | None) -> InputFile:
        """Return the file to encode, with the recorded split.

        Args:
            current: current input file of this name; if None, reading the returned file reports that it is missing.
        """
        if current is None:
            return InputFile(Path(self.name), self.name, self.format, self.split, self.bytes, hashed=self.hashed)
        return replace(current, split=self.split, reason=self.reason, hashed=self.hashed)


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
        """Numbers of all parts."""
        return range(len(list(self.folder.glob("part-*.sources.jsonl"))))

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
            content = {"options": options, "codec": codec.to_dict()}
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise InputError if the recorded options differ."""
        recorded = _read(self._options_path)["options"]
        defaults = {field.name: field.default for field in fields(PrepareOptions)}  # of options added since then
        for name, value in json.loads(json.dumps(options)).items():
            before = recorded.get(name, defaults[name])
            if before != value:
                raise InputError(
                    f"{self.out} contains shards of other options ({name} was {before} and is {value}): "
                    f"{USE_ANOTHER_FOLDER}."
                )

    def check_codec(self, codec: CodecSpec) -> None:
        """Raise InputError if the recorded codec is another one."""
        recorded = CodecSpec.from_dict(_read(self._options_path)["codec"], str(self._options_path), USE_ANOTHER_FOLDER)
        recorded.check_same(codec, f"the shards of {self.out}", "this preparation", USE_ANOTHER_FOLDER)

    def add_parts(self, files: Sequence[InputFile], size: int) -> None:
        """Divide files into parts of at most `size` files, numbered after the existing parts."""
        number, remaining = len(self.parts), iter(files)
        while batch := list(islice(remaining, size)):
            with atomic_write(self._files_path(number)) as temporary, temporary.open("w", encoding="utf-8") as output:
                output.writelines(RecordedFile.from_input_file(file).to_json() + "\n" for file in batch)
            number += 1

    def files_of_part(self, part: int) -> list[RecordedFile]:
        """Return the input files of a part, in order."""
        with self._files_path(part).open(encoding="utf-8") as lines:
            return [RecordedFile.from_json(line) for line in lines]

    def is_finished(self, part: int) -> bool:
        """Return whether all shards of a part are complete."""
        return self._result_path(part).exists()

    def result(self, part: int) -> PartResult:
        """Return the result of a finished part."""
        content = _read(self._result_path(part))
        entries = map(ShardEntry.from_dict, content["shards"])
        return PartResult(
            shards=tuple(entries),
            used=content["used"],
            labels=tuple(content["labels"]),
            skipped=tuple(LeftOut(**entry) for entry in content["skipped"]),
            notes=tuple(LeftOut(**entry) for entry in content.get("notes", ())),
            without_samples=tuple(content["lost"]),
        )

    def record_result(self, part: int, result: PartResult) -> None:
        """Record the result of a part whose shards are all complete."""
        values = asdict(result)
        values |= {name: [entry.to_json() for entry in getattr(result, name)] for name in ("skipped", "notes")}
        values["shards"] = [shard.to_dict() for shard in result.shards]
        values["lost"] = values.pop("without_samples")
        with atomic_write(self._result_path(part)) as temporary:
            temporary.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")

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

    @property
    def _options_path(self) -> Path:
        return self.folder / "options.json"

    def _files_path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.sources.jsonl"

    def _result_path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.json"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not readable JSON ({error}): copy it again, or give a new --out.") from None
