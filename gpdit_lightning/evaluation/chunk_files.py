"""Files with the results of chunks of videos, one file per chunk. All scores are computed from these files."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.report import other_setting
from gpdit_lightning.files import atomic_write, write_once
from gpdit_lightning.hashes import content_identity
from gpdit_lightning.recalled_files import read_with_checksum, recalled, save_with_checksum
from gpdit_lightning.regular_files import read_bounded
from gpdit_lightning.schema import MAX_JSON_BYTES, TEXT, Constraint, check, differences, parse_json
from gpdit_lightning.tensor_files import safetensors_header

log = logging.getLogger(__name__)

CURE = "delete it and run the same command again"
SETTINGS = "settings.json"
KEYS = ("names", "sources", "made_by")  # of the metadata
TEXTS = Constraint("a list of texts", lambda value: isinstance(value, list) and all(map(TEXT.accepts, value)))


def write_chunk(
    path: Path,
    names: Sequence[str],
    results: dict[str, Tensor],
    settings: Mapping[str, Any],
    sources: Sequence[str] = (),
) -> None:
    """Write the results of a chunk to a file, atomically.

    Args:
        path: of the file.
        names: of the videos that could be read.
        results: from :func:`chunks.evaluate_chunk`.
        settings: JSON values that the results depend on.
        sources: from :func:`source_identities`, before the videos of the chunk were read; empty if it has none.
    """
    with atomic_write(path) as temporary:
        values = (list(names), list(sources), settings)
        metadata = {key: json.dumps(value) for key, value in zip(KEYS, values, strict=True)}
        save_with_checksum(temporary, results, metadata, place=path)


def claim_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Record the settings of the chunks of a folder, unless another process has recorded some, and compare them.

    Called before each chunk is written, so that a run which ends before its first one leaves no record. Of two
    evaluations with different settings that start at the same time, the second one is refused.

    Raises:
        InputError: the folder belongs to an evaluation with other settings, or its record is damaged.
    """
    path = folder / SETTINGS
    if not path.exists():
        write_once(path, json.dumps(settings))
    _check_settings(path, settings, parse_json(read_bounded(path, MAX_JSON_BYTES), str(path), CURE))


def source_identities(videos: Iterable[Path]) -> list[str]:
    """Return what a chunk records of each of its videos or images; errors as of :func:`hashes.content_identity`."""
    return [content_identity(video) for video in videos]


def complete_chunks(
    paths: Iterable[Path], settings: Mapping[str, Any], videos: Mapping[Path, Sequence[Path]]
) -> set[Path]:
    """Return the files that exist, and have the content that was written to them and the results of the same videos.

    Warnings name the others that exist.

    Args:
        paths: of the files.
        settings: JSON values that all files must have been computed with.
        videos: the videos or images of each file whose results depend on any.

    Raises:
        InputError: one was computed with other settings, or is not a regular file; or a video does not exist.
        TransientError: one could not be read for a reason other than its content.
    """
    complete = set[Path]()
    for path in paths:
        found = recalled(path, partial(_read, cure="it is computed again"))
        if found is not None:
            _check_settings(path, settings, found.settings)
            if path in videos and source_identities(videos[path]) != found.sources:
                log.warning("%s is of videos or images that have changed since: it is computed again", path)
            else:
                complete.add(path)
    return complete


class _Chunk(NamedTuple):
    """The keys of the results in a file, the names of its videos, the identities of its sources, and its settings."""

    keys: set[str]
    names: list[str]
    sources: list[str]
    settings: Any


def _read(path: Path, cure: str) -> _Chunk:
    """Return the content of a file without the results, after its checksum was compared."""
    tensors, metadata = read_with_checksum(path, KEYS, cure, has_place=True)
    names, sources, settings = (parse_json(metadata[key].encode(), str(path), cure) for key in KEYS)
    for key, value in (("names", names), ("sources", sources)):
        check(value, TEXTS, key, str(path), cure)
    return _Chunk(set(tensors), names, sources, settings)


def _check_settings(path: Path, settings: Mapping[str, Any], stored: Any) -> None:
    """Raise `InputError` unless the settings in a file are the given ones."""
    if isinstance(stored, dict):  # chunks of earlier versions have no architecture
        stored = {"architecture": settings.get("architecture")} | stored
    if different := list(differences(stored, json.loads(json.dumps(settings)))):
        raise InputError(
            f"{path} belongs to an evaluation with another {other_setting(different)}: give another --out, or remove "
            "that folder."
        )


class ChunkFiles:
    """Reader of the results of all chunks, one chunk at a time in their order.

    Args:
        paths: of the files.
        settings: JSON values that all files must have been computed with.

    Attributes:
        names: of the videos that could be read.

    Raises:
        InputError: a file cannot be read, or was computed with other settings.
    """

    def __init__(self, paths: Sequence[Path], settings: Mapping[str, Any]) -> None:
        self.paths = paths
        self.names: list[str] = []
        self.keys: set[str] = set()
        for path in paths:
            chunk = _read(path, CURE)
            self.keys |= chunk.keys
            self.names += chunk.names
            _check_settings(path, settings, chunk.settings)

    def values(
        self, variant: str, quantity: str, position: int | None = None, limit_to: str | None = None
    ) -> Iterator[Tensor]:
        """Yield one quantity of one variant, chunk by chunk; chunks without it are skipped.

        Args:
            variant: name of the videos' variant, such as "truth".
            quantity: a key of :func:`chunks.measure`, such as "video".
            position: index of the only generated frame to return; None returns all.
            limit_to: return only the videos that this other variant has too.

        Yields:
            (B, ...) for the B videos of a chunk.
        """
        key, other = f"{variant}/{quantity}", f"{limit_to or variant}/{quantity}"
        for path in self.paths:
            tensors, _ = safetensors_header(path, CURE)
            if {key, other} <= tensors.keys():
                values = tensors[key].read()[: tensors[other].shape[0]]
                yield values if position is None else values[:, position]

    def has_variant(self, variant: str) -> bool:
        """Whether any chunk contains this variant of its videos."""
        return any(key.startswith(f"{variant}/") for key in self.keys)

    def has(self, variant: str, quantity: str) -> bool:
        """Whether any chunk contains this quantity of this variant."""
        return f"{variant}/{quantity}" in self.keys
