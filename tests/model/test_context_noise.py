"""Angles of clean blocks (context noise): against dense float64 references, in caches, and in rollouts."""

import math
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from gpdit_lightning import GPDiT
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation import ClipInputs, GenerationConfig, rollout
from gpdit_lightning.generation.rollout import frame_noise
from gpdit_lightning.model.config import TimeSite
from gpdit_lightning.randomness import ROLLOUT_CONTEXT_NOISE
from tests.generation.test_rollout import SAMPLER
from tests.model import block_oracle, oracle
from tests.model.test_oracle import gradients
from tests.model.toys import assert_near, toy_batch, toy_model

# Fields of the configuration, and frames, height and width of the clips.
LAYOUTS: list[tuple[dict[str, Any], tuple[int, int, int]]] = [
    ({"block_shape": (1, 0, 0)}, (3, 4, 6)),
    ({"block_shape": (3, 0, 0), "first_block_frames": 2}, (5, 4, 4)),
    ({"block_shape": (1, 2, 2)}, (2, 4, 8)),
    ({"block_shape": (2, 0, 0), "factorized": True}, (4, 4, 6)),
]
SITES = [{"time_site": site} for site in get_args(TimeSite)]


def batch_of(model: GPDiT, size: tuple[int, int, int], clips: int, with_context: int) -> dict[str, Tensor]:
    noisy, _, clean = toy_batch(clips, with_context, *size)
    blocks = model.layout(*size[1:]).count(size[0])
    angles = torch.rand(clips + with_context, blocks, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    theta, clean_theta = angles.split((clips, with_context))
    return {"noisy": noisy, "theta": theta * 1.5, "clean": clean, "clean_theta": clean_theta}


@pytest.mark.parametrize("variant", ["of2", "of"])
@pytest.mark.parametrize(("fields", "size"), [*LAYOUTS, *((site, LAYOUTS[0][1]) for site in SITES)], ids=str)
def test_outputs_and_gradients(fields: dict[str, Any], size: tuple[int, int, int], variant: str) -> None:
    """Two noisy copies of a clip with context, and a clip without."""
    model = toy_model(attention=variant, **fields)
    batch, parameters = batch_of(model, size, 3, 1), dict(model.named_parameters())

    def library(noisy: Tensor, theta: Tensor, clean: Tensor, clean_theta: Tensor) -> Tensor:
        return model(noisy, theta, clean, draws=2, clean_theta=clean_theta)

    def reference(noisy: Tensor, theta: Tensor, clean: Tensor, clean_theta: Tensor) -> Tensor:
        return block_oracle.forward(parameters, model.config, noisy, theta, clean, 2, clean_theta=clean_theta)

    runs = []
    for forward in (library, reference):
        leaves = {name: value.clone().requires_grad_() for name, value in batch.items()}
        output = forward(**leaves)
        runs.append((output, gradients(output, leaves | parameters)))
    (output, grads), (expected, expected_grads) = runs
    assert_near(output, expected, what="output")
    for name, gradient in grads.items():
        assert_near(gradient, expected_grads[name], what=f"gradient of {name}")
    clean_gradient = grads["clean_theta"]
    assert (clean_gradient is not None and bool(clean_gradient.any())) == (fields.get("time_site") != "none")


def test_angles_of_zero_change_no_bit() -> None:
    model = toy_model().float()
    noisy, theta, clean = (x.float() for x in toy_batch(3, 2))
    plain, zero = model(noisy, theta, clean), model(noisy, theta, clean, clean_theta=torch.zeros(2, 4))
    assert torch.equal(plain, zero)


@pytest.mark.parametrize("variant", ["of2", "of"])
@pytest.mark.parametrize(("fields", "size"), LAYOUTS, ids=str)
def test_cached_blocks_equal_the_full_pass(fields: dict[str, Any], size: tuple[int, int, int], variant: str) -> None:
    model = toy_model(attention=variant, layers=3, **fields)
    noisy, theta, clean, clean_theta = batch_of(model, size, 2, 2).values()
    frames, height, width = size
    layout = model.layout(height, width)
    caches = [model.new_cache(2, frames, height, width) for _ in range(2)]
    with torch.no_grad():
        expected = model(noisy, theta, clean, clean_theta=clean_theta)
        before: tuple[Tensor | None, Tensor | None] = None, None
        for block in range(layout.count(frames)):
            of_frames, (rows, columns) = layout.group_of(block, frames), layout.parts[block % layout.blocks_per_group]
            of_block = (slice(None), slice(of_frames.start, of_frames.stop), slice(None), rows, columns)
            given, of_given = clean[of_block], clean_theta[:, block : block + 1]
            one_frame = tuple(model.config.block_shape) == (1, 0, 0)
            block_of_noisy = noisy[of_block][:, 0] if one_frame else noisy[of_block]
            result = expected[of_block][:, 0] if one_frame else expected[of_block]
            extended = model.denoise(block_of_noisy, theta[:, block], caches[0])
            appended = model.denoise(
                block_of_noisy, theta[:, block], caches[1], None, *before[:1], clean_theta=before[1]
            )
            for cached in (extended, appended):
                assert_near(cached, result, what=f"block {block}")
            model.extend(caches[0], given, clean_theta=of_given)
            before = given, of_given
        model.extend(caches[1], *before[:1], clean_theta=before[1])
        assert caches[0].blocks == caches[1].blocks


@torch.no_grad()
def reference_rollout(model: GPDiT, context: Tensor, frames: int, angle: float) -> Tensor:
    """Each frame by forward passes of the oracle, whose context has noise in the generated frames."""
    weights, seen, result = model.state_dict(), context, []
    clean_theta = torch.zeros(len(context), context.shape[1], dtype=torch.float64)
    for frame in range(context.shape[1], context.shape[1] + frames):
        shape, seeds = context.shape[2:], range(len(context))
        x = torch.stack([frame_noise(seed, frame, shape) for seed in seeds]).double()
        angles = SAMPLER.angles(torch.float64).tolist()
        for theta, following in pairwise(angles):
            noisy = torch.cat((torch.zeros_like(seen), x[:, None]), dim=1)
            clean = torch.cat((seen, torch.zeros_like(x)[:, None]), dim=1)
            thetas = torch.full(noisy.shape[:2], theta, dtype=torch.float64)
            of_clean = torch.cat((clean_theta, torch.zeros(len(x), 1)), dim=1)
            v = oracle.forward(weights, model.config, noisy, thetas, clean, clean_theta=of_clean)[:, -1]
            x = math.cos(theta - following) * x - math.sin(theta - following) * v
        result.append(x)
        noise = torch.stack([frame_noise(seed, frame, shape, 0, ROLLOUT_CONTEXT_NOISE) for seed in seeds]).double()
        seen = torch.cat((seen, (math.cos(angle) * x + math.sin(angle) * noise)[:, None]), dim=1)
        clean_theta = torch.cat((clean_theta, torch.full((len(x), 1), angle, dtype=x.dtype)), dim=1)
    return torch.stack(result, dim=1)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize(("variant", "context_frames"), [("of2", 2), ("of", 1), ("of2", 0)])
def test_rollout_equals_reference(variant: str, context_frames: int, cached: bool) -> None:
    model = toy_model(attention=variant).eval()
    context = toy_batch(2, frames=context_frames + 1)[2][:, :context_frames]

    def generate(angle: float) -> Tensor:
        config = GenerationConfig(SAMPLER, use_cache=cached, context_noise=angle)
        return torch.stack(list(rollout(model, context, 4, config, ClipInputs(0))), dim=1)

    generated = generate(0.4)
    assert_near(generated, reference_rollout(model, context, 4, 0.4))
    assert torch.equal(generated[:, 0], generate(0.0)[:, 0])
    assert not torch.allclose(generated[:, 1], generate(0.0)[:, 1])


def test_a_window_drops_the_angles_of_its_frames() -> None:
    """Without a cache, as with one, once the window rolls."""
    model = toy_model(attention="of").eval()
    context = toy_batch(1, frames=2)[2]
    videos = [
        torch.stack(list(rollout(model, context, 6, GenerationConfig(SAMPLER, window=2, sinks=1, **options))))
        for options in ({"context_noise": 0.3}, {"context_noise": 0.3, "use_cache": False}, {})
    ]
    assert_near(videos[0], videos[1])
    assert not torch.allclose(videos[0], videos[2])


@pytest.mark.parametrize(
    ("overrides", "shape", "message"),
    [
        ({"time_conditioning": "adaln"}, (2, 4), "with time_conditioning adaln clean tokens receive no angle"),
        ({"time_conditioning": "embedding"}, (2, 4), "with time_conditioning embedding clean tokens receive no angle"),
        ({}, (2, 3), r"clean_theta has shape \(2, 3\); it must be \(clips, blocks of clean\) = \(2, 4\)"),
    ],
)
def test_refusals(overrides: dict[str, str], shape: tuple[int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        toy_model(**overrides)(*toy_batch(2), clean_theta=torch.zeros(shape))
