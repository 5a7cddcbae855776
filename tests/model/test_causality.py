"""Who influences whom: exact zeros where nothing may pass, by perturbation and by gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.model.toys import toy_batch, toy_model

VARIANTS = ("of2", "of")
FRAMES = 4

# Three layers, so that influence has time to spread through the clean stream.
LAYERS = 3


def moved(x: Tensor, frame: int, clip: int | None = None) -> Tensor:
    """A copy with one frame changed, of all clips or of one."""
    x = x.clone()
    x[slice(None) if clip is None else clip, frame] += 0.3
    return x


def changed_frames(before: Tensor, after: Tensor) -> list[list[bool]]:
    """For each clip and frame, whether a single bit differs; a changed frame must be changed clearly."""
    assert before.shape == after.shape
    changed = [[not torch.equal(x, y) for x, y in zip(*clip, strict=True)] for clip in zip(before, after, strict=True)]
    difference = (after - before).abs().flatten(2).amax(-1)
    assert (difference[torch.tensor(changed)] > 1e-6).all()
    return changed


@pytest.fixture(params=VARIANTS)
def predict(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    return torch.no_grad()(toy_model(attention=request.param, layers=LAYERS))


@pytest.mark.parametrize("j", range(FRAMES))
def test_clean_frame_reaches_later_noisy_frames_only(predict: Callable[..., Tensor], j: int) -> None:
    noisy, theta, clean = toy_batch(2, frames=FRAMES)
    changed = changed_frames(predict(noisy, theta, clean), predict(noisy, theta, moved(clean, j)))
    assert changed == [[i > j for i in range(FRAMES)]] * 2


@pytest.mark.parametrize("j", range(FRAMES))
def test_noisy_frame_reaches_itself_only(predict: Callable[..., Tensor], j: int) -> None:
    noisy, theta, clean = toy_batch(2, frames=FRAMES)
    changed = changed_frames(predict(noisy, theta, clean), predict(moved(noisy, j), theta, clean))
    assert changed == [[i == j for i in range(FRAMES)]] * 2


@pytest.mark.parametrize("j", range(FRAMES))
def test_theta_reaches_its_frame_only(predict: Callable[..., Tensor], j: int) -> None:
    noisy, theta, clean = toy_batch(2, frames=FRAMES)
    changed = changed_frames(predict(noisy, theta, clean), predict(noisy, moved(theta, j), clean))
    assert changed == [[i == j for i in range(FRAMES)]] * 2


def test_last_clean_frame_reaches_nobody(predict: Callable[..., Tensor]) -> None:
    noisy, theta, clean = toy_batch(2, frames=FRAMES)
    poisoned = clean.clone()
    poisoned[:, -1] = torch.nan  # not even computed
    assert torch.equal(predict(noisy, theta, poisoned), predict(noisy, theta, clean))


@pytest.mark.parametrize("clip", range(3))
def test_clips_do_not_see_each_other(predict: Callable[..., Tensor], clip: int) -> None:
    """Clips 0 and 1 have context, clip 2 has none."""
    noisy, theta, clean = toy_batch(3, 2, frames=FRAMES)
    before = predict(noisy, theta, clean)
    changed = changed_frames(before, predict(moved(noisy, 1, clip), moved(theta, 1, clip), clean))
    assert changed == [[row == clip and i == 1 for i in range(FRAMES)] for row in range(3)]
    if clip < 2:
        changed = changed_frames(before, predict(noisy, theta, moved(clean, 0, clip)))
        assert changed == [[row == clip and i > 0 for i in range(FRAMES)] for row in range(3)]


@pytest.mark.parametrize("row", range(5))
def test_noisy_copies_of_a_clip_do_not_see_each_other(predict: Callable[..., Tensor], row: int) -> None:
    """Two copies of clips 0 and 1, which have context, and one of clip 2, which has none."""
    noisy, theta, clean = toy_batch(5, 2, frames=FRAMES)
    changed = changed_frames(
        predict(noisy, theta, clean, draws=2), predict(moved(noisy, 1, row), moved(theta, 1, row), clean, draws=2)
    )
    assert changed == [[other == row and i == 1 for i in range(FRAMES)] for other in range(5)]


@pytest.mark.parametrize("clip", range(2))
@pytest.mark.parametrize("j", range(FRAMES))
def test_clean_frame_reaches_every_copy_of_its_clip(predict: Callable[..., Tensor], clip: int, j: int) -> None:
    noisy, theta, clean = toy_batch(5, 2, frames=FRAMES)
    changed = changed_frames(
        predict(noisy, theta, clean, draws=2), predict(noisy, theta, moved(clean, j, clip), draws=2)
    )
    assert changed == [[row in (clip, 2 + clip) and i > j for i in range(FRAMES)] for row in range(5)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("j", range(FRAMES))
def test_features_see_what_their_variant_allows(variant: str, j: int) -> None:
    model = toy_model(attention=variant, layers=LAYERS)
    _, _, clean = toy_batch(2, frames=FRAMES)
    with torch.no_grad():
        before, after = model.features(clean, range(LAYERS + 1)), model.features(moved(clean, j), range(LAYERS + 1))
    for layer in range(LAYERS + 1):
        allowed = [i >= j if variant == "of2" and layer > 0 else i == j for i in range(FRAMES)]
        assert changed_frames(before[layer], after[layer]) == [allowed] * 2


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("context_clips", [2, 1])
def test_gradients_pass_only_where_the_mask_allows(variant: str, context_clips: int) -> None:
    model = toy_model(attention=variant, layers=LAYERS)
    noisy, theta, clean = (x.requires_grad_() for x in toy_batch(2, context_clips, frames=FRAMES))
    output = model(noisy, theta, clean)
    for clip in range(2):
        for i in range(FRAMES):
            to_noisy, to_theta, to_clean = torch.autograd.grad(
                output[clip, i].square().sum(), (noisy, theta, clean), retain_graph=True
            )
            for other in range(2):
                for j in range(FRAMES):
                    assert to_noisy[other, j].any() == (other == clip and j == i)
                    assert to_theta[other, j].any() == (other == clip and j == i)
                    if other < context_clips:
                        assert to_clean[other, j].any() == (other == clip and j < i)


@pytest.mark.parametrize("variant", VARIANTS)
def test_theta_of_zero_is_still_not_the_clean_stream(variant: str) -> None:
    """A noisy frame at theta = 0 gives nothing to the frames after it, though it looks like a clean one."""
    model = toy_model(attention=variant)
    noisy, theta, clean = toy_batch(1, frames=3)
    theta = torch.zeros_like(theta)
    with torch.no_grad():
        changed = changed_frames(model(noisy, theta, clean), model(moved(noisy, 0), theta, clean))
    assert changed == [[True, False, False]]
