"""The files that chunks of videos leave, one for each: what all scores are computed from."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write


def write_chunk(path: Path, names: Sequence[str], results: dict[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Write the results of :func:`evaluate_chunk` with the settings (JSON values) they depend on, atomically."""
    with atomic_write(path) as temporary:
        save_file(results, temporary, metadata={"names": json.dumps(list(names)), "made_by": json.dumps(settings)})


class ChunkFiles:
    """The results of all chunks, read one chunk at a time in their order.

    Args:
        paths: of the files.
        settings: that all of them must have been computed with.

    Attributes:
        names: of the videos that could be read.

    Raises:
        InputError: a file that cannot be read, or of other settings.
    """

    def __init__(self, paths: Sequence[Path], settings: Mapping[str, Any]) -> None:
        self.paths = paths
        self.names: list[str] = []
        self.keys: set[str] = set()
        expected = json.loads(json.dumps(settings))
        for path in paths:
            try:
                with safe_open(path, "pt") as file:
                    names, found = (json.loads(file.metadata()[key]) for key in ("names", "made_by"))
                    self.keys |= set(file.keys())
            except (SafetensorError, KeyError, TypeError) as error:
                raise InputError(f"{path} is damaged ({error}): delete it and run the same command again.") from None
            self.names += names
            for name, ours, theirs in differences(expected, found):
                raise InputError(
                    f"{path} belongs to an evaluation with another {name} ({theirs}, not {ours}): give another --out, "
                    "or remove that folder."
                )

    def values(
        self, variant: str, quantity: str, position: int | None = None, limit_to: str | None = None
    ) -> Iterator[Tensor]:
        """The results of one kind, chunk by chunk; chunks without such results are passed over.

        Args:
            variant: such as "truth".
            quantity: such as "video".
            position: of all generated frames only this one.
            limit_to: only the videos that this other variant has too.
        """
        key, other = f"{variant}/{quantity}", f"{limit_to or variant}/{quantity}"
        for path in self.paths:
            with safe_open(path, "pt") as file:
                if {key, other} <= set(file.keys()):
                    videos, values = file.get_slice(other).get_shape()[0], file.get_slice(key)
                    yield values[:videos] if position is None else values[:videos, position]

    def has(self, variant: str, quantity: str) -> bool:
        """Whether any chunk has such results."""
        return f"{variant}/{quantity}" in self.keys


def differences(ours: Any, theirs: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The entries in which two JSON values differ: the name of each, such as "guidance.context", and both values."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in {**ours, **theirs}:
            yield from differences(ours.get(key), theirs.get(key), f"{name}.{key}" if name else key)
    elif ours != theirs:
        yield name, ours, theirs
