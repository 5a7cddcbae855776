"""The manifest: what a folder of latent shards holds, in one schema for writer and reader."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from upath import UPath

from gpdit_lightning.data.remote import remote_blocks
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write
from gpdit_lightning.schema import COUNT, LIST, OBJECT, SHA256, SIZE, TEXT, Constraint, check, one_of
from gpdit_lightning.specs import CodecSpec

FORMAT = "gpdit_lightning-shards-2"
FILE_NAME = "manifest.json"
SKIPPED_NAME = "skipped.jsonl"

Folder = Path | UPath  # on this machine, or anywhere else that fsspec reads
Split = Literal["train", "validation"]
Kind = Literal["image", "video", "sequence"]  # a sequence: images, each encoded alone, stacked as frames

PREPARE_AGAIN = "prepare the data again with `python -m gpdit_lightning prepare`"
FOUR_SIZES = Constraint(
    "a list of four positive integers",
    lambda value: isinstance(value, list) and [*map(SIZE.accepts, value)] == [True] * 4,
)
SHARD_SCHEMA: dict[str, Any] = {
    "path": TEXT,
    "index": TEXT,
    "split": one_of(*get_args(Split)),
    "kind": one_of(*get_args(Kind)),
    "shape": FOUR_SIZES,
    "count": SIZE,
    "bytes": SIZE,
    "sha256": SHA256,
    "index_sha256": SHA256,
}
SCHEMA: dict[str, Any] = {
    "format": TEXT,
    "codec": OBJECT,
    "shards": LIST,
    "preparation": OBJECT,
    "validation": OBJECT,
    "labels": LIST,
    "skipped": COUNT,
}


@dataclass(frozen=True)
class ShardEntry:
    """One shard: a tar of samples that all have one latent shape."""

    path: str
    """The tar, relative to the manifest's folder."""
    index: str
    """Its byte index, relative to the manifest's folder (see `data/shards.py`)."""
    split: Split
    kind: Kind
    shape: tuple[int, int, int, int]
    """Latent frames, channels, height, width of every sample."""
    count: int
    """Samples in the shard."""
    bytes: int
    """Size of the tar."""
    sha256: str
    """Of the tar, in hexadecimal digits."""
    index_sha256: str
    """Of the index."""


@dataclass(frozen=True)
class Manifest:
    """The description of a folder of shards, saved as `manifest.json` inside it."""

    directory: Folder
    """The folder that holds the shards; known from where the manifest lies, never written into it."""
    codec: CodecSpec
    """The codec that made the latents, with the constants that whiten them."""
    shards: tuple[ShardEntry, ...]
    preparation: dict[str, Any] = field(default_factory=dict)
    """The options the shards were made with, for people and for reuse."""
    validation: dict[str, Any] = field(default_factory=dict)
    """How sources were held out (by source, never by clip) and how many sources each split has."""
    labels: tuple[str, ...] = ()
    """The label names, sorted; a sample's label is its place in this list. Empty where samples have none."""
    skipped: int = 0
    """Sources, or parts of one, that could not be used; `skipped.jsonl` beside the manifest names each."""

    @property
    def path(self) -> Folder:
        """The manifest's own file."""
        return self.directory / FILE_NAME

    def of_split(self, split: Split) -> tuple[ShardEntry, ...]:
        """The shards of one split, in the manifest's order."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def fingerprint(self) -> str:
        """A sha256 that changes when any latent or the codec changes, and with nothing else."""
        identity = [self.codec.fingerprint, *(shard.sha256 for shard in self.shards)]
        return hashlib.sha256("\n".join(identity).encode()).hexdigest()

    def save(self) -> None:
        """Write `manifest.json` in `directory`, whole or not at all.

        Raises:
            InputError: when the content breaks the schema, so that nothing is written that `load` would refuse; or
                when the folder is not on this machine.
        """
        if not isinstance(self.path, Path):
            raise InputError(f"{self.path} is not on this machine: prepare in a local folder and copy it there.")
        content = {"format": FORMAT} | {entry.name: getattr(self, entry.name) for entry in fields(self)[1:]}
        content["codec"] = self.codec.to_dict()
        content["shards"] = [asdict(shard) for shard in self.shards]
        text = json.dumps(content, indent=2, ensure_ascii=False)
        _parse(json.loads(text), self.path)
        with atomic_write(self.path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Folder, check_files: bool = True) -> "Manifest":
        """Read a manifest and check that every shard is there at its full size.

        A folder may lie anywhere that fsspec reads, as in "s3://bucket/latents". Its shards are checked when they are
        fetched, since asking for the size of each may take a request for each.

        Args:
            path: the folder, or a manifest in it.
            check_files: look at the shards' files.

        Raises:
            InputError: for a missing or broken manifest, an unknown format, a missing field, a missing shard, or a
                shard whose size is not the one that was written (cut off in a copy, or changed); for a folder
                elsewhere also when it cannot be reached.
        """
        path = _located(path)
        try:
            text = path.read_bytes() if isinstance(path, Path) else b"".join(remote_blocks(str(path)))
            content = json.loads(text)
        except InputError:
            raise
        except FileNotFoundError:
            raise InputError(
                f"{path} does not exist: give a folder made by `python -m gpdit_lightning prepare`, or for "
                "sequences by `prepare-pairs`."
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is no readable JSON ({error}): {PREPARE_AGAIN}.") from None
        manifest = _parse(content, path)
        if isinstance(path, Path) and check_files:
            for shard in manifest.shards:
                manifest._check_file(shard, path.parent)
        return manifest

    def _check_file(self, shard: ShardEntry, directory: Path) -> None:
        path = directory / shard.path
        for needed in (path, directory / shard.index):
            if not needed.is_file():
                raise InputError(f"{needed} is missing though {self.path} lists it: copy it again or {PREPARE_AGAIN}.")
        if (size := path.stat().st_size) != shard.bytes:
            raise InputError(
                f"{path} has {size} bytes where {self.path} says {shard.bytes}, so it was cut off or changed: "
                f"copy it again or {PREPARE_AGAIN}."
            )


def _located(path: str | Folder) -> Folder:
    """The manifest's file, of a manifest given as its folder or as the file."""
    try:
        if isinstance(path, str):
            path = UPath(path) if "://" in path else Path(path)
        return path if path.suffix == ".json" else path / FILE_NAME
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} is no address of a folder ({error}): give one that fsspec knows.") from None


def _parse(content: Any, path: Folder) -> Manifest:
    """JSON content as a `Manifest`; every departure from the schema is an `InputError` that names the field."""
    found = check(content, OBJECT, "", str(path), PREPARE_AGAIN).get("format")
    if found != FORMAT:
        raise InputError(f"{path} has format {found!r} and this version reads {FORMAT!r}: {PREPARE_AGAIN}.")
    check(content, SCHEMA, "", str(path), PREPARE_AGAIN)
    _refuse_unknown(content, SCHEMA, "", path)
    codec = CodecSpec.from_dict(content["codec"], str(path), PREPARE_AGAIN)
    return Manifest(
        directory=path.parent,
        codec=codec,
        shards=tuple(_parse_shard(entry, place, codec, path) for place, entry in enumerate(content["shards"])),
        preparation=content["preparation"],
        validation=content["validation"],
        labels=tuple(content["labels"]),
        skipped=content["skipped"],
    )


def _parse_shard(entry: Any, place: int, codec: CodecSpec, path: Folder) -> ShardEntry:
    name = f"shards[{place}]"
    check(entry, SHARD_SCHEMA, name, str(path), PREPARE_AGAIN)
    _refuse_unknown(entry, SHARD_SCHEMA, f"{name}.", path)
    for field_name in ("path", "index"):
        relative = PurePosixPath(entry[field_name])
        if relative.is_absolute() or ".." in relative.parts or not relative.name:
            raise InputError(
                f"{path} has {name}.{field_name} = {entry[field_name]!r}, which is outside the manifest's folder: "
                f"{PREPARE_AGAIN}."
            )
    shape = tuple(entry["shape"])
    if shape[1] != codec.latent_channels:
        raise InputError(
            f"{path} has {name}.shape = {list(shape)} with {shape[1]} channels where its codec has "
            f"{codec.latent_channels}: {PREPARE_AGAIN}."
        )
    return ShardEntry(**entry | {"shape": shape})


def _refuse_unknown(content: dict[str, Any], schema: dict[str, Any], prefix: str, path: Folder) -> None:
    for name in content:
        if name not in schema:
            raise InputError(f"{path} has the unknown field {prefix}{name}: remove it or {PREPARE_AGAIN}.")
