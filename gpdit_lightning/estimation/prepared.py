"""Prepared samples, by latent shape, as sources of an estimate."""

from collections import Counter
from collections.abc import Mapping, Sequence

from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.plan import PlannedBucket, PlannedSource
from gpdit_lightning.data.shard_entry import Split
from gpdit_lightning.data.source import KINDS, SourceConfig
from gpdit_lightning.errors import InputError
from gpdit_lightning.model.config import GPDiTConfig

LatentShape = tuple[int, int, int]
"""F, h, w."""


def prepared_samples(name: str, manifests: Sequence[Manifest]) -> Counter[LatentShape]:
    """Return the number of training samples of each latent shape.

    Args:
        name: of the source.
        manifests: its prepared data.

    Raises:
        InputError: there are no training samples.
    """
    samples = count_samples(name, manifests, "train")
    if not samples:
        raise InputError(f"{manifests[0].path} contains no {name} for training: prepare some.")
    return samples


def count_samples(name: str, manifests: Sequence[Manifest], split: Split) -> Counter[LatentShape]:
    """Return the number of samples of each latent shape in a split of a source, which may be empty."""
    samples: Counter[LatentShape] = Counter()
    for manifest in manifests:
        for shard in manifest.of_split(split):
            if shard.kind == KINDS[name]:
                samples[shard.shape[0], shard.shape[2], shard.shape[3]] += shard.count
    return samples


def planned_source(
    name: str, samples: Mapping[LatentShape, int], config: SourceConfig, backbone: GPDiTConfig
) -> PlannedSource:
    """Return a source with a bucket for each latent shape.

    Args:
        name: of the source.
        samples: number of samples of each shape.
        config: options of the source.
        backbone: its patches are the tokens, and clips are cut to its blocks.

    Raises:
        InputError: the samples are too short for the options.
    """
    buckets = [
        PlannedBucket((count,), config.clip_lengths(name, frames, backbone.block_frames), height, width)
        for (frames, height, width), count in samples.items()
    ]
    return PlannedSource(name, tuple(buckets), config, backbone.patch_size)
