"""The relative loss of contexts, with a network whose velocity is known."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpdit_lightning import GPDiTConfig
from gpdit_lightning.checkpoints.facts import ValidationLoss
from gpdit_lightning.checkpoints.reading import TrainedModel
from gpdit_lightning.diffusion import NoiseSchedule
from gpdit_lightning.generation.context_loss import NOISE_LEVELS, relative_loss
from gpdit_lightning.model import NO_LABEL
from gpdit_lightning.model.layout import ClipBlocks
from gpdit_lightning.specs import ClipGeometry

FRAMES = 5  # of the training clips
SCHEDULE = NoiseSchedule(shift=2.0)
SINES = SCHEDULE.theta(torch.tensor(NOISE_LEVELS)).sin()


class ModelOfZeros(nn.Module):
    """Returns the velocity, or the noise, of latents that are 0, and records its inputs."""

    device = torch.device("cpu")

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.config = GPDiTConfig(**fields)
        self.calls: list[dict[str, Any]] = []

    def forward(
        self, noisy: Tensor, theta: Tensor, clean: Tensor, condition: Tensor | None, draws: int, frames: list[int]
    ) -> Tensor:
        self.calls.append({"clean": clean, "condition": condition, "draws": draws, "frames": frames})
        angles = ClipBlocks.of(self.config, frames, *noisy.shape[-2:]).spread(theta)
        return noisy / (angles.sin() if self.config.target == "epsilon" else angles.tan())


def model_with(
    quarters: dict[str, tuple[float | None, ...]] | None, frames_without_loss: int = 0, **fields: Any
) -> TrainedModel:
    validation = None if quarters is None else ValidationLoss(100, quarters)
    geometry: Any = ClipGeometry(3, ((64, 64),), FRAMES)
    unused: Any = None
    backbone: Any = ModelOfZeros(**fields)
    return TrainedModel(
        backbone,
        unused,
        "ema",
        SCHEDULE,
        unused,
        geometry,
        100,
        validation=validation,
        frames_without_loss=frames_without_loss,
    )


def context_of(*values: float) -> Tensor:
    """Return latents (k, 4, 4, 6) whose frames have these values."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 4, 4, 6)


def test_loss_at_weak_noise_is_divided_by_that_of_validation() -> None:
    """For latents c the error of the model is -c / sin(theta)."""
    trained = model_with({"videos": (4.0, 1.0, 0.5, 0.25)})
    for values, square in (
        ((3.0, 7.0, 5.0), 9 / FRAMES + 25 * (1 - 1 / FRAMES)),  # the first and the last frame
        ((9.0, 9.0, 2.0, 0.0, 0.0, 0.0, 1.0), 4 / FRAMES + 1 - 1 / FRAMES),  # the frames of a training clip
    ):
        expected = (square / SINES**2 / 4).mean().item()
        assert relative_loss(trained, context_of(*values)) == pytest.approx(expected, rel=1e-4)
    short, long = trained.backbone.calls
    assert (short["frames"], long["frames"], short["draws"], short["condition"]) == ([0, 2], [0, 4], 2, None)
    assert torch.equal(short["clean"], context_of(3.0, 7.0, 5.0)[None])
    assert torch.equal(long["clean"], context_of(2.0, 0.0, 0.0, 0.0, 1.0)[None])


@pytest.mark.parametrize(
    ("shape", "first", "values", "frames", "square"),
    [
        ((2, 0, 0), 1, (3.0, 9.0, 9.0, 5.0, 7.0), [0, 3, 4], 9 / 3 + 37 * 2 / 3),  # three blocks
        (
            (2, 0, 0),
            1,
            (9.0, 3.0, 9.0, 9.0, 9.0, 9.0, 5.0, 7.0),
            [0, 3, 4],
            81 / 3 + 37 * 2 / 3,
        ),  # the last five frames
        ((2, 0, 0), 1, (3.0, 5.0, 7.0, 9.0), [0, 1, 2], 25 / 3 + 65 * 2 / 3),  # four frames are no whole blocks
        ((5, 0, 0), 0, (3.0, 1.0, 1.0, 1.0, 5.0), [0, 1, 2, 3, 4], 37 / 5),  # one block
        ((1, 1, 3), 0, (3.0, 9.0, 5.0), [0, 2], 9 / FRAMES + 25 * (1 - 1 / FRAMES)),  # parts of frames
    ],
)
def test_the_first_and_the_last_block_are_compared(
    shape: tuple[int, int, int], first: int, values: tuple[float, ...], frames: list[int], square: float
) -> None:
    fields: dict[str, Any] = {"block_shape": shape, "first_block_frames": first, "target": "epsilon"}
    trained = model_with({"videos": (4.0, 1.0, 0.5, 0.25)}, **fields)
    expected = (square * (1 / SINES**2 - 1) / 4).mean().item()
    assert relative_loss(trained, context_of(*values)) == pytest.approx(expected, rel=1e-4)
    assert trained.backbone.calls[0]["frames"] == frames


def test_frames_without_loss_in_training_are_not_compared() -> None:
    """The validation loss is that of the other frames, here of two."""
    quarters: dict[str, tuple[float | None, ...]] = {"videos": (4.0,) * 4, "images": (1.0,) * 4}
    trained = model_with(quarters, frames_without_loss=3)
    expected = ((9 / 2 + 25 / 2) / SINES**2 / 4).mean().item()
    assert relative_loss(trained, context_of(9.0, 9.0, 9.0, 3.0, 5.0)) == pytest.approx(expected, rel=1e-4)
    assert trained.backbone.calls[0]["frames"] == [3, 4]
    assert relative_loss(trained, context_of(9.0, 9.0, 9.0)) is None
    assert relative_loss(trained, context_of(2.0)) == pytest.approx((4 / SINES**2).mean().item(), rel=1e-4)


def test_a_single_frame_is_compared_with_images() -> None:
    trained = model_with({"images": (1.0,) * 4, "videos": (100.0,) * 4})
    expected = (4 / SINES**2).mean().item()
    assert relative_loss(trained, context_of(2.0), NO_LABEL) == pytest.approx(expected, rel=1e-4)
    assert trained.backbone.calls[0]["condition"].tolist() == [NO_LABEL] * 2


@pytest.mark.parametrize(
    ("quarters", "values"),
    [
        (None, (1.0, 1.0)),
        ({"images": (1.0,) * 4}, (1.0, 1.0)),
        ({"videos": (1.0,) * 4}, (1.0,)),
        ({"videos": (None, 1.0, 1.0, 1.0)}, (1.0, 1.0)),
        ({"videos": (1.0,) * 4, "images": (1.0,) * 4}, ()),
    ],
)
def test_there_is_no_quotient_without_a_reference(
    quarters: dict[str, tuple[float | None, ...]] | None, values: tuple[float, ...]
) -> None:
    assert relative_loss(model_with(quarters), context_of(*values)) is None
    assert relative_loss(model_with(quarters), torch.zeros(0, 4, 4, 6)) is None


def test_random_generators_are_unchanged() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = relative_loss(model_with({"videos": (1.0,) * 4}), context_of(1.0, 2.0))
    torch.rand(3)
    assert relative_loss(model_with({"videos": (1.0,) * 4}), context_of(1.0, 2.0)) == first
    torch.manual_seed(0)
    relative_loss(model_with({"videos": (1.0,) * 4}), context_of(1.0, 2.0))
    assert torch.equal(torch.get_rng_state(), before)
