"""Summary of prepared data as a table."""

import io
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from gpdit_lightning.data.manifest import NOTES_NAME, SKIPPED_NAME, Manifest
from gpdit_lightning.media.finding import LeftOut
from gpdit_lightning.names import printable
from gpdit_lightning.preparation.record_formats import left_out
from gpdit_lightning.preparation.splits import MIN_HELD_OUT
from gpdit_lightning.regular_files import open_regular
from gpdit_lightning.schema import parse_json

FEW_HELD_OUT = " and not trained on (few for a validation loss: add files, or train on all by --validation_fraction 0)"
MAX_LINE_BYTES = 2**24
MAX_SHOWN = 10  # skipped inputs, and notes


def summary(manifest: Manifest) -> str:
    """Return a table by kind, latent shape and split, the input files per split, the skipped inputs and the notes."""
    totals: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for shard in manifest.shards:
        row = totals[shard.kind, "x".join(map(str, shard.shape)), shard.split]
        for column, amount in enumerate((1, shard.count, shard.bytes)):
            row[column] += amount
    lines = [f"{'kind':<8} {'latents FxCxhxw':<16} {'split':<11} {'shards':>6} {'samples':>8} {'MB':>9}"]
    for (kind, shape, split), (shards, count, size) in sorted(totals.items()):
        lines.append(f"{kind:<8} {shape:<16} {split:<11} {shards:>6} {count:>8} {size / 1e6:>9.1f}")
    of_pairs = any(shard.kind == "sequence" for shard in manifest.shards)
    training, held_out = (manifest.validation.get(f"{split}_sources", 0) for split in ("train", "validation"))
    few = FEW_HELD_OUT if not of_pairs and 0 < held_out < MIN_HELD_OUT else ""
    sources = "pairs" if of_pairs else "input files"
    lines.append(f"{sources}: {training} for training, {held_out} held out for validation{few}")
    assert isinstance(manifest.directory, Path)
    skipped, notes = (manifest.directory / name for name in (SKIPPED_NAME, NOTES_NAME))
    if manifest.skipped:
        lines += [f"skipped: {manifest.skipped} (full list: {skipped})", *_first_entries(skipped)]
    if number := _count_lines(notes):
        lines += [f"notes: {number} (full list: {notes})", *_first_entries(notes)]
    return "\n".join(map(printable, lines))


def read_left_out(path: Path) -> Iterator[LeftOut]:
    """Yield the entries of `skipped.jsonl` or `notes.jsonl`; none if the file does not exist, as in a partial copy.

    Raises:
        InputError: a line is no such entry.
    """
    if path.exists():
        with open_regular(path) as file:
            lines = io.BufferedReader(file)
            for number, line in enumerate(iter(partial(lines.readline, MAX_LINE_BYTES), b""), start=1):
                name = f"{path} line {number}"
                yield left_out(parse_json(line, name, "copy the file again"), name)


def _first_entries(path: Path) -> list[str]:
    return [f"  {entry.source}: {entry.reason}" for entry in islice(read_left_out(path), MAX_SHOWN)]


def _count_lines(path: Path) -> int:
    return sum(1 for _ in io.BufferedReader(open_regular(path))) if path.exists() else 0
