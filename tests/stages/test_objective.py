"""A stage with several noisy copies of every clip: its loss is the mean over as many ordinary batches."""

from collections.abc import Callable

import pytest
import torch

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.data.batches import LatentBatch
from gpdit_lightning.stages import GPDiTStage


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("context", [0, 1, 3])
def test_the_loss_is_the_mean_over_single_draws(
    randomise: Callable[[GPDiT], GPDiT], tiny_config: GPDiTConfig, context: int, classes: int
) -> None:
    stage = GPDiTStage(tiny_config.replaced(classes=classes))
    stage.configure_model()
    randomise(stage.backbone)
    stage.double()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 4, 4, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(6, 4, 4, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.rand(6, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, -1, 2, 1, 1, 0])

    def batch(rows: list[int]) -> LatentBatch:
        told = labels[rows] if classes else None
        return LatentBatch(latents, noise[rows], t[rows], context, 1.0, "videos", ["a", "b", "c"], labels=told)

    both = batch(list(range(6)))
    loss = stage.objective(both)
    per_row = torch.empty(6, dtype=torch.float64)
    for draw in range(2):
        rows = [[row for row, of in enumerate(both.clip_of_row.tolist()) if of == clip][draw] for clip in range(3)]
        per_row[rows] = stage.objective(batch(rows)).per_clip
    torch.testing.assert_close(loss.per_clip, per_row)
    torch.testing.assert_close(loss.mean.detach(), per_row.mean())
    assert loss.quartiles.counts.sum() == 6 * 4
