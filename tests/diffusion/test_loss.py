import pytest
import torch
from torch import Tensor

from gpdit_lightning.diffusion import DenoisingLoss, denoising_loss
from gpdit_lightning.errors import InputError


def batch(clips: int = 4, frames: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    prediction, velocity = torch.randn(2, clips, frames, 2, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    return prediction, velocity, torch.rand(clips, frames, generator=generator)


def test_the_loss_is_the_mean_squared_error() -> None:
    prediction, velocity, t = batch()
    loss, *_ = denoising_loss(prediction, velocity, t)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(prediction, velocity))
    assert denoising_loss(velocity, velocity, t)[0] == 0


def test_quartiles_contain_their_frames_and_the_last_one_pure_noise() -> None:
    t = torch.tensor([[0.0, 0.2499, 0.25, 0.4999], [0.5, 0.7499, 0.75, 1.0]])
    errors = torch.tensor([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0]], dtype=torch.float64)
    prediction = errors.sqrt()[..., None, None, None].expand(2, 4, 2, 3, 3)
    _, quartiles, _ = denoising_loss(prediction, torch.zeros_like(prediction), t)
    torch.testing.assert_close(quartiles.sums, torch.tensor([3.0, 12.0, 48.0, 192.0], dtype=torch.float64))
    assert quartiles.counts.tolist() == [2, 2, 2, 2]


def test_empty_quartiles_are_zero() -> None:
    prediction, velocity, _ = batch()
    _, quartiles, _ = denoising_loss(prediction, velocity, torch.full((4, 3), 0.6))
    assert quartiles.counts.tolist() == [0, 0, 12, 0]
    assert quartiles.sums[[0, 1, 3]].tolist() == [0, 0, 0]


def test_quartiles_of_parts_add_up_to_those_of_the_batch() -> None:
    prediction, velocity, t = batch(clips=6)
    loss, whole, _ = denoising_loss(prediction, velocity, t)
    parts = [denoising_loss(prediction[part], velocity[part], t[part])[1] for part in (slice(0, 1), slice(1, 6))]
    torch.testing.assert_close(sum(part.sums for part in parts), whole.sums)
    assert torch.equal(sum(part.counts for part in parts), whole.counts)
    torch.testing.assert_close(whole.sums.sum() / whole.counts.sum(), loss)


def test_half_precision_is_compared_in_float32() -> None:
    prediction, velocity, t = batch(dtype=torch.bfloat16)
    loss, quartiles, _ = denoising_loss(prediction, velocity, t)
    assert loss.dtype == quartiles.sums.dtype == torch.float32
    expected = (prediction.double() - velocity.double()).square().mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    _, in_double, _ = denoising_loss(prediction.double(), velocity.double(), t)
    assert in_double.sums.dtype == torch.float64


def test_the_gradient_agrees_with_finite_differences() -> None:
    prediction, velocity, t = batch(clips=2, frames=2)
    prediction.requires_grad_()
    assert torch.autograd.gradcheck(lambda values: denoising_loss(values, velocity, t)[0], prediction)
    loss, quartiles, _ = denoising_loss(prediction, velocity, t)
    (gradient,) = torch.autograd.grad(loss, prediction)
    torch.testing.assert_close(gradient, 2 * (prediction - velocity).detach() / prediction.numel())
    assert not quartiles.sums.requires_grad


@pytest.mark.parametrize("frames", [1, 4])
def test_every_frame_has_the_same_weight(frames: int) -> None:
    prediction, velocity, t = batch(frames=frames)
    per_frame = (prediction - velocity).square().mean(dim=(2, 3, 4))
    torch.testing.assert_close(denoising_loss(prediction, velocity, t)[0], per_frame.mean())


def test_per_clip_is_the_mean_of_each_clip() -> None:
    prediction, velocity, t = batch(clips=5)
    loss, _, per_clip = denoising_loss(prediction.requires_grad_(), velocity, t)
    assert not per_clip.requires_grad
    for clip in range(5):
        torch.testing.assert_close(
            per_clip[clip], torch.nn.functional.mse_loss(prediction[clip], velocity[clip]).detach()
        )
    torch.testing.assert_close(per_clip.mean(), loss.detach())


def test_a_loss_of_another_shape_is_refused() -> None:
    """A mean over all axes but the first, for example."""
    *_, t = batch()
    with pytest.raises(InputError, match=r"has shape \(4,\); it must have that of the noise levels, \(4, 3\)"):
        DenoisingLoss.from_blocks(torch.zeros(4), t)
