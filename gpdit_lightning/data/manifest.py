"""The manifest: the description of a folder of latent shards, with one schema for writer and reader.

Every byte that is used follows from the manifest: it has a hash of its content, and the hash of the index of each
shard. The index has the checksum of each latent frame and of the metadata of each sample (see `data/shards.py`).
"""

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from upath import UPath

from gpdit_lightning.data.remote import FailedDownloadError, read_blocks
from gpdit_lightning.data.shard_entry import (
    NPY_HEADER_BYTES,
    PREPARE_AGAIN,
    TAR_BLOCK,
    ShardEntry,
    Split,
    check_no_unknown_fields,
)
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write
from gpdit_lightning.path_kinds import MANIFEST, reason_and_cure
from gpdit_lightning.regular_files import read_bounded
from gpdit_lightning.retries import retried, transient_error
from gpdit_lightning.schema import (
    CONTENT_HASH,
    COUNT,
    MAX_JSON_BYTES,
    OBJECT,
    POSITIVE_NUMBER,
    SHA256,
    SIZE,
    TEXT,
    Constraint,
    check,
    check_content_hash,
    content_hash,
    parse_json,
    shown,
)
from gpdit_lightning.specs import CodecSpec

FORMAT = "gpdit_lightning-shards-2"
FILE_NAME = MANIFEST
SKIPPED_NAME, NOTES_NAME = "skipped.jsonl", "notes.jsonl"

Folder = Path | UPath  # a local path, or any other that fsspec reads
LABELS = Constraint(
    "a list of different strings",
    lambda value: isinstance(value, list) and all(map(TEXT.accepts, value)) and len({*value}) == len(value),
)
SHARDS = Constraint("a list of at least one shard", lambda value: isinstance(value, list) and bool(value))

SCHEMA: dict[str, Any] = {
    "format": TEXT,
    "codec": OBJECT,
    "shards": SHARDS,
    "preparation": OBJECT,
    "validation": OBJECT,
    "labels": LABELS,
    "skipped": COUNT,
}
# Fields of `preparation` and `validation` that are used; prepare-pairs and older versions leave out some of them.
OPTIONAL_SCHEMAS: dict[str, dict[str, Constraint]] = {
    "preparation": {
        "stride": SIZE,
        "fps": Constraint("a positive number or null", lambda value: value is None or POSITIVE_NUMBER.accepts(value)),
    },
    "validation": {"train_sources": COUNT, "validation_sources": COUNT},
}


class MissingManifestError(InputError):
    """A folder of this machine has no manifest."""


@dataclass(frozen=True)
class Manifest:
    """The description of a folder of shards, saved as `manifest.json` inside it."""

    directory: Folder
    """The folder of the shards. It is not stored in the file: `load` sets it to the folder of the manifest."""
    codec: CodecSpec
    """The codec of the latents, with the constants that whiten them."""
    shards: tuple[ShardEntry, ...]
    preparation: dict[str, Any] = field(default_factory=dict)
    """The options of the preparation."""
    validation: dict[str, Any] = field(default_factory=dict)
    """How sources were held out (by source, never by clip), what of them was hashed, and how many each split has."""
    labels: tuple[str, ...] = ()
    """Names of the labels, which are the classes in this order; empty if no sample has a label. New labels follow those
    of an earlier preparation."""
    skipped: int = 0
    """Number of sources that could not be used, which `skipped.jsonl` lists. Those that were used in part, or under
    another name, are listed in `notes.jsonl` instead."""
    has_content_hash: bool = field(default=True, compare=False)
    """Whether the file has a hash of its content; those of earlier versions have none until they are saved again."""

    @property
    def path(self) -> Folder:
        """The path of the manifest itself."""
        return self.directory / FILE_NAME

    def of_split(self, split: Split) -> tuple[ShardEntry, ...]:
        """Return the shards of one split, in the order of the manifest."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def fingerprint(self) -> str:
        """Return a sha256 that depends on the latents and the codec, and on nothing else."""
        identity = [self.codec.fingerprint, *(shard.sha256 for shard in self.shards)]
        return hashlib.sha256("\n".join(identity).encode()).hexdigest()

    def content(self) -> dict[str, Any]:
        """Return the content of the file as JSON values, with its hash."""
        content = {"format": FORMAT} | {name: getattr(self, name) for name in SCHEMA if name != "format"}
        content["codec"] = self.codec.to_dict()
        content["shards"] = [shard.to_dict() for shard in self.shards]
        content[CONTENT_HASH] = content_hash(json.loads(json.dumps(content)))
        return content

    def save(self) -> None:
        """Write `manifest.json` atomically to `directory`.

        Raises:
            InputError: the content does not match the schema, so that `load` would reject the file; or the folder is
                not on this machine.
        """
        if not isinstance(self.path, Path):
            raise InputError(f"{self.path} is not on this machine: prepare in a local folder and copy it there.")
        text = json.dumps(self.content(), indent=2, ensure_ascii=False) + "\n"
        _parse(parse_json(text.encode(), str(self.path), PREPARE_AGAIN), self.path)
        with atomic_write(self.path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Folder, check_files: bool = True) -> "Manifest":
        """Read a manifest and check that every shard exists and has its full size.

        The folder may be at any address that fsspec reads, such as "s3://bucket/latents". Remote shards are checked
        when they are fetched, since their sizes may take one request per shard.

        Args:
            path: the folder, or a manifest in it.
            check_files: whether to check the shards of a local folder.

        Raises:
            InputError: the manifest is missing, unreachable or broken, has an unknown format, an invalid field or
                another content than its hash, or a shard is missing or has another size (truncated in a copy, or
                changed).
        """
        path = _manifest_path(path)
        content = _read(path)
        manifest = _parse(content, path)
        if isinstance(path, Path) and check_files:
            for shard in manifest.shards:
                manifest._check_files(shard, path.parent)
        _check_content(content, manifest, path)
        return manifest

    def _check_files(self, shard: ShardEntry, directory: Path) -> None:
        tar, index = directory / shard.path, directory / shard.index
        try:
            missing = next((file for file in (tar, index) if not file.is_file()), None)
            size = 0 if missing else tar.stat().st_size
        except OSError as error:
            raise InputError(
                f"{error.filename} cannot be read ({error.strerror}) though {self.path} lists it: check its folder."
            ) from None
        if missing:
            raise InputError(f"{missing} is missing though {self.path} lists it: copy it again or {PREPARE_AGAIN}.")
        if size != shard.bytes:
            raise InputError(
                f"{tar} has {size} bytes where {self.path} records {shard.bytes}, so it was truncated or changed: "
                f"copy it again or {PREPARE_AGAIN}."
            )


@retried
def _read(path: Folder) -> Any:
    """Read the JSON content of a manifest; errors as for `Manifest.load`."""
    if not isinstance(path, Path):
        content, cure = b"".join(read_blocks(str(path), MAX_JSON_BYTES)), f"check the address, or {PREPARE_AGAIN}"
        try:
            parsed = parse_json(content, str(path), cure)
            if isinstance(parsed, dict):
                check_content_hash(parsed, str(path), cure)
            return parsed
        except InputError as error:  # the reply may have been cut off, or be a page about a failure of the server
            raise FailedDownloadError(str(error)) from None
    try:
        return parse_json(read_bounded(path, MAX_JSON_BYTES), str(path), PREPARE_AGAIN)
    except (FileNotFoundError, NotADirectoryError):
        cure = "give a folder made by `python -m gpdit_lightning prepare`, or for sequences by `prepare-pairs`"
        given = path.parent if path.name == FILE_NAME else path
        raise MissingManifestError(f"there are no data at {given}, {reason_and_cure(given, 'data', cure)}.") from None
    except OSError as error:
        damaged = InputError(f"{path} cannot be read ({error.strerror}): {PREPARE_AGAIN}.")
        raise transient_error(error, path) or damaged from None


def _manifest_path(path: str | Folder) -> Folder:
    """Return the path of a manifest that is given as its folder or as the file."""
    try:
        if isinstance(path, str):
            path = UPath(path) if "://" in path else Path(path)
        return path if path.suffix == ".json" else path / FILE_NAME
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} is not an address of a folder ({error}): give one that fsspec supports.") from None


def _parse(content: Any, path: Folder) -> Manifest:
    """Parse and validate the JSON content of a manifest; an `InputError` names the first invalid field."""
    file_format = check(content, OBJECT, "", str(path), PREPARE_AGAIN).get("format")
    if file_format != FORMAT and isinstance(path, Path) and path.name != FILE_NAME:
        raise InputError(f"{path} is no manifest, {reason_and_cure(path, 'data', 'give a folder of `prepare`')}.")
    if file_format != FORMAT:
        raise InputError(f"{path} has format {shown(file_format)} and this version reads {FORMAT!r}: {PREPARE_AGAIN}.")
    check(content, SCHEMA, "", str(path), PREPARE_AGAIN)
    check_no_unknown_fields(content, SCHEMA | {CONTENT_HASH: SHA256}, "", path)
    for name, schema in OPTIONAL_SCHEMAS.items():
        check(
            content[name], {key: schema[key] for key in schema if key in content[name]}, name, str(path), PREPARE_AGAIN
        )
    codec = CodecSpec.from_dict(content["codec"], str(path), PREPARE_AGAIN)
    return Manifest(
        directory=path.parent,
        codec=codec,
        shards=tuple(_parse_shard(entry, number, codec, path) for number, entry in enumerate(content["shards"])),
        preparation=content["preparation"],
        validation=content["validation"],
        labels=tuple(content["labels"]),
        skipped=content["skipped"],
        has_content_hash=CONTENT_HASH in content,
    )


def _parse_shard(entry: Any, number: int, codec: CodecSpec, path: Folder) -> ShardEntry:
    name = f"shards[{number}]"
    parsed = ShardEntry.from_dict(entry, name, str(path))
    if parsed.shape[1] != codec.latent_channels:
        raise InputError(
            f"{path} has {name}.shape = {list(parsed.shape)} with {parsed.shape[1]} channels where its codec has "
            f"{codec.latent_channels}: {PREPARE_AGAIN}."
        )
    return parsed


def _check_content(content: dict[str, Any], manifest: Manifest, path: Folder) -> None:
    """Check that the entries of a manifest agree with each other, and its content with its hash."""
    names = Counter(PurePosixPath(name) for shard in manifest.shards for name in (shard.path, shard.index))
    if twice := next((name for name, times in names.items() if times > 1), None):
        raise InputError(f"{path} lists {twice} twice, so its samples would be used twice: {PREPARE_AGAIN}.")
    for shard in manifest.shards:
        least = shard.count * (3 * TAR_BLOCK + NPY_HEADER_BYTES + 2 * math.prod(shard.stored_shape))
        if shard.bytes < least:
            raise InputError(
                f"{path} states {shard.bytes} bytes for {shard.path}, but {shard.count} samples of shape "
                f"{list(shard.stored_shape)} take at least {least}: copy the manifest again or {PREPARE_AGAIN}."
            )
    cure = "copy it again, or delete it and run the same preparation again; `prepare` encodes nothing twice"
    check_content_hash(content, str(path), cure)
