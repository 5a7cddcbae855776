"""Overview of prepared data, and its assessment of the latents."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.preparation.inspection import overview
from tests.preparation.inspection.prepared import SHARD, flip_bit, latent_offset, prepared


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Crops of two photographs, to which the codec's constants apply."""
    root = tmp_path_factory.mktemp("photographs")
    (root / "images").mkdir()
    for number, photograph in enumerate(load_sample_images().images):
        for i in range(12):
            top, left = i // 4 * 140, i % 4 * 160
            Image.fromarray(photograph[top : top + 140, left : left + 140]).save(root / "images" / f"{number}_{i}.png")
    return prepared(root, videos=(), images=[root / "images"], image_sizes=["64x64"])


def assessment(manifest: Manifest, **constants: Callable[[np.ndarray], np.ndarray]) -> str:
    """Return the last line of the overview, with changed constants of the codec."""
    changed = {name: tuple(change(np.array(getattr(manifest.codec, name)))) for name, change in constants.items()}
    return overview(replace(manifest, codec=replace(manifest.codec, **changed))).splitlines()[-1]


def test_wrong_codec_constants_give_a_warning(photographs: Manifest) -> None:
    assert assessment(photographs).endswith(": as expected")
    for change in (
        {"std": lambda std: std * 4},
        {"std": lambda std: std / 4},
        {"std": np.ones_like, "mean": np.zeros_like},
        {"mean": lambda mean: mean + 3},
    ):
        assert assessment(photographs, **change).startswith("WARNING: whitened: mean")


def test_a_few_unusual_channels_give_no_warning(photographs: Manifest) -> None:
    def change(std: np.ndarray) -> np.ndarray:
        return std * np.where(np.isin(np.arange(16), (3, 7)), 4, 1)

    assert re.search(r"^whitened: .*channels 3, 7 are outside the usual range", assessment(photographs, std=change))


def test_damaged_samples_are_listed_and_left_out(copy: Path) -> None:
    flip_bit(copy / f"{SHARD}.tar", latent_offset(copy, SHARD, 1))
    text = overview(Manifest.load(copy))
    assert f"sample 1 of {copy / SHARD}.tar is damaged" in text
    total = sum(entry.count for entry in Manifest.load(copy).of_split("train"))
    assert f"over {total - 1} of {total} samples" in text
