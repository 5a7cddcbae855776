"""Which inputs influence which outputs: exact zeros where the mask forbids it, by perturbation and by gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.model.toys import toy_batch, toy_model

VARIANTS = ("of2", "of")
FRAMES = 4

# Three layers, so that influence can pass through the clean stream.
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


def test_a_clean_frame_influences_later_noisy_frames_only(predict: Callable[..., Tensor]) -> None:
    noisy, theta, clean = toy_batch(2, frames=FRAMES)
    before = predict(noisy, theta, clean)
    for j in range(FRAMES):
        changed = changed_frames(before, predict(noisy, theta, moved(clean, j)))
        assert changed == [[i > j for i in range(FRAMES)]] * 2


def test_a_noisy_frame_and_its_theta_influence_that_frame_only(predict: Callable[..., Tensor]) -> None:
    noisy, theta, clean = toy_batch(2, frames=FRAMES)
    before = predict(noisy, theta, clean)
    for j in range(FRAMES):
        only_j = [[i == j for i in range(FRAMES)]] * 2
        assert changed_frames(before, predict(moved(noisy, j), theta, clean)) == only_j
        assert changed_frames(before, predict(noisy, moved(theta, j), clean)) == only_j


def test_the_last_clean_frame_influences_nothing(predict: Callable[..., Tensor]) -> None:
    noisy, theta, clean = toy_batch(2, frames=FRAMES)
    poisoned = clean.clone()
    poisoned[:, -1] = torch.nan  # not even computed
    assert torch.equal(predict(noisy, theta, poisoned), predict(noisy, theta, clean))


def test_clips_and_noisy_copies_of_a_clip_are_independent(predict: Callable[..., Tensor]) -> None:
    """Two copies of clips 0 and 1, which have context, and one of clip 2, which has none."""
    noisy, theta, clean = toy_batch(5, 2, frames=FRAMES)
    before = predict(noisy, theta, clean, draws=2)
    for row in range(5):
        changed = changed_frames(before, predict(moved(noisy, 1, row), moved(theta, 1, row), clean, draws=2))
        assert changed == [[other == row and i == 1 for i in range(FRAMES)] for other in range(5)]
    for clip in range(2):
        for j in range(FRAMES):
            changed = changed_frames(before, predict(noisy, theta, moved(clean, j, clip), draws=2))
            assert changed == [[row in (clip, 2 + clip) and i > j for i in range(FRAMES)] for row in range(5)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_depend_on_what_their_variant_allows(variant: str) -> None:
    features = torch.no_grad()(toy_model(attention=variant, layers=LAYERS).features)
    _, _, clean = toy_batch(2, frames=FRAMES)
    before = features(clean, range(LAYERS + 1))
    for j in range(FRAMES):
        after = features(moved(clean, j), range(LAYERS + 1))
        for layer in range(LAYERS + 1):
            allowed = [i >= j if variant == "of2" and layer > 0 else i == j for i in range(FRAMES)]
            assert changed_frames(before[layer], after[layer]) == [allowed] * 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_pass_only_where_the_mask_allows(variant: str) -> None:
    context_clips = 1
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
    """A noisy frame at theta = 0 has no influence on the frames after it, although it equals a clean one."""
    model = toy_model(attention=variant)
    noisy, theta, clean = toy_batch(1, frames=3)
    theta = torch.zeros_like(theta)
    with torch.no_grad():
        changed = changed_frames(model(noisy, theta, clean), model(moved(noisy, 0), theta, clean))
    assert changed == [[True, False, False]]
