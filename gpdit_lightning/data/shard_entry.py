"""One shard in the manifest: its entry, and what an entry may state."""

import re
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, get_args

from gpdit_lightning.errors import InputError
from gpdit_lightning.schema import LIST, SHA256, SIZE, Constraint, check, one_of, shown, size_up_to

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
# Limits on what a manifest may state, far above any shard, since memory is taken by these numbers.
MAX_SAMPLES = 2**24
MAX_SIDE = 2**16
MAX_SHARD_BYTES = 2**50
TAR_BLOCK = 512  # bytes: of a header of a member, and the unit of its content
NPY_HEADER_BYTES = 128

FOUR_SIZES = Constraint(
    f"a list of four positive integers of at most {MAX_SIDE}",
    lambda value: isinstance(value, list) and [*map(size_up_to(MAX_SIDE).accepts, value)] == [True] * 4,
)
PRINTABLE = Constraint(
    "a path of printable characters",
    lambda value: isinstance(value, str) and value.isprintable() and "://" not in value and "::" not in value,
)
SHARD_SCHEMA: dict[str, Any] = {
    "path": PRINTABLE,
    "index": PRINTABLE,
    "split": one_of(*get_args(Split)),
    "kind": one_of(*get_args(Kind)),
    "shape": FOUR_SIZES,
    "count": Constraint(
        f"an integer from 1 to {MAX_SAMPLES}", lambda value: SIZE.accepts(value) and value <= MAX_SAMPLES
    ),
    "bytes": Constraint("a size of a file", lambda value: SIZE.accepts(value) and value <= MAX_SHARD_BYTES),
    "sha256": SHA256,
    "index_sha256": SHA256,
}
# The name of a shard, without an ending, as the preparation verbs write it.
SHARD_NAME = re.compile(
    rf"(?P<split>{'|'.join(get_args(Split))})-(?P<kind>{'|'.join(get_args(Kind))})-"
    r"(?P<frames>\d+)x(?P<height>\d+)x(?P<width>\d+)(-(?P<part>\d{5}))?-\d{5}"
)


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
    def from_dict(cls, content: Any, name: str, file: str) -> "ShardEntry":
        """Return the entry of the JSON object that `to_dict` returned.

        Args:
            content: the object, of any type.
            name: its path in the file, for messages.
            file: the file's path, for messages.

        Raises:
            InputError: a field is missing, unknown or invalid.
        """
        check(content, SHARD_SCHEMA, name, file, PREPARE_AGAIN)
        check_no_unknown_fields(content, SHARD_SCHEMA | {"arrays": LIST}, f"{name}.", file)
        if "arrays" in content and content["arrays"] not in map(list, ARRAYS):
            raise InputError(
                f"{file} has {name}.arrays = {shown(content['arrays'])}, which are unknown: {PREPARE_AGAIN}."
            )
        _check_paths(content, name, file)
        lists: dict[str, Any] = {name: tuple(content[name]) for name in ("shape", "arrays") if name in content}
        return cls(**content | lists)

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as JSON values."""
        content = asdict(self) | {"shape": list(self.shape), "arrays": list(self.arrays)}
        if self.arrays == LATENT_ONLY:  # as in manifests of earlier versions
            del content["arrays"]
        return content


def _check_paths(entry: dict[str, Any], name: str, file: str) -> None:
    """Check that an entry names files in the manifest's folder, and agrees with the name of the shard.

    Args:
        entry: the entry, of valid types.
        name: its path in the file, for messages.
        file: the file's path, for messages.
    """
    for field_name in ("path", "index"):
        relative = PurePosixPath(entry[field_name])
        if relative.is_absolute() or ".." in relative.parts or not relative.name:
            raise InputError(
                f"{file} has {name}.{field_name} = {shown(entry[field_name])}, which is outside the manifest's folder: "
                f"{PREPARE_AGAIN}."
            )
    if named := SHARD_NAME.fullmatch(PurePosixPath(entry["path"]).name.removesuffix(".tar")):
        frames, _, height, width = map(str, entry["shape"])
        stated = {"split": entry["split"], "kind": entry["kind"], "frames": frames, "height": height, "width": width}
        for field_name, value in stated.items():
            if named[field_name] != value:
                raise InputError(
                    f"{file} has {name}.path = {shown(entry['path'])} with the {field_name} {value}, which is not that "
                    f"of its name: copy the file again or {PREPARE_AGAIN}."
                )


def check_no_unknown_fields(content: dict[str, Any], schema: dict[str, Any], prefix: str, path: object) -> None:
    """Raise `InputError` for a field of an object of the file `path` that its schema does not have."""
    for name in content:
        if name not in schema:
            raise InputError(f"{path} has the unknown field {prefix}{shown(name)[1:-1]}: remove it or {PREPARE_AGAIN}.")
