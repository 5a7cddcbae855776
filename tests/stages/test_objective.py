"""A stage with several noisy copies of every clip: its loss is the mean over as many ordinary batches."""

from collections.abc import Callable

import pytest
import torch

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.data.batches import LatentBatch
from gpdit_lightning.stages import GPDiTStage


@pytest.mark.parametrize("context", [0, 1, 3])
def test_the_loss_is_the_mean_over_single_draws(
    randomise: Callable[[GPDiT], GPDiT], tiny_config: GPDiTConfig, context: int
) -> None:
    stage = GPDiTStage(tiny_config)
    stage.configure_model()
    randomise(stage.backbone)
    stage.double()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 4, 4, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(6, 4, 4, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.rand(6, 4, generator=generator, dtype=torch.float64)

    def batch(noise: torch.Tensor, t: torch.Tensor) -> LatentBatch:
        return LatentBatch(latents, noise, t, context, 1.0, "videos", ["a", "b", "c"])

    both = batch(noise, t)
    loss = stage.objective(both)
    per_row = torch.empty(6, dtype=torch.float64)
    for draw in range(2):
        rows = [[row for row, of in enumerate(both.clip_of_row.tolist()) if of == clip][draw] for clip in range(3)]
        per_row[rows] = stage.objective(batch(noise[rows], t[rows])).per_clip
    torch.testing.assert_close(loss.per_clip, per_row)
    torch.testing.assert_close(loss.mean.detach(), per_row.mean())
    assert loss.quartiles.counts.sum() == 6 * 4
