"""Writes shards of labelled samples, for tests."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.shard_entry import Split
from gpdit_lightning.data.shard_writer import ShardSetWriter
from gpdit_lightning.specs import CodecSpec
from tests.conftest import TINY_CODEC

Samples = Iterable[tuple[str | None, np.ndarray]]


def write_labelled(
    directory: Path, labels: Sequence[str], train: Samples, validation: Samples = (), codec: CodecSpec = TINY_CODEC
) -> Manifest:
    """Write shards of 5 samples and the manifest.

    Args:
        directory: folder of the shards and the manifest.
        labels: labels of the manifest.
        train: label or None, and raw latents (F, C, h, w), of each sample; an image if F is 1.
        validation: the held-out samples, likewise.
        codec: the codec that the manifest records.
    """
    split: Split
    with ShardSetWriter(directory, shard_size=5) as writer:
        for split, samples in (("train", train), ("validation", validation)):
            for place, (label, latent) in enumerate(samples):
                metadata: dict[str, Any] = {"source": f"{split}-{place}"} | ({"label": label} if label else {})
                writer.write(split, "image" if len(latent) == 1 else "video", latent, metadata)
        shards = writer.close()
    manifest = Manifest(directory, codec, shards, validation={"held_out_by": "source"}, labels=tuple(labels))
    manifest.save()
    return manifest
