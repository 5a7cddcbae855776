"""The manifests of a run by source, and what the run takes from all of them: codec, classes, contents of shards."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.selection import load_manifest
from gpdit_lightning.data.source import KINDS, SourceConfig
from gpdit_lightning.errors import InputError
from gpdit_lightning.specs import CodecSpec

SourceManifests = Mapping[str, Sequence[Manifest]]


def load_manifests(configs: Mapping[str, SourceConfig]) -> dict[str, list[Manifest]]:
    """Load the manifests of each source; one that several sources name is read once, since its file may change.

    Raises:
        InputError: a manifest does not exist or cannot be used.
    """
    loaded = dict[str, Manifest]()
    for name, config in configs.items():
        for path in config.manifests:
            if path not in loaded:
                loaded[path] = load_manifest(path, f"data.{name}.manifests", configs)
    return {name: [loaded[path] for path in config.manifests] for name, config in configs.items()}


def all_manifests(manifests: SourceManifests) -> Iterator[Manifest]:
    """Return the manifests of all sources; one that several sources name appears for each of them."""
    return (manifest for of_source in manifests.values() for manifest in of_source)


def check_kinds(manifests: SourceManifests) -> None:
    """Raise `InputError` for a manifest that has samples, but none of the kind of its source."""
    for name, of_source in manifests.items():
        for manifest in of_source:
            kinds = {entry.kind for entry in manifest.shards}
            if kinds and KINDS[name] not in kinds:
                fitting = " or ".join(f"data.{source}" for source, kind in KINDS.items() if kind in kinds)
                raise InputError(
                    f"data.{name}.manifests names {manifest.path}, which has {' and '.join(sorted(kinds))} "
                    f"samples: give it to {fitting}."
                )


def common_codec(manifests: Iterable[Manifest]) -> CodecSpec:
    """Return the codec of all manifests.

    Raises:
        InputError: two of them have different codecs.
    """
    first, *others = manifests
    for other in others:
        first.codec.check_same(other.codec, str(first.path), str(other.path), "prepare both with the same codec")
    return first.codec


def class_names(manifests: SourceManifests) -> tuple[str, ...]:
    """Return the labels of all manifests, in their order, each once.

    Raises:
        InputError: there is none.
    """
    listed = list(all_manifests(manifests))
    classes = tuple(dict.fromkeys(name for manifest in listed for name in manifest.labels))
    if not classes:
        raise InputError(
            f"data.labels is true, but no manifest lists labels (such as {listed[0].path}): prepare the data "
            "with --labels or --annotations, or set data.labels to false."
        )
    return classes


def any_remote(manifests: SourceManifests) -> bool:
    """Return whether the shards of any manifest are on another machine."""
    return any(not isinstance(manifest.directory, Path) for manifest in all_manifests(manifests))


def any_has(option: Literal["posterior", "flips"], manifests: SourceManifests, required: bool) -> bool:
    """Return whether any training shard has the posterior, or the flipped clips.

    Args:
        option: name of the option.
        manifests: the manifests.
        required: whether the recipe requires it of all of them.

    Raises:
        InputError: it is required, and a training shard does not have it.
    """
    shards = [
        (manifest, entry)
        for name, of_source in manifests.items()
        for manifest in of_source
        for entry in manifest.of_split("train")
        if entry.kind == KINDS[name]
    ]
    for manifest, entry in shards if required else ():
        if not getattr(entry, f"has_{option}"):
            value, off = ("sample", "mean") if option == "posterior" else ("true", "false")
            raise InputError(
                f"data.{option} is {value}, but {manifest.directory / entry.path} was prepared without --{option}: "
                f"prepare the data again with it, or set data.{option} to {off}."
            )
    return any(getattr(entry, f"has_{option}") for _, entry in shards)
