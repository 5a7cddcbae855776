"""Summary of prepared data as a table."""

import json
from collections import defaultdict
from itertools import islice

from gpdit_lightning.data.manifest import SKIPPED_NAME, Manifest

SKIPPED_SHOWN = 10


def summary(manifest: Manifest) -> str:
    """Return a table by kind, latent shape and split, the number of input files per split, and the skipped inputs."""
    totals: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for shard in manifest.shards:
        row = totals[shard.kind, "x".join(map(str, shard.shape)), shard.split]
        for column, amount in enumerate((1, shard.count, shard.bytes)):
            row[column] += amount
    lines = [f"{'kind':<8} {'latents FxCxhxw':<16} {'split':<11} {'shards':>6} {'samples':>8} {'MB':>9}"]
    for (kind, shape, split), (shards, count, size) in sorted(totals.items()):
        lines.append(f"{kind:<8} {shape:<16} {split:<11} {shards:>6} {count:>8} {size / 1e6:>9.1f}")
    sources = "pairs" if any(shard.kind == "sequence" for shard in manifest.shards) else "input files"
    lines.append(
        f"{sources}: {manifest.validation['train_sources']} for training, "
        f"{manifest.validation['validation_sources']} held out for validation"
    )
    if manifest.skipped:
        report = manifest.directory / SKIPPED_NAME
        lines.append(f"skipped: {manifest.skipped} (full list: {report})")
        if report.exists():  # a copy of the shards may lack it
            with report.open(encoding="utf-8") as file:
                entries = map(json.loads, islice(file, SKIPPED_SHOWN))
                lines += [f"  {entry['source']}: {entry['reason']}" for entry in entries]
    return "\n".join(lines)
