"""What the records of a preparation contain: the input files of a part, and the result of a part.

Records of earlier versions lack some of the fields; the readers fill them in.
"""

import builtins
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from gpdit_lightning.data.shard_entry import SHARD_NAME, Kind, ShardEntry, Split
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.finding import LeftOut
from gpdit_lightning.preparation.input_files import FileFormat, HashedValue, InputFile
from gpdit_lightning.schema import COUNT, LIST, TEXT, Constraint, check, one_of, parse_json, shown

COPY_AGAIN = "copy it again, or give another --out"

TEXTS = Constraint("a list of strings", lambda value: isinstance(value, list) and all(map(TEXT.accepts, value)))
SPLIT_OR_NULL = Constraint("train, validation or null", lambda value: value in ("train", "validation", None))
FLAG = Constraint("true or false", lambda value: isinstance(value, bool))
FILE_SCHEMA: dict[str, Any] = {
    **{"name": TEXT, "kind": one_of(*get_args(Kind)), "split": SPLIT_OR_NULL, "bytes": COUNT},
    **{"place": TEXT, "reason": TEXT},
}
OPTIONAL_FILE_SCHEMA: dict[str, Any] = {
    "hashed": one_of(*get_args(HashedValue)),
    "is_tar": FLAG,
    "annotation": TEXT,
}
LEFT_OUT_SCHEMA: dict[str, Any] = {"source": TEXT, "reason": TEXT}
RESULT_SCHEMA: dict[str, Any] = {
    **{"shards": LIST, "used": dict.fromkeys(get_args(Split), COUNT), "labels": TEXTS},
    **{"skipped": LIST, "lost": TEXTS},
}


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

    @classmethod
    def from_dict(cls, content: dict[str, Any], part: int, name: str) -> "PartResult":
        """Return the result that a record contains.

        Args:
            content: content of `part-*.json`.
            part: number of the part.
            name: that of the record in messages.

        Raises:
            InputError: the content is invalid, or the result of another part.
        """
        check(content, RESULT_SCHEMA, "", name, COPY_AGAIN)
        return cls(
            shards=shards_of_part(content, part, name),
            used=content["used"],
            labels=tuple(content["labels"]),
            skipped=tuple(left_out(entry, name) for entry in content["skipped"]),
            notes=tuple(
                left_out(entry, name) for entry in check(content.get("notes", []), LIST, "notes", name, COPY_AGAIN)
            ),
            without_samples=tuple(content["lost"]),
        )

    def to_dict(self, part: int) -> dict[str, Any]:
        """Return the content of `part-*.json` for this result of a part."""
        values = asdict(self)
        values |= {name: [entry.to_json() for entry in getattr(self, name)] for name in ("skipped", "notes")}
        values["shards"] = [shard.to_dict() for shard in self.shards]
        values["lost"] = values.pop("without_samples")
        return {"part": part} | values


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
    annotation: str | None = None
    """`InputFile.annotation_hash`. Tars and records of older versions lack it."""

    @property
    def format(self) -> FileFormat:
        """The format of the file."""
        return "tar" if self.is_tar else "video" if self.kind == "video" else "image"

    @classmethod
    def from_input_file(cls, file: InputFile) -> "RecordedFile":
        """Return the record of an input file."""
        return cls(
            name=file.name,
            kind=file.kind,
            split=file.split,
            bytes=file.bytes,
            path_hash=file.path_hash,
            reason=file.reason,
            hashed=file.hashed,
            is_tar=file.format == "tar",
            # The label of a held-out tar changes when a tar with its name is added for training.
            annotation=None if file.format == "tar" else file.annotation_hash,
        )

    @classmethod
    def from_json(cls, line: "builtins.bytes", name: str) -> "RecordedFile":
        """Parse a line of `part-*.sources.jsonl`; `name` is that of the line in messages."""
        values = check(parse_json(line, name, COPY_AGAIN), FILE_SCHEMA, "", name, COPY_AGAIN)
        optional = values.keys() - FILE_SCHEMA
        if unknown := min(optional - OPTIONAL_FILE_SCHEMA.keys(), default=None):
            raise InputError(f"{name} has the unknown field {shown(unknown)}, as of a later version: {COPY_AGAIN}.")
        check(values, {key: OPTIONAL_FILE_SCHEMA[key] for key in optional}, "", name, COPY_AGAIN)
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
        if self.annotation is None:
            del values["annotation"]
        return json.dumps(values, ensure_ascii=False)

    def input_file(self, current: InputFile | None) -> InputFile:
        """Return the file to encode, with the recorded split.

        Args:
            current: current input file of this name; if None, reading the returned file reports that it is missing.
        """
        if current is None:
            return InputFile(Path(self.name), self.name, self.format, self.split, self.bytes, hashed=self.hashed)
        return replace(current, split=self.split, reason=self.reason, hashed=self.hashed)


def shards_of_part(content: dict[str, Any], part: int, name: str) -> tuple[ShardEntry, ...]:
    """Return the shards that a record of a part lists; arguments and errors as of `PartResult.from_dict`."""
    check(content, {"shards": LIST}, "", name, COPY_AGAIN)
    if content.get("part", part) != part:
        raise InputError(f"{name} is the record of part {content['part']}: {COPY_AGAIN}.")
    shards = tuple(
        ShardEntry.from_dict(entry, f"shards[{number}]", name) for number, entry in enumerate(content["shards"])
    )
    for entry in shards:
        named = SHARD_NAME.fullmatch(entry.path.removesuffix(".tar"))
        if named is None or named["part"] != f"{part:05d}":
            raise InputError(f"{name} lists {entry.path}, which is not of part {part}: {COPY_AGAIN}.")
    if len({entry.path for entry in shards}) < len(shards):
        raise InputError(f"{name} lists a shard twice: {COPY_AGAIN}.")
    return shards


def left_out(content: Any, name: str) -> LeftOut:
    """Return the entry of a JSON object of `LeftOut.to_json`; raises InputError, with `name`, if it is invalid."""
    values = check(content, LEFT_OUT_SCHEMA, "", name, COPY_AGAIN)
    retry = check(values.get("retry", False), FLAG, "retry", name, COPY_AGAIN)
    return LeftOut(values["source"], values["reason"], retry)
