"""The overview of prepared data and the statistics of their latents."""

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
from gpdit_lightning.preparation.inspection.statistics import LatentStatistics
from tests.preparation.inspection.prepared import BUCKET, flip, latent_of, prepared


def test_statistics_are_those_of_all_values_together() -> None:
    numbers = np.random.default_rng(0)
    latents = [numbers.normal(1000, 0.1, (frames, 3, 2, width)) for frames, width in ((1, 1), (4, 7), (2, 3))]
    statistics = LatentStatistics(3)
    assert np.isnan(statistics.std).all()
    for latent in latents:
        statistics.add(latent)
    together = np.concatenate([latent.swapaxes(0, 1).reshape(3, -1) for latent in latents], axis=1)
    np.testing.assert_allclose(statistics.mean, together.mean(axis=1), rtol=1e-14)
    np.testing.assert_allclose(statistics.std, together.std(axis=1), rtol=1e-9)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Crops of two photographs, for which the codec's constants are right."""
    root = tmp_path_factory.mktemp("photographs")
    (root / "images").mkdir()
    for number, photograph in enumerate(load_sample_images().images):
        for place in range(12):
            top, left = place // 4 * 140, place % 4 * 160
            Image.fromarray(photograph[top : top + 140, left : left + 140]).save(
                root / "images" / f"{number}_{place}.png"
            )
    return prepared(root, videos=(), images=[root / "images"], image_sizes=["64x64"])


def with_codec(manifest: Manifest, **constants: Callable[[np.ndarray], np.ndarray]) -> str:
    changed = {name: tuple(change(np.array(getattr(manifest.codec, name)))) for name, change in constants.items()}
    return overview(replace(manifest, codec=replace(manifest.codec, **changed))).splitlines()[-1]


def test_constants_of_another_codec_are_noticed(photographs: Manifest) -> None:
    assert with_codec(photographs).endswith(": as expected")
    for change in (
        {"std": lambda std: std * 4},
        {"std": lambda std: std / 4},
        {"std": np.ones_like, "mean": np.zeros_like},
        {"mean": lambda mean: mean + 3},
    ):
        assert with_codec(photographs, **change).startswith("WARNING: whitened: mean")


def test_a_few_unusual_channels_give_no_warning(photographs: Manifest) -> None:
    def change(std: np.ndarray) -> np.ndarray:
        return std * np.where(np.isin(np.arange(16), (3, 7)), 4, 1)

    assert re.search(r"^whitened: .*channels 3, 7 are outside the usual range", with_codec(photographs, std=change))


def test_damaged_samples_are_named_and_skipped_in_the_statistics(copy: Path) -> None:
    flip(copy / f"{BUCKET}.tar", latent_of(copy, BUCKET, 1))
    said = overview(Manifest.load(copy))
    assert f"Sample 1 of {copy / BUCKET}.tar is damaged" in said
    total = sum(entry.count for entry in Manifest.load(copy).of_split("train"))
    assert f"over {total - 1} of {total} samples" in said
