"""Several noisy copies of a clip against one clean stream equal separate passes."""

import pytest
import torch
from torch import Tensor

from gpdit_lightning import GPDiT
from tests.model.toys import assert_near, toy_batch, toy_model


def rows_of_draw(draw: int, draws: int, clips: int, context_clips: int) -> list[int]:
    """The noisy rows of one copy of every clip, those with context first."""
    with_context = range(draw * context_clips, (draw + 1) * context_clips)
    alone = clips - context_clips
    first = draws * context_clips + draw * alone
    return [*with_context, *range(first, first + alone)]


def separate_passes(model: GPDiT, noisy: Tensor, theta: Tensor, clean: Tensor, draws: int) -> Tensor:
    output = torch.empty_like(noisy)
    for draw in range(draws):
        rows = rows_of_draw(draw, draws, len(noisy) // draws, len(clean))
        output[rows] = model(noisy[rows], theta[rows], clean)
    return output


@pytest.mark.parametrize("variant", ["of2", "of"])
@pytest.mark.parametrize(
    ("draws", "clips", "context_clips", "frames", "checkpointing"),
    [
        (3, 3, 1, 5, False),  # some clips have context
        (2, 2, 2, 2, False),  # all have
        (3, 2, 0, 2, False),  # none has
        (2, 2, 2, 1, False),  # images: a context of no frames
        (2, 3, 1, 5, True),  # the shared stream is recomputed in the backward pass
    ],
)
def test_outputs_and_gradients(
    variant: str, draws: int, clips: int, context_clips: int, frames: int, checkpointing: bool
) -> None:
    model = toy_model(attention=variant, activation_checkpointing=checkpointing)
    batch = [x.requires_grad_() for x in toy_batch(draws * clips, context_clips, frames)]
    outputs = model(*batch, draws=draws), separate_passes(model, *batch, draws=draws)
    assert_near(*outputs, tolerance=1e-13, what="output")
    weights = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    inputs = {"noisy": batch[0], "theta": batch[1], "clean": batch[2]} | dict(model.named_parameters())
    grads, expected = (
        torch.autograd.grad((output * weights).sum(), list(inputs.values()), allow_unused=True) for output in outputs
    )
    for name, grad, expected_grad in zip(inputs, grads, expected, strict=True):
        assert_near(grad, expected_grad, tolerance=1e-12, what=f"gradient of {name}")


def test_in_training_dtype() -> None:
    model = toy_model().float()
    noisy, theta, clean = (x.float() for x in toy_batch(6, 1, frames=5))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        together, apart = model(noisy, theta, clean, draws=3), separate_passes(model, noisy, theta, clean, draws=3)
    assert_near(together, apart, tolerance=0.01)
