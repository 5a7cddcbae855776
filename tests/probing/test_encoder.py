"""The frozen encoder compared with features of the whole model, pooled in loops."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.codecs import load_codec
from gpdit_lightning.errors import InputError
from gpdit_lightning.model.block import Block
from gpdit_lightning.model.layout import BlockLayout
from gpdit_lightning.probing.encoder import VideoEncoder, clip_frames, first_layers


@pytest.fixture(params=["rotation", "adaln"])
def backbone(tiny_config: GPDiTConfig, randomise: Callable[[GPDiT], GPDiT], request: pytest.FixtureRequest) -> GPDiT:
    """Four blocks and class labels, on which clean frames are not conditioned."""
    return randomise(GPDiT(tiny_config.replaced(layers=4, classes=3, time_conditioning=request.param)))


@pytest.fixture
def latents() -> Tensor:
    """Two clips of three latent frames of four tokens."""
    return torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(1))


def pooled_in_loops(features: Tensor, temporal_tokens: int) -> Tensor:
    """Map (F, N, D) to (temporal tokens + N, D), in float64."""
    frames, tokens, width = features.shape
    result = torch.zeros(temporal_tokens + tokens, width, dtype=torch.float64)
    for frame in range(frames):
        for token in range(tokens):
            result[frame] += features[frame, token].double() / tokens
            result[temporal_tokens + token] += features[frame, token].double() / frames
    return result


@pytest.mark.parametrize("temporal_tokens", [0, 5])
def test_tokens_are_the_projected_features_of_the_layer(backbone: GPDiT, latents: Tensor, temporal_tokens: int) -> None:
    encoder = VideoEncoder(backbone, 2, 7, temporal_tokens)
    tokens = encoder(latents)
    assert tokens.shape == (2, (temporal_tokens or 3) + 4, 7)
    with torch.no_grad():
        whole = backbone.features(latents, [2])[2]
    weight, bias = encoder.projection.weight.double(), encoder.projection.bias.double()
    for clip in range(2):
        expected = pooled_in_loops(whole[clip], temporal_tokens or 3) @ weight.T + bias
        torch.testing.assert_close(tokens[clip].double(), expected, rtol=1e-4, atol=1e-5)


def test_only_the_first_blocks_run_and_are_kept(backbone: GPDiT, latents: Tensor) -> None:
    encoder = VideoEncoder(backbone, 2, 7)
    called: list[nn.Module] = []
    hook = register_module_forward_hook(lambda module, *_: called.append(module) if isinstance(module, Block) else None)
    try:
        encoder(latents)
    finally:
        hook.remove()
    assert called == list(encoder.backbone.blocks)
    assert len(called) == 2
    kept = {name for name, _ in encoder.backbone.named_parameters() if name.startswith(("blocks", "prefix"))}
    assert {name.rsplit(".")[1] for name in kept} == {"0", "1"}


def test_the_given_model_shares_its_parameters_and_is_unchanged(backbone: GPDiT) -> None:
    backbone.train()
    frozen = first_layers(backbone, 3)
    for name, parameter in frozen.named_parameters():
        assert parameter.data_ptr() == backbone.get_parameter(name).data_ptr()
        assert not parameter.requires_grad
        assert backbone.get_parameter(name).requires_grad
    assert backbone.training
    assert len(backbone.blocks) == 4


def test_training_changes_only_the_projection(backbone: GPDiT, latents: Tensor) -> None:
    encoder = VideoEncoder(backbone, 2, 7).train()
    assert encoder.projection.training
    assert not any(module.training for module in encoder.backbone.modules())
    assert {name for name, parameter in encoder.named_parameters() if parameter.requires_grad} == {
        "projection.weight",
        "projection.bias",
    }
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1, weight_decay=0.1)
    encoder(latents.requires_grad_()).square().mean().backward()
    optimizer.step()
    assert latents.grad is None
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("backbone."), name


def test_the_state_dict_of_the_projection_restores_an_encoder(backbone: GPDiT, latents: Tensor) -> None:
    trained, fresh = VideoEncoder(backbone, 2, 7), VideoEncoder(backbone, 2, 7)
    assert not torch.equal(trained(latents), fresh(latents))
    fresh.projection.load_state_dict(trained.projection.state_dict())
    assert torch.equal(trained(latents), fresh(latents))


def test_the_backbone_may_be_in_bfloat16(backbone: GPDiT, latents: Tensor) -> None:
    exact = VideoEncoder(backbone, 2, 7)
    rounded = VideoEncoder(GPDiT(backbone.config).bfloat16(), 2, 7)
    rounded.backbone.load_state_dict(exact.backbone.state_dict())
    rounded.projection.load_state_dict(exact.projection.state_dict())
    assert rounded(latents).dtype == torch.float32
    assert (rounded(latents) - exact(latents)).abs().mean() < 0.1 * exact(latents).abs().mean()


@pytest.mark.parametrize("layers", [0, 5])
def test_a_layer_that_does_not_exist_is_refused(backbone: GPDiT, layers: int) -> None:
    with pytest.raises(InputError, match=f"layer {layers} does not exist: give a number from 1 to 4"):
        VideoEncoder(backbone, layers, 7)


@pytest.mark.parametrize(
    ("fields", "trained", "default", "requested", "nearest"),
    [
        ({}, 5, 13, None, None),
        ({"block_shape": (2, 0, 0)}, 6, 13, 9, "5 or 13"),
        ({"block_shape": (2, 0, 0), "first_block_frames": 1}, 5, 9, 13, "9 or 17"),
        ({"block_shape": (6, 0, 0)}, 6, 21, 17, "21"),
        ({"block_shape": (0, 0, 0)}, 5, 13, None, None),
        ({"block_shape": (0, 0, 0), "first_block_frames": 2}, 5, 13, 1, "5"),
        ({"block_shape": (1, 1, 2)}, 2, 5, None, None),
    ],
)
def test_clips_are_whole_blocks(
    tiny_config: GPDiTConfig,
    fields: dict[str, Any],
    trained: int,
    default: int,
    requested: int | None,
    nearest: str | None,
) -> None:
    """The default is at most 13 pixel frames, and the longest training clip, unless the first block is longer."""
    config, codec = tiny_config.replaced(**fields), load_codec("pca")
    model: Any = SimpleNamespace(backbone=SimpleNamespace(config=config), geometry=SimpleNamespace(frames=trained))
    layout = BlockLayout.of(config, 4, 4)
    frames = clip_frames(None, model, codec, layout, most=13)
    assert frames == clip_frames(default, model, codec, layout) == default
    assert GPDiT(config).features(torch.zeros(1, codec.latent_frames(frames), 4, 4, 4), [0])
    if requested is not None:
        with pytest.raises(InputError, match=rf"--frames is {requested}, .* are not whole blocks .*: give {nearest}\."):
            clip_frames(requested, model, codec, layout)
