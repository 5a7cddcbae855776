"""Files with the results of chunks of videos, one file per chunk. All scores are computed from these files."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write
from gpdit_lightning.schema import TEXT, Constraint, check, parse_json
from gpdit_lightning.tensor_files import safetensors_header

CURE = "delete it and run the same command again"
NAMES = Constraint("a list of names", lambda value: isinstance(value, list) and all(map(TEXT.accepts, value)))


def write_chunk(path: Path, names: Sequence[str], results: dict[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Write the results of a chunk to a file, atomically.

    Args:
        path: of the file.
        names: of the videos that could be read.
        results: from :func:`chunks.evaluate_chunk`.
        settings: JSON values that the results depend on.
    """
    with atomic_write(path) as temporary:
        save_file(results, temporary, metadata={"names": json.dumps(list(names)), "made_by": json.dumps(settings)})


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
        expected = json.loads(json.dumps(settings))
        for path in paths:
            try:
                tensors, metadata = safetensors_header(path, CURE)
                names, stored = (parse_json(metadata[key].encode(), str(path), CURE) for key in ("names", "made_by"))
            except KeyError as error:
                raise InputError(f"{path} is damaged (it has no {error}): {CURE}.") from None
            self.keys |= tensors.keys()
            self.names += check(names, NAMES, "names", str(path), CURE)
            for name, wanted, found in differences(expected, stored):
                raise InputError(
                    f"{path} belongs to an evaluation with another {name} ({found}, not {wanted}): give another --out, "
                    "or remove that folder."
                )

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


def differences(first: Any, second: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the entries in which two JSON values differ: a dotted name such as "guidance.context", and both values."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in {**first, **second}:
            yield from differences(first.get(key), second.get(key), f"{name}.{key}" if name else key)
    elif first != second:
        yield name, first, second
