"""Samples decoded to one picture, to see what training sees."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpdit_lightning.codecs import Codec
from gpdit_lightning.data.manifest import Kind, Manifest, ShardEntry
from gpdit_lightning.data.shards import ShardReader
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import write_strip
from gpdit_lightning.preparation.inspection.samples import spread

ROW_HEIGHT = 128  # pixels
COLUMNS = 9
CAPTION_SHOWN = 60  # characters


def write_sheet(path: Path, manifest: Manifest, count: int, codec: Codec) -> list[str]:
    """Write a PNG with one row of frames for each of some samples, evenly spread over buckets and their shards.

    Args:
        path: the PNG.
        manifest: of the folder.
        count: samples to show; the same ones each time.
        codec: what decodes them.

    Returns:
        A sentence for each sample that could not be shown because it is damaged.

    Raises:
        InputError: `count` is below 1, or no sample could be shown.
    """
    if count < 1:
        raise InputError(f"--show is {count}: show at least 1 sample.")
    rows: dict[str, Tensor] = {}
    damaged: list[str] = []
    for entry, number in chosen(manifest.shards, count):
        try:
            latent, metadata = ShardReader(manifest.directory, entry).read(number)
        except InputError as error:
            damaged.append(str(error))
        else:
            rows[_title(metadata)] = _of_row_height(_decoded(codec, entry.kind, latent))
    if not rows:
        raise InputError(f"None of the samples of {manifest.directory} can be shown; the first: {damaged[0]}")
    widest = max(frames.shape[3] for frames in rows.values())
    write_strip(path, {title: _padded(frames, widest) for title, frames in rows.items()}, columns=COLUMNS)
    return damaged


def chosen(shards: Sequence[ShardEntry], count: int) -> list[tuple[ShardEntry, int]]:
    """As many samples of each bucket as of the others, as far as it has them: their shards and numbers."""
    buckets: dict[tuple[Any, ...], list[ShardEntry]] = defaultdict(list)
    for entry in shards:
        buckets[entry.kind, entry.shape, entry.split].append(entry)
    left = {bucket: sum(entry.count for entry in entries) for bucket, entries in sorted(buckets.items())}
    shares: Counter[tuple[Any, ...]] = Counter()
    while left and shares.total() < count:
        for bucket in list(left)[: count - shares.total()]:
            shares[bucket] += 1
            left[bucket] -= 1
            if not left[bucket]:
                del left[bucket]
    return [sample for bucket, share in shares.items() for sample in spread(buckets[bucket], share)]


def _decoded(codec: Codec, kind: Kind, latent: np.ndarray) -> Tensor:
    """A sample's latents (F, C, h, w) as pixels: uint8 (T, 3, H, W), on the CPU."""
    latents = torch.tensor(latent)
    if kind == "sequence":  # each frame was encoded alone
        return codec.decode(latents[:, None])[:, 0].cpu()
    return codec.decode(latents[None])[0].cpu()


def _of_row_height(frames: Tensor) -> Tensor:
    height, width = frames.shape[2:]
    size = ROW_HEIGHT, max(1, round(width * ROW_HEIGHT / height))
    return F.interpolate(frames, size, mode="bicubic", antialias=True, align_corners=False)


def _padded(frames: Tensor, width: int) -> Tensor:
    """Frames with white beside them: a sheet has cells of one size."""
    missing = width - frames.shape[3]
    return F.pad(frames, (missing // 2, missing - missing // 2), value=255)


def _title(metadata: dict[str, Any]) -> str:
    known = (metadata[name] for name in ("key", "source", "label", "caption") if metadata.get(name))
    title = "  ".join(" ".join(str(text).split()) for text in known)  # of one line: captions may have several
    room = len(metadata["key"]) + CAPTION_SHOWN
    return title if len(title) <= room else f"{title[:room]}..."
