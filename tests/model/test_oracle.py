"""The backbone's outputs and all its gradients against a dense float64 reference."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from gpdit_lightning import GPDiT
from gpdit_lightning.model.config import TimeSite
from tests.model import oracle
from tests.model.toys import assert_near, toy_batch, toy_config, toy_model

VARIANTS = ("of2", "of")


def gradients(output: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Gradient of a fixed random projection of `output` with respect to each input."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    loss = (output * weights).sum()
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values()), allow_unused=True), strict=True))


def library_run(
    model: GPDiT, batch: dict[str, Tensor], draws: int = 1, condition: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor | None]]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in batch.items()}
    output = model(leaves["noisy"], leaves["theta"], leaves.get("clean"), condition, draws)
    return output.detach(), gradients(output, leaves | dict(model.named_parameters()))


def oracle_run(
    model: GPDiT, batch: dict[str, Tensor], draws: int, condition: Tensor | None
) -> tuple[Tensor, dict[str, Tensor | None]]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in batch.items()}
    parameters = {name: value.detach().clone().requires_grad_() for name, value in model.state_dict().items()}
    latents = leaves["noisy"], leaves["theta"], leaves.get("clean")
    output = oracle.forward(parameters, model.config, *latents, draws, condition)
    return output.detach(), gradients(output, leaves | parameters)


def assert_equals_oracle(
    model: GPDiT, batch: dict[str, Tensor], draws: int = 1, condition: Tensor | None = None
) -> None:
    output, grads = library_run(model, batch, draws, condition)
    expected_output, expected_grads = oracle_run(model, batch, draws, condition)
    assert expected_output.std() > 0.1  # not a comparison of zeros
    assert_near(output, expected_output, what="output")
    assert grads.keys() == expected_grads.keys()
    for name, expected in expected_grads.items():
        assert_near(grads[name], expected, what=f"gradient of {name}")


def named(noisy: Tensor, theta: Tensor, clean: Tensor | None) -> dict[str, Tensor]:
    return {"noisy": noisy, "theta": theta} | ({} if clean is None else {"clean": clean})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("clips", "context_clips", "frames"),
    [
        (3, 1, 12),  # some clips have context
        (2, 2, 5),  # all have
        (3, 2, 2),
        (2, 2, 1),  # images: a context of no frames
        (2, 0, 5),  # `clean` holds no clip
        (2, None, 5),  # `clean` is None
    ],
)
def test_outputs_and_gradients(variant: str, clips: int, context_clips: int | None, frames: int) -> None:
    noisy, theta, clean = toy_batch(clips, context_clips or 0, frames, height=4, width=6)  # 6 tokens a frame
    batch = named(noisy, theta, None if context_clips is None else clean)
    assert_equals_oracle(toy_model(attention=variant), batch)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("draws", "clips", "context_clips", "frames"), [(2, 4, 2, 2), (3, 7, 2, 5)])
def test_noisy_copies_of_a_clip(variant: str, draws: int, clips: int, context_clips: int, frames: int) -> None:
    assert_equals_oracle(toy_model(attention=variant), named(*toy_batch(clips, context_clips, frames)), draws)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("wanted", "draws"), [((1, 3, 5), 2), ((0, 2), 1), ((0,), 2), ((3, 4), 1)], ids=str)
def test_some_noisy_frames_alone(variant: str, wanted: tuple[int, ...], draws: int) -> None:
    """They and their gradients are as if all were computed and the others had no weight."""
    clips = 5
    model = toy_model(attention=variant, classes=3)
    noisy, theta, clean = toy_batch(clips, 2, frames=6)
    leaves = [x.clone().requires_grad_() for x in (noisy, theta, clean)]
    parameters = {name: value.clone().requires_grad_() for name, value in model.state_dict().items()}
    places = list(wanted)
    expected = oracle.forward(parameters, model.config, *leaves, draws, LABELS[:clips])[:, places]
    velocity = model(leaves[0][:, places], leaves[1][:, places], leaves[2], LABELS[:clips], draws, wanted)
    assert_near(velocity, expected)
    inputs = dict(zip(("noisy", "theta", "clean"), leaves, strict=True))
    expected_gradients = gradients(expected, inputs | parameters)
    for name, gradient in gradients(velocity, inputs | dict(model.named_parameters())).items():
        assert_near(gradient, expected_gradients[name], what=f"gradient of {name}")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("frames", "height", "width"), [(5, 16, 32), (2, 18, 30)])
def test_long_frames(variant: str, frames: int, height: int, width: int) -> None:
    """128 tokens per frame and 135: a multiple of a kernel's tile, and none."""
    batch = named(*toy_batch(2, 1, frames, height, width))
    assert_equals_oracle(toy_model(attention=variant, width=24, mlp_width=32), batch)


LABELS = torch.tensor([2, -1, 0, 1, 1, 2, -1])
TEXTS = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("draws", "clips", "context_clips"), [(1, 2, None), (2, 5, 2)])
@pytest.mark.parametrize("overrides", [{"classes": 3}, {"text_width": 5}], ids=["label", "text"])
def test_conditions(variant: str, overrides: dict[str, int], draws: int, clips: int, context_clips: int | None) -> None:
    noisy, theta, clean = toy_batch(clips, context_clips or 0, frames=4)
    batch = named(noisy, theta, None if context_clips is None else clean)
    condition = (LABELS if "classes" in overrides else TEXTS)[:clips]
    assert_equals_oracle(toy_model(attention=variant, **overrides), batch, draws, condition)


@pytest.mark.parametrize("site", get_args(TimeSite))
@pytest.mark.parametrize("classes", [0, 2], ids=["unconditional", "no label"])
def test_time_sites(site: str, classes: int) -> None:
    assert_equals_oracle(toy_model(time_site=site, classes=classes), named(*toy_batch(3, 2, frames=3)))


@pytest.mark.parametrize(("patch_size", "height", "width"), [(1, 2, 3), (3, 6, 9), (2, 2, 8)])
def test_patch_sizes(patch_size: int, height: int, width: int) -> None:
    model = toy_model(patch_size=patch_size, latent_channels=5)
    assert_equals_oracle(model, named(*toy_batch(2, 1, 3, height, width, channels=5)))


@pytest.mark.parametrize("overrides", [{"heads": 1}, {"layers": 1}, {"width": 36, "heads": 6}, {"norm_eps": 0.1}])
def test_other_architectures(overrides: dict[str, float]) -> None:
    assert_equals_oracle(toy_model(**overrides), named(*toy_batch(2, 1, frames=3)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_equal_the_oracle_at_every_layer(variant: str) -> None:
    model = toy_model(attention=variant, layers=3)
    _, _, clean = toy_batch(2, frames=4)
    for layer, features in model.features(clean, layers=range(4)).items():
        expected = oracle.features(model.state_dict(), model.config, clean, layer)
        assert_near(features, expected, what=f"layer {layer}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_activation_checkpointing_changes_nothing(variant: str) -> None:
    config = toy_config(attention=variant)
    batch = named(*toy_batch(3, 1))
    output, grads = library_run(toy_model(config), batch)
    again, grads_again = library_run(toy_model(config.replaced(activation_checkpointing=True)), batch)
    assert torch.equal(again, output)
    for name, grad in grads.items():
        assert (grads_again[name] is None) == (grad is None), name
        assert grad is None or torch.equal(grads_again[name], grad), name


def test_activation_checkpointing_runs_each_block_twice() -> None:
    """Otherwise the test above would pass with an option that does nothing."""
    model = toy_model(activation_checkpointing=True)
    runs = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, _: runs.append(list(model.blocks).index(module)))
    library_run(model, named(*toy_batch()))
    assert sorted(runs) == [0, 0, 1, 1]
    with torch.no_grad():
        model(*toy_batch())
    assert sorted(runs) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_is_close_to_float64(variant: str) -> None:
    model = toy_model(attention=variant)
    batch = named(*toy_batch(3, 2, frames=5))
    expected, expected_grads = library_run(model, batch)
    model = model.float()
    leaves = {name: value.float().requires_grad_() for name, value in batch.items()}
    output = model(**leaves)
    assert output.dtype == torch.float32
    assert_near(output, expected, 1e-5, "output")
    for name, grad in gradients(output, leaves | dict(model.named_parameters())).items():
        assert_near(grad, expected_grads[name], 1e-4, f"gradient of {name}")


@pytest.mark.parametrize(("variant", "checkpointing"), [("of2", True), ("of", False)])
def test_bfloat16_autocast_is_finite_and_near(variant: str, checkpointing: bool) -> None:
    model = toy_model(attention=variant, activation_checkpointing=checkpointing)
    batch = named(*toy_batch(3, 2, frames=5))
    expected, expected_grads = library_run(model, batch)
    model = model.float()
    leaves = {name: value.float().requires_grad_() for name, value in batch.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**leaves)
    assert output.dtype == torch.float32  # as the latents were
    assert_near(output, expected, 0.05, "output")
    for name, grad in gradients(output, leaves | dict(model.named_parameters())).items():
        assert_near(grad, expected_grads[name], 0.1, f"gradient of {name}")


def test_the_oracle_detects_a_wrong_architecture() -> None:
    """The comparison fails for a wrong mask, a wrong site and wrong RoPE bases."""
    batch = named(*toy_batch(2, frames=4))
    model = toy_model()
    state = {name: value.detach() for name, value in model.state_dict().items()}
    output, _ = library_run(model, batch)
    for wrong in ({"attention": "of"}, {"time_site": "input"}, {"rope_lengths": (300, 40, 16)}):
        other = oracle.forward(state, model.config.replaced(**wrong), **batch)
        with pytest.raises(AssertionError, match="off by"):
            assert_near(output, other)
