"""The loss of a stage with several noisy copies of every clip, and with loss on some frames only."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.data.batches import LatentBatch
from gpdit_lightning.diffusion import DenoisingLoss
from gpdit_lightning.errors import InputError
from gpdit_lightning.stages import GPDiTStage
from gpdit_lightning.stages.agreement import check_loss


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
        given = labels[rows] if classes else None
        return LatentBatch(latents, noise[rows], t[rows], context, 1.0, "videos", ["a", "b", "c"], labels=given)

    both = batch(list(range(6)))
    loss = stage.objective(both)
    per_row = torch.empty(6, dtype=torch.float64)
    for draw in range(2):
        rows = [[row for row, of in enumerate(both.clip_of_row.tolist()) if of == clip][draw] for clip in range(3)]
        per_row[rows] = stage.objective(batch(rows)).per_clip
    torch.testing.assert_close(loss.per_clip, per_row)
    torch.testing.assert_close(loss.mean.detach(), per_row.mean())
    assert loss.quartiles.counts.sum() == 6 * 4


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("context", [0, 1, 3])
def test_the_loss_on_some_frames_equals_their_loss_in_a_pass_over_all_frames(
    randomise: Callable[[GPDiT], GPDiT], tiny_config: GPDiTConfig, context: int, draws: int
) -> None:
    """Compared with a pass over all noisy frames."""
    stage = GPDiTStage(tiny_config)
    stage.configure_model()
    randomise(stage.backbone)
    stage.double()
    frames, generator = (1, 3, 5), torch.Generator().manual_seed(0)
    latents = torch.randn(3, 6, 4, 4, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(3 * draws, 6, 4, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.rand(3 * draws, 6, generator=generator, dtype=torch.float64)
    places, keys = list(frames), ["a", "b", "c"]
    batch = LatentBatch(latents, noise[:, places], t[:, places], context, 1.0, "sequences", keys, frames=frames)
    loss = stage.objective(batch)

    theta = t * math.pi / 2
    cos, sin = theta.cos()[..., None, None, None], theta.sin()[..., None, None, None]
    x0 = latents[batch.clip_of_row]
    prediction = stage.backbone(cos * x0 + sin * noise, theta, latents[:context], draws=draws)
    errors = (prediction - (cos * noise - sin * x0)).square().mean(dim=(2, 3, 4))
    torch.testing.assert_close(loss.per_clip, errors[:, places].mean(dim=1).detach())
    torch.testing.assert_close(loss.mean, errors[:, places].mean())
    assert loss.quartiles.counts.sum() == 3 * draws * 3


VALID = DenoisingLoss.from_blocks(torch.ones(2, 3, requires_grad=True), torch.rand(2, 3))


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (VALID.mean, "returned Tensor; it must return a DenoisingLoss"),
        (None, "returned NoneType; it must return a DenoisingLoss"),
        (tuple(VALID), "returned tuple; it must return a DenoisingLoss"),
        (VALID._replace(mean=VALID.mean.repeat(2)), "mean is (2,); it must be a tensor of shape ()"),
        (VALID._replace(mean=1.0), "mean is float; it must be a tensor"),
        (VALID._replace(quartiles=None), "quartiles.sums is NoneType; it must be a tensor of shape (4,)"),
        (VALID._replace(per_clip=torch.ones(3)), "per_clip is (3,); it must be a tensor of shape (2,)"),
        (VALID._replace(mean=VALID.mean.detach()), "mean has no gradient"),
    ],
)
def test_the_result_of_a_custom_objective_is_checked(loss: Any, words: str) -> None:
    latents = torch.zeros(2, 3, 1, 1, 1)
    batch = LatentBatch(latents, latents, torch.zeros(2, 3), 0, 1.0, "videos", ["a", "b"])
    with pytest.raises(InputError, match=re.escape(words)):
        check_loss(loss, "MyStage", batch)


def test_a_validation_loss_needs_no_gradient() -> None:
    latents = torch.zeros(2, 3, 1, 1, 1)
    batch = LatentBatch(latents, latents, torch.zeros(2, 3), 0, 1.0, "videos", ["a", "b"])
    loss = VALID._replace(mean=VALID.mean.detach())
    with torch.no_grad():
        assert check_loss(loss, "MyStage", batch) is loss
