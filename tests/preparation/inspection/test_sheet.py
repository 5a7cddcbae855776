"""Contact sheets of decoded samples."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpdit_lightning.codecs import load_codec
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.errors import InputError
from gpdit_lightning.preparation.inspection import write_sheet
from tests.preparation.inspection.prepared import SHARD, flip_bit, latent_offset


def test_a_sheet_keeps_aspect_ratios_and_is_deterministic(intact: Manifest, tmp_path: Path) -> None:
    codec, groups = load_codec("pca"), sorted({(entry.kind, entry.shape, entry.split) for entry in intact.shards})
    assert write_sheet(tmp_path / "sheet.png", intact, len(groups), codec) == []
    sheet = np.array(Image.open(tmp_path / "sheet.png")).astype(int)
    coloured = sheet.max(axis=2) - sheet.min(axis=2) > 20  # neither background nor text
    for row, (kind, (_, _, height, width), _) in enumerate(groups):
        if kind == "image":
            columns = np.flatnonzero(coloured[24 + row * 132 :][:128].any(axis=0))
            assert abs(columns[-1] - columns[0] + 1 - 128 * width / height) < 3
    write_sheet(tmp_path / "again.png", intact, len(groups), codec)
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "sheet.png").read_bytes()


def test_damaged_samples_are_skipped_on_a_sheet(copy: Path, tmp_path: Path) -> None:
    codec, total = load_codec("pca"), sum(entry.count for entry in Manifest.load(copy).shards)
    flip_bit(copy / f"{SHARD}.tar", latent_offset(copy, SHARD, 1))
    (damaged,) = write_sheet(tmp_path / "sheet.png", Manifest.load(copy), total, codec)
    assert f"sample 1 of {copy / SHARD}.tar" in damaged
    for tar in copy.glob("*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    with pytest.raises(InputError, match=r"no sample of .* can be shown\. The first reason: sample"):
        write_sheet(tmp_path / "sheet.png", Manifest.load(copy), total, codec)
