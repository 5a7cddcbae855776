"""Contact sheet of decoded samples."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpdit_lightning.codecs import Codec
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.shard_entry import Kind
from gpdit_lightning.data.shards import ShardReader
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import write_strip
from gpdit_lightning.preparation.inspection.sampling import balanced

ROW_HEIGHT = 128  # pixels
COLUMNS = 9
MAX_CAPTION_LENGTH = 60  # characters


def write_sheet(path: Path, manifest: Manifest, count: int, codec: Codec) -> list[str]:
    """Write a PNG with one row of frames per sample; the samples are chosen by :func:`balanced`.

    Args:
        path: path of the PNG.
        manifest: manifest of the folder.
        count: number of samples to show; each call shows the same ones.
        codec: codec that decodes the samples.

    Returns:
        A message for each damaged sample, which is not shown.

    Raises:
        InputError: all selected samples are damaged.
    """
    rows: dict[str, Tensor] = {}
    damaged: list[str] = []
    for entry, number in balanced(manifest.shards, count):
        try:
            latent, metadata = ShardReader(manifest.directory, entry).read(number)
        except InputError as error:
            damaged.append(str(error))
        else:
            rows[_title(metadata)] = _scale_to_row(_decode(codec, entry.kind, latent))
    if not rows:
        raise InputError(f"no sample of {manifest.directory} can be shown. The first reason: {damaged[0]}")
    max_width = max(frames.shape[3] for frames in rows.values())
    write_strip(path, {title: _pad(frames, max_width) for title, frames in rows.items()}, columns=COLUMNS)
    return damaged


def _decode(codec: Codec, kind: Kind, latent: np.ndarray) -> Tensor:
    """Decode latents (F, C, h, w) of one sample to pixels, uint8 (T, 3, H, W), on the CPU."""
    latents = torch.tensor(latent)
    if kind == "sequence":  # each frame was encoded alone
        return codec.decode(latents[:, None])[:, 0].cpu()
    return codec.decode(latents[None])[0].cpu()


def _scale_to_row(frames: Tensor) -> Tensor:
    height, width = frames.shape[2:]
    size = ROW_HEIGHT, max(1, round(width * ROW_HEIGHT / height))
    return F.interpolate(frames, size, mode="bicubic", antialias=True, align_corners=False)


def _pad(frames: Tensor, width: int) -> Tensor:
    """Add white margins, so that all cells of the sheet have the same width."""
    missing = width - frames.shape[3]
    return F.pad(frames, (missing // 2, missing - missing // 2), value=255)


def _title(metadata: dict[str, Any]) -> str:
    values = (metadata[name] for name in ("key", "source", "label", "caption") if metadata.get(name))
    title = "  ".join(" ".join(str(text).split()) for text in values)  # captions may have several lines
    max_length = len(metadata["key"]) + MAX_CAPTION_LENGTH
    return title if len(title) <= max_length else f"{title[:max_length]}..."
