"""Decoded samples on one contact sheet."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpdit_lightning.codecs import Codec
from gpdit_lightning.data.manifest import Kind, Manifest
from gpdit_lightning.data.shards import ShardReader
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import write_strip
from gpdit_lightning.preparation.inspection.sampling import balanced

ROW_HEIGHT = 128  # pixels
COLUMNS = 9
CAPTION_SHOWN = 60  # characters


def write_sheet(path: Path, manifest: Manifest, count: int, codec: Codec) -> list[str]:
    """Write a PNG with one row of frames per sample; the samples are evenly spaced over buckets and their shards.

    Args:
        path: the PNG.
        manifest: of the folder.
        count: samples to show; each call shows the same ones.
        codec: decodes them.

    Returns:
        A message for each sample that could not be shown because it is damaged.

    Raises:
        InputError: no sample could be shown.
    """
    rows: dict[str, Tensor] = {}
    damaged: list[str] = []
    for entry, number in balanced(manifest.shards, count):
        try:
            latent, metadata = ShardReader(manifest.directory, entry).read(number)
        except InputError as error:
            damaged.append(str(error))
        else:
            rows[_title(metadata)] = _scaled_to_row(_decode(codec, entry.kind, latent))
    if not rows:
        raise InputError(f"No sample of {manifest.directory} can be shown; the first: {damaged[0]}")
    widest = max(frames.shape[3] for frames in rows.values())
    write_strip(path, {title: _padded(frames, widest) for title, frames in rows.items()}, columns=COLUMNS)
    return damaged


def _decode(codec: Codec, kind: Kind, latent: np.ndarray) -> Tensor:
    """The pixels of a sample with latents (F, C, h, w): uint8 (T, 3, H, W), on the CPU."""
    latents = torch.tensor(latent)
    if kind == "sequence":  # each frame was encoded alone
        return codec.decode(latents[:, None])[:, 0].cpu()
    return codec.decode(latents[None])[0].cpu()


def _scaled_to_row(frames: Tensor) -> Tensor:
    height, width = frames.shape[2:]
    size = ROW_HEIGHT, max(1, round(width * ROW_HEIGHT / height))
    return F.interpolate(frames, size, mode="bicubic", antialias=True, align_corners=False)


def _padded(frames: Tensor, width: int) -> Tensor:
    """Frames with white margins, so that all cells of the sheet have one width."""
    missing = width - frames.shape[3]
    return F.pad(frames, (missing // 2, missing - missing // 2), value=255)


def _title(metadata: dict[str, Any]) -> str:
    values = (metadata[name] for name in ("key", "source", "label", "caption") if metadata.get(name))
    title = "  ".join(" ".join(str(text).split()) for text in values)  # captions may have several lines
    most = len(metadata["key"]) + CAPTION_SHOWN
    return title if len(title) <= most else f"{title[:most]}..."
