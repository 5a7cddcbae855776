"""Shards of labelled samples, for tests."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpdit_lightning.data.manifest import Manifest, Split
from gpdit_lightning.data.shard_writer import ShardSetWriter
from tests.conftest import TINY_CODEC

Samples = Iterable[tuple[str | None, np.ndarray]]


def write_labelled(directory: Path, labels: Sequence[str], train: Samples, validation: Samples = ()) -> Manifest:
    """Shards of 5, and the manifest that lists the labels.

    Args:
        directory: for all of it.
        labels: what the manifest lists.
        train, validation: label or None, and raw latents (F, C, h, w), of each sample; images where F is 1.
    """
    split: Split
    with ShardSetWriter(directory, shard_size=5) as writer:
        for split, samples in (("train", train), ("validation", validation)):
            for place, (label, latent) in enumerate(samples):
                metadata: dict[str, Any] = {"source": f"{split}-{place}"} | ({"label": label} if label else {})
                writer.write(split, "image" if len(latent) == 1 else "video", latent, metadata)
        shards = writer.close()
    manifest = Manifest(directory, TINY_CODEC, shards, validation={"held_out_by": "source"}, labels=tuple(labels))
    manifest.save()
    return manifest
