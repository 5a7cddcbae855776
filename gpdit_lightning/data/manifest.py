"""The manifest: the description of a folder of latent shards, with one schema for writer and reader."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from upath import UPath

from gpdit_lightning.data.remote import read_blocks
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write
from gpdit_lightning.retries import transient_error
from gpdit_lightning.schema import COUNT, LIST, OBJECT, SHA256, SIZE, TEXT, Constraint, check, one_of
from gpdit_lightning.specs import CodecSpec

FORMAT = "gpdit_lightning-shards-2"
FILE_NAME = "manifest.json"
SKIPPED_NAME, NOTES_NAME = "skipped.jsonl", "notes.jsonl"

Folder = Path | UPath  # a local path, or any other that fsspec reads
Split = Literal["train", "validation"]
Kind = Literal["image", "video", "sequence"]  # a sequence is images, each encoded alone, stacked as frames
ArrayName = Literal["mean", "std", "flipped_mean", "flipped_std"]

# What a shard may hold of each latent, in this order along the channels: the latent, which is the mean of the codec's
# posterior; the posterior's standard deviation; and both of the clip that was flipped left to right before encoding.
LATENT_ONLY: tuple[ArrayName, ...] = ("mean",)
ARRAYS: tuple[tuple[ArrayName, ...], ...] = (
    LATENT_ONLY,
    ("mean", "std"),
    ("mean", "flipped_mean"),
    ("mean", "std", "flipped_mean", "flipped_std"),
)

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


class MissingManifestError(InputError):
    """A folder of this machine has no manifest."""


@dataclass(frozen=True)
class ShardEntry:
    """One shard: a tar of samples with one latent shape."""

    path: str
    """The tar, relative to the manifest's folder."""
    index: str
    """The byte index of the tar, relative to the manifest's folder (see `data/shards.py`)."""
    split: Split
    kind: Kind
    shape: tuple[int, int, int, int]
    """(F, C, h, w) of every sample."""
    count: int
    """Number of samples."""
    bytes: int
    """Size of the tar."""
    sha256: str
    """Hash of the tar, in hexadecimal digits."""
    index_sha256: str
    """Hash of the index."""
    arrays: tuple[ArrayName, ...] = LATENT_ONLY
    """What is stored of each latent; one of `ARRAYS`. The file has it only if that is more than the latent."""

    @property
    def stored_shape(self) -> tuple[int, int, int, int]:
        """The shape (F, A C, h, w) of the stored array of a sample, with its A arrays along the channels."""
        frames, channels, height, width = self.shape
        return frames, len(self.arrays) * channels, height, width

    @property
    def has_posterior(self) -> bool:
        """Whether the standard deviations of the codec's posterior are stored."""
        return "std" in self.arrays

    @property
    def has_flips(self) -> bool:
        """Whether every sample is stored as it is and flipped left to right."""
        return "flipped_mean" in self.arrays

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "ShardEntry":
        """Return the entry of the JSON object that `to_dict` returned."""
        lists: dict[str, Any] = {name: tuple(content[name]) for name in ("shape", "arrays") if name in content}
        return cls(**content | lists)

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as JSON values."""
        content = asdict(self) | {"shape": list(self.shape), "arrays": list(self.arrays)}
        if self.arrays == LATENT_ONLY:  # as in manifests of earlier versions
            del content["arrays"]
        return content


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

    def save(self) -> None:
        """Write `manifest.json` atomically to `directory`.

        Raises:
            InputError: the content does not match the schema, so that `load` would reject the file; or the folder is
                not on this machine.
        """
        if not isinstance(self.path, Path):
            raise InputError(f"{self.path} is not on this machine: prepare in a local folder and copy it there.")
        content = {"format": FORMAT} | {entry.name: getattr(self, entry.name) for entry in fields(self)[1:]}
        content["codec"] = self.codec.to_dict()
        content["shards"] = [shard.to_dict() for shard in self.shards]
        text = json.dumps(content, indent=2, ensure_ascii=False)
        _parse(json.loads(text), self.path)
        with atomic_write(self.path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Folder, check_files: bool = True) -> "Manifest":
        """Read a manifest and check that every shard exists and has its full size.

        The folder may be at any address that fsspec reads, such as "s3://bucket/latents". Remote shards are checked
        when they are fetched, since their sizes may take one request per shard.

        Args:
            path: the folder, or a manifest in it.
            check_files: whether to check the shards of a local folder.

        Raises:
            InputError: the manifest is missing, unreachable or broken, has an unknown format or an invalid field, or a
                shard is missing or has another size (truncated in a copy, or changed).
        """
        path = _manifest_path(path)
        try:
            text = path.read_bytes() if isinstance(path, Path) else b"".join(read_blocks(str(path)))
            content = json.loads(text)
        except InputError:
            raise
        except FileNotFoundError:
            raise MissingManifestError(
                f"{path} does not exist: give a folder made by `python -m gpdit_lightning prepare`, or for "
                "sequences by `prepare-pairs`."
            ) from None
        except (OSError, ValueError) as error:
            damaged = InputError(f"{path} is not readable JSON ({error}): {PREPARE_AGAIN}.")
            raise transient_error(error, path) or damaged from None
        manifest = _parse(content, path)
        if isinstance(path, Path) and check_files:
            for shard in manifest.shards:
                manifest._check_files(shard, path.parent)
        return manifest

    def _check_files(self, shard: ShardEntry, directory: Path) -> None:
        tar, index = directory / shard.path, directory / shard.index
        for file in (tar, index):
            if not file.is_file():
                raise InputError(f"{file} is missing though {self.path} lists it: copy it again or {PREPARE_AGAIN}.")
        if (size := tar.stat().st_size) != shard.bytes:
            raise InputError(
                f"{tar} has {size} bytes where {self.path} records {shard.bytes}, so it was truncated or changed: "
                f"copy it again or {PREPARE_AGAIN}."
            )


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
    if file_format != FORMAT:
        raise InputError(f"{path} has format {file_format!r} and this version reads {FORMAT!r}: {PREPARE_AGAIN}.")
    check(content, SCHEMA, "", str(path), PREPARE_AGAIN)
    _check_no_unknown_fields(content, SCHEMA, "", path)
    codec = CodecSpec.from_dict(content["codec"], str(path), PREPARE_AGAIN)
    return Manifest(
        directory=path.parent,
        codec=codec,
        shards=tuple(_parse_shard(entry, number, codec, path) for number, entry in enumerate(content["shards"])),
        preparation=content["preparation"],
        validation=content["validation"],
        labels=tuple(content["labels"]),
        skipped=content["skipped"],
    )


def _parse_shard(entry: Any, number: int, codec: CodecSpec, path: Folder) -> ShardEntry:
    name = f"shards[{number}]"
    check(entry, SHARD_SCHEMA, name, str(path), PREPARE_AGAIN)
    _check_no_unknown_fields(entry, SHARD_SCHEMA | {"arrays": LIST}, f"{name}.", path)
    if "arrays" in entry and entry["arrays"] not in map(list, ARRAYS):
        raise InputError(f"{path} has {name}.arrays = {entry['arrays']!r}, which are unknown: {PREPARE_AGAIN}.")
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
    return ShardEntry.from_dict(entry)


def _check_no_unknown_fields(content: dict[str, Any], schema: dict[str, Any], prefix: str, path: Folder) -> None:
    for name in content:
        if name not in schema:
            raise InputError(f"{path} has the unknown field {prefix}{name}: remove it or {PREPARE_AGAIN}.")
