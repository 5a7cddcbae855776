"""The backbone as a module: parameters, errors, features, initialisation."""

import json

import pytest
import torch
from torch import nn

from gpdit_lightning import GPDiT, GPDiTConfig, InputError
from gpdit_lightning.model.patches import patchify, unpatchify
from tests.model.toys import assert_near, toy_batch, toy_config, toy_model


def parameter_count(layers: int, width: int, mlp_width: int, head_width: int, patch_values: int) -> int:
    attention = 4 * width * width + 2 * head_width  # query, key, value, output; two QK norms shared by the heads
    block = attention + 2 * width * mlp_width + 2 * width  # two norms
    embedding = patch_values * width + width
    output = width + width * patch_values + patch_values
    return layers * block + embedding + output


@pytest.mark.parametrize(
    ("size", "formula", "number"),
    [
        ("tiny", (4, 192, 768, 32, 64), 1_796_288),
        ("B", (12, 768, 3072, 64, 64), 85_054_528),
        ("H", (24, 2816, 11264, 128, 64), 2_284_305_984),
    ],
)
def test_parameter_counts(size: str, formula: tuple[int, ...], number: int) -> None:
    with torch.device("meta"):
        model = GPDiT(GPDiTConfig.preset(size))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == parameter_count(*formula) == number
    assert not list(model.buffers())


NOISY, THETA, CLEAN = (2, 4, 3, 4, 6), (2, 4), (2, 4, 3, 4, 6)


@pytest.mark.parametrize(
    ("noisy", "theta", "clean", "match"),
    [
        ((2, 4, 5, 4, 6), THETA, None, "C = 3"),
        ((4, 3, 4, 6), THETA, None, "takes"),
        ((2, 4, 3, 5, 6), THETA, None, "5x6 do not divide into 2x2 patches.*multiples of 2 latent pixels"),
        ((2, 4, 3, 4, 7), THETA, None, "4x7"),
        (NOISY, (2,), CLEAN, "theta has shape"),
        (NOISY, (2, 5), CLEAN, "theta has shape"),
        (NOISY, (4, 2), CLEAN, "theta has shape"),
        (NOISY, THETA, (3, 4, 3, 4, 6), "clean has shape"),
        (NOISY, THETA, (2, 3, 3, 4, 6), "clean has shape"),
        (NOISY, THETA, (2, 5, 3, 4, 6), "clean has shape"),
        (NOISY, THETA, (2, 4, 3, 6, 4), "clean has shape"),
        (NOISY, THETA, (2, 4, 4, 4, 6), "like noisy"),
    ],
)
def test_shapes_that_do_not_fit(
    noisy: tuple[int, ...], theta: tuple[int, ...], clean: tuple[int, ...] | None, match: str
) -> None:
    given = [torch.zeros(shape, dtype=torch.float64) if shape else None for shape in (noisy, theta, clean)]
    with pytest.raises(InputError, match=match):
        toy_model()(*given)


@pytest.mark.parametrize(("draws", "match"), [(2, "draws \\* B' <= B where draws is 2"), (0, "draws is 0")])
def test_noisy_copies_that_do_not_fit(draws: int, match: str) -> None:
    with pytest.raises(InputError, match=match):
        toy_model()(*toy_batch(3, 2), draws=draws)


def test_empty_latents() -> None:
    for shape in ((2, 0, 3, 4, 6), (0, 4, 3, 4, 6), (2, 4, 3, 0, 6)):
        with pytest.raises(InputError, match="they are empty"):
            toy_model()(torch.zeros(shape).double(), torch.zeros(shape[:2]).double())


@pytest.mark.parametrize(
    ("classes", "condition", "match"),
    [
        (0, [0, 0], "leave `condition` at None"),
        (2, [0, 2], "this model takes a class from 0 to 1, or -1 for none, for each of 2 clips"),
        (2, [0], "for each of 2 clips"),
        (2, [0.0, 1.0], "the condition is .*takes a class"),
    ],
    ids=["model without classes", "unknown class", "too few", "no integers"],
)
def test_every_method_checks_the_condition(classes: int, condition: list[float], match: str) -> None:
    """It has no effect on clean frames, but a wrong one is an error there too."""
    model, (noisy, theta, clean) = toy_model(classes=classes), toy_batch()
    cache, labels = model.new_cache(2, 4, 4, 6), torch.tensor(condition)
    for call in (
        lambda: model(noisy, theta, clean, condition=labels),
        lambda: model.features(clean, [1], condition=labels),
        lambda: model.extend(cache, clean, condition=labels),
        lambda: model.denoise(noisy[:, 0], theta[:, 0], cache, condition=labels),
    ):
        with pytest.raises(InputError, match=match):
            call()


def test_every_method_runs_on_meta_tensors() -> None:
    with torch.device("meta"):
        model = GPDiT(toy_config(classes=2))
        noisy, theta = torch.empty(2, 3, 3, 4, 6), torch.empty(2, 3)
        assert model(noisy, theta, noisy).shape == noisy.shape
        assert model.features(noisy, [2])[2].shape == (2, 3, 6, 40)
        cache = model.new_cache(2, 2, 4, 6, sinks=1)
        model.extend(cache, noisy)
        assert model.denoise(noisy[:, 0], theta[:, 0], cache, clean=noisy[:, :1]).shape == (2, 3, 4, 6)


def test_features_are_the_residual_stream_after_each_block() -> None:
    model = toy_model(layers=3)
    _, _, clean = toy_batch(2, frames=4)
    features = model.features(clean, layers=[3, 0, 1, 1])
    assert set(features) == {0, 1, 3}
    assert all(x.shape == (2, 4, 6, 40) for x in features.values())
    assert_near(features[0], model.patch_embedding(patchify(clean, 2)), what="patch embedding")
    assert model.features(clean, layers=[]) == {}
    for layer, x in model.features(clean, layers=iter(range(4))).items():
        assert layer not in features or torch.equal(x, features[layer])


def test_features_run_no_block_above_the_highest_layer() -> None:
    model = toy_model(layers=3)
    ran = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, _: ran.append(list(model.blocks).index(module)))
    model.features(toy_batch()[2], layers=[0])
    assert ran == []
    model.features(toy_batch()[2], layers=[2])
    assert ran == [0, 1]


@pytest.mark.parametrize("layer", [-1, 3])
def test_features_of_a_layer_that_does_not_exist(layer: int) -> None:
    with pytest.raises(InputError, match=f"layer {layer} does not exist: choose from 0 .* to 2"):
        toy_model().features(toy_batch()[2], layers=[1, layer])


@pytest.mark.parametrize("frames", [(0,), (2, 1), (-1, 2), (1, 1), (0, 1, 2)], ids=str)
def test_frames_that_are_not_rising_positions_are_refused(frames: tuple[int, ...]) -> None:
    noisy, theta, clean = toy_batch(frames=2)
    with pytest.raises(InputError, match="give as many increasing integer positions"):
        toy_model()(noisy, theta, clean, frames=frames)


def test_a_clip_shorter_than_its_noisy_frames_is_refused() -> None:
    noisy, theta, clean = toy_batch(frames=2)
    with pytest.raises(InputError, match="clean has 2 frames, but the blocks before"):
        toy_model()(noisy, theta, clean, frames=(1, 4))


def test_the_root_module_has_no_parameters() -> None:
    model = toy_model()
    assert not list(model.named_parameters(recurse=False))
    assert not list(model.named_buffers(recurse=False))


def test_state_dict_round_trip() -> None:
    model = toy_model(attention="of", time_site="input", patch_size=1, latent_channels=12)
    stored = json.loads(json.dumps(model.config.to_dict()))
    config = GPDiTConfig(**stored)
    assert config == model.config
    assert hash(config) == hash(model.config)
    restored = GPDiT(config).double()
    restored.load_state_dict(model.state_dict())
    batch = toy_batch(channels=12)
    assert torch.equal(restored(*batch), model(*batch))


@pytest.mark.parametrize(("patch", "height", "width"), [(1, 3, 2), (3, 6, 9)])
def test_unpatchify_inverts_patchify(patch: int, height: int, width: int) -> None:
    latents = torch.arange(2 * 3 * 5 * height * width).view(2, 3, 5, height, width)
    tokens = patchify(latents, patch)
    assert tokens.shape == (2, 3, height * width // patch**2, 5 * patch**2)
    assert torch.equal(unpatchify(tokens, patch, height // patch, width // patch), latents)
    second = latents[..., :patch, patch : 2 * patch] if width > patch else latents[..., :patch, :patch]
    assert torch.equal(tokens[:, :, 1 if width > patch else 0], second.flatten(2))


def test_initial_output_is_exactly_zero() -> None:
    model = GPDiT(toy_config())
    noisy, theta, clean = (x.float() for x in toy_batch())
    assert not model(noisy, theta, clean).any()
    assert all(
        module.weight.any()
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not model.output
    )


def test_reset_parameters_repeats_with_the_seed() -> None:
    torch.manual_seed(0)
    model = GPDiT(toy_config())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.reset_parameters()
    assert not torch.equal(model.blocks[0].query.weight, before["blocks.0.query.weight"])
    torch.manual_seed(0)
    again = GPDiT(toy_config()).state_dict()
    assert all(torch.equal(again[name], value) for name, value in before.items())
