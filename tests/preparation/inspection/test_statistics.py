"""Statistics of latents."""

import numpy as np

from gpdit_lightning.preparation.inspection.statistics import LatentStatistics


def test_running_statistics_equal_those_of_all_values() -> None:
    numbers = np.random.default_rng(0)
    latents = [numbers.normal(1000, 0.1, (frames, 3, 2, width)) for frames, width in ((1, 1), (4, 7), (2, 3))]
    statistics = LatentStatistics(3)
    assert np.isnan(statistics.std).all()
    for latent in latents:
        statistics.add(latent)
    together = np.concatenate([latent.swapaxes(0, 1).reshape(3, -1) for latent in latents], axis=1)
    np.testing.assert_allclose(statistics.mean, together.mean(axis=1), rtol=1e-14)
    np.testing.assert_allclose(statistics.std, together.std(axis=1), rtol=1e-9)
