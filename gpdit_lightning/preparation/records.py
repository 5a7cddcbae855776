"""What a preparation notes beside its shards, so that any process, at any time, can go on with it.

The sources are cut into parts. A part's sources are written down before any of them is opened; what came of a part
when all its shards are complete. Between the two, the part's complete shards say how far it got. Everything lies in the
folder `preparation` beside the manifest:

    options.json             what the shards are made with
    part-00000.sources.jsonl the sources of a part, in their order
    part-00000.json          what came of it
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from gpdit_lightning.data.manifest import Kind, ShardEntry, Split
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import held_by_one_process, written_whole
from gpdit_lightning.preparation.input_files import InputFile
from gpdit_lightning.specs import CodecSpec

FOLDER_NAME = "preparation"
NEW_FOLDER = "give another --out or delete that folder"
PAUSE = 0.1  # seconds between looks at a lock that another process holds


@dataclass(frozen=True)
class PartResult:
    """What came of a part."""

    shards: tuple[ShardEntry, ...]
    used: dict[str, int]
    """Sources that gave samples, by split."""
    labels: tuple[str, ...]
    """The labels of its samples, sorted."""
    skipped: tuple[dict[str, str], ...]
    """`{"source", "reason"}` of every source, or part of one, that could not be used."""
    lost: tuple[str, ...]
    """Sources that gave no sample at all."""


@dataclass(frozen=True)
class RecordedSource:
    """What is noted of a source."""

    name: str
    kind: Kind
    split: Split | None
    bytes: int
    place: str
    reason: str

    def at(self, found: InputFile | None) -> InputFile:
        """The source as it was found again, with the split it has had since; reading a missing one will say so."""
        if found is None:
            return InputFile(Path(self.name), self.name, self.kind, self.split, self.bytes)
        return replace(found, split=self.split, reason=self.reason)


class Hold(NamedTuple):
    """Whether a part may be worked on."""

    free: bool
    """No other process holds it."""
    certain: bool
    """The file system has locks, so that others know."""


class Records:
    """The notes of a preparation.

    Args:
        out: the folder of the shards.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / FOLDER_NAME

    @property
    def parts(self) -> range:
        """The numbers of the parts."""
        return range(len(list(self.folder.glob("part-*.sources.jsonl"))))

    def begin(self, options: dict[str, Any], codec: CodecSpec) -> None:
        """Note what the shards are made with.

        Raises:
            InputError: it was something else before.
        """
        if self._options_path.exists():
            self.check(options)
            self._check_codec(codec)
            return
        if stray := next(self.out.glob("*.tar"), None):
            raise InputError(f"{stray} was made by something else than this command: give another --out.")
        with written_whole(self._options_path) as temporary:
            content = {"options": options, "codec": codec.to_dict()}
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")

    def check(self, options: dict[str, Any]) -> None:
        """Raise `InputError` where the shards were made with other options."""
        before = _read(self._options_path)["options"]
        for name, value in json.loads(json.dumps(options)).items():
            if before.get(name) != value:
                raise InputError(
                    f"{self.out} holds shards made differently ({name} was {before.get(name)} and is {value}): "
                    f"{NEW_FOLDER}."
                )

    def _check_codec(self, codec: CodecSpec) -> None:
        before = CodecSpec.from_dict(_read(self._options_path)["codec"], str(self._options_path), NEW_FOLDER)
        before.check_same(codec, f"the shards of {self.out}", "this preparation", NEW_FOLDER)

    def unfinished(self) -> list[int]:
        """The parts that are not finished."""
        return [part for part in self.parts if not self.finished(part)]

    def recorded(self) -> list[RecordedSource]:
        """Every source that belongs to a part."""
        return [source for part in self.parts for source in self.of_part(part)]

    def of_part(self, part: int) -> list[RecordedSource]:
        """The sources of a part, in their order."""
        with self._sources_path(part).open(encoding="utf-8") as file:
            return [RecordedSource(**json.loads(line)) for line in file]

    def add(self, sources: Sequence[InputFile], size: int) -> None:
        """Cut sources into parts of at most `size`, behind those that are there."""
        number, remaining = len(self.parts), iter(sources)
        while batch := list(islice(remaining, size)):
            with written_whole(self._sources_path(number)) as temporary, temporary.open("w", encoding="utf-8") as file:
                for source in batch:
                    noted = RecordedSource(
                        source.name, source.kind, source.split, source.bytes, source.place, source.reason
                    )
                    file.write(json.dumps(asdict(noted), ensure_ascii=False) + "\n")
            number += 1

    def results(self) -> dict[int, PartResult]:
        """What came of the finished parts, by number."""
        return {part: self._result(part) for part in self.parts if self.finished(part)}

    def finished(self, part: int) -> bool:
        """Whether all shards of a part are complete."""
        return self._result_path(part).exists()

    def finish(self, part: int, result: PartResult) -> None:
        """Note what came of a part, whose shards are all complete."""
        with written_whole(self._result_path(part)) as temporary:
            temporary.write_text(json.dumps(asdict(result), ensure_ascii=False), encoding="utf-8")

    @contextmanager
    def held(self, part: int) -> Iterator[Hold]:
        """Hold a part during the block, unless another process does."""
        path = self.folder / f"part-{part:05d}.lock"
        with ExitStack() as stack:
            try:
                certain = stack.enter_context(held_by_one_process(path))
            except BlockingIOError:
                yield Hold(free=False, certain=True)
                return
            yield Hold(True, certain)
            path.unlink(missing_ok=True)  # whoever opened it meanwhile finds the result first

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process plans or merges, and keep them from it during the block."""
        with ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(held_by_one_process(self.folder / "lock"))
                    break
                except BlockingIOError:
                    time.sleep(PAUSE)
            yield

    def _result(self, part: int) -> PartResult:
        content = _read(self._result_path(part))
        entries = (ShardEntry(**entry | {"shape": tuple(entry["shape"])}) for entry in content["shards"])
        lists = {name: tuple(content[name]) for name in ("labels", "skipped", "lost")}
        return PartResult(shards=tuple(entries), used=content["used"], **lists)

    @property
    def _options_path(self) -> Path:
        return self.folder / "options.json"

    def _sources_path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.sources.jsonl"

    def _result_path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.json"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no readable JSON ({error}): copy it again, or begin a new --out.") from None
