"""Any blocks and time conditioning, against a dense float64 reference: outputs, gradients, causality, caches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.errors import InputError
from gpdit_lightning.estimation.memory import parameter_count
from gpdit_lightning.model.layout import BlockLayout, ClipBlocks
from tests.model import block_oracle, oracle
from tests.model.attention.emulated import PLAN_BACKENDS, emulated_operators
from tests.model.test_oracle import gradients, named
from tests.model.toys import assert_near, toy_batch, toy_config, toy_model

VARIANTS = ("of2", "of")
# Fields of the configuration, and frames, height and width of the clips.
LAYOUTS: list[tuple[dict[str, Any], tuple[int, int, int]]] = [
    ({"block_shape": (1, 0, 0)}, (3, 4, 6)),
    ({"block_shape": (2, 0, 0)}, (4, 4, 6)),
    ({"block_shape": (2, 0, 0), "first_block_frames": 1}, (5, 4, 4)),
    ({"block_shape": (1, 0, 0), "first_block_frames": 3}, (5, 2, 4)),
    ({"block_shape": (0, 0, 0)}, (3, 4, 6)),
    ({"block_shape": (0, 0, 0), "first_block_frames": 2}, (5, 4, 4)),
    ({"block_shape": (1, 2, 2)}, (1, 8, 12)),
    ({"block_shape": (2, 1, 2)}, (4, 4, 8)),
    ({"block_shape": (0, 2, 1)}, (2, 4, 4)),
    ({"block_shape": (1, 2, 3), "patch_size": 1}, (1, 4, 6)),
    ({"block_shape": (2, 0, 0), "causal_in_block": True}, (4, 4, 6)),
    ({"block_shape": (0, 0, 0), "first_block_frames": 2, "causal_in_block": True}, (5, 4, 4)),
    ({"block_shape": (2, 0, 0), "factorized": True}, (4, 4, 6)),
    ({"block_shape": (3, 0, 0), "first_block_frames": 2, "factorized": True, "causal_in_block": True}, (5, 4, 4)),
]
TIMES: list[dict[str, Any]] = [{}, {"time_conditioning": "adaln"}]
# The other ones differ in what is done to noisy tokens: layouts with blocks of one size and of several, and factorized.
OTHER_TIMES = [{"time_conditioning": name} for name in ("rotation_modulation", "embedding")]
CASES = [(*layout, time) for time in TIMES for layout in LAYOUTS]
CASES += [(*LAYOUTS[number], time) for time in OTHER_TIMES for number in (3, 6, 13)]
LABELS = torch.tensor([2, -1, 0])


def batch_of(model: GPDiT, size: tuple[int, int, int], clips: int, context_clips: int) -> tuple[Tensor, Tensor, Tensor]:
    frames, height, width = size
    noisy, _, clean = toy_batch(clips, context_clips, frames, height, width)
    blocks = model.layout(height, width).count(frames)
    theta = torch.rand(clips, blocks, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 1.5
    return noisy, theta, clean


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("fields", "size", "time"), CASES, ids=str)
def test_outputs_and_gradients(
    fields: dict[str, Any], size: tuple[int, int, int], variant: str, time: dict[str, Any]
) -> None:
    """Two noisy copies of a clip with context, and a clip without, with labels where they are possible."""
    classes = 0 if fields.get("factorized") and not time else 3
    model = toy_model(attention=variant, layers=2, width=24, heads=2, mlp_width=20, classes=classes, **fields, **time)
    condition = LABELS if classes else None
    batch = named(*batch_of(model, size, clips=3, context_clips=1))
    parameters = dict(model.named_parameters())

    def library(noisy: Tensor, theta: Tensor, clean: Tensor) -> Tensor:
        return model(noisy, theta, clean, condition, 2)

    def reference(noisy: Tensor, theta: Tensor, clean: Tensor) -> Tensor:
        return block_oracle.forward(parameters, model.config, noisy, theta, clean, 2, condition)

    def run(forward: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
        leaves = {name: value.clone().requires_grad_() for name, value in batch.items()}
        output = forward(**leaves)
        return output, gradients(output, leaves | parameters)

    expected, expected_grads = run(reference)
    assert expected.std() > 0.1
    config = model.config
    with emulated_operators():
        for backend in ("sdpa", *PLAN_BACKENDS) if time == {} else ("sdpa",):  # attention is the same with others
            model.config = config.replaced(attention_backend=backend)
            output, grads = run(library)
            assert_near(output, expected, what=f"output of {backend}")
            for name, gradient in grads.items():
                assert_near(gradient, expected_grads[name], what=f"gradient of {name} by {backend}")


def test_frames_are_the_default() -> None:
    """The two references agree."""
    model = toy_model(classes=3)
    noisy, theta, clean = toy_batch(3, 2)
    expected = oracle.forward(model.state_dict(), model.config, noisy, theta, clean, 1, LABELS)
    assert_near(block_oracle.forward(model.state_dict(), model.config, noisy, theta, clean, 1, LABELS), expected)


@pytest.mark.parametrize("time", TIMES, ids=["rotation", "adaln"])
@pytest.mark.parametrize(("fields", "size"), LAYOUTS, ids=str)
def test_a_noisy_block_depends_on_earlier_clean_blocks_alone(
    fields: dict[str, Any], size: tuple[int, int, int], time: dict[str, Any]
) -> None:
    """Exactly: a changed block changes no output that may not depend on it."""
    model = toy_model(layers=3, **fields, **time)
    noisy, theta, clean = batch_of(model, size, 1, 1)
    clip = ClipBlocks.of(model.config, range(size[0]), *size[1:])
    with torch.no_grad():
        before = model(noisy, theta, clean)
        for changed in clip.blocks:
            weights = torch.zeros_like(theta)
            weights[0, changed] = 1.0
            change = clip.spread(weights).expand_as(clean)
            differences = clip.mean((model(noisy, theta, clean + change) - before).abs())[0]
            assert [bool(difference > 0) for difference in differences] == [b > changed for b in clip.blocks]
            own = clip.mean((model(noisy + change, theta, clean) - before).abs())[0]
            assert [bool(difference > 0) for difference in own] == [b == changed for b in clip.blocks]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("fields", "size", "time"), CASES, ids=str)
def test_cached_blocks_equal_the_full_pass(
    fields: dict[str, Any], size: tuple[int, int, int], time: dict[str, Any], variant: str
) -> None:
    """`extend` and `denoise` block after block, and `denoise` that appends the block before in the same pass."""
    model = toy_model(attention=variant, layers=3, **fields, **time)
    noisy, theta, clean = batch_of(model, size, 2, 2)
    frames, height, width = size
    layout = model.layout(height, width)
    caches = [model.new_cache(2, frames, height, width) for _ in range(2)]
    with torch.no_grad():
        expected, before = model(noisy, theta, clean), None
        for block in range(layout.count(frames)):
            group = layout.group_of(block, frames)
            rows, columns = layout.parts[block % layout.blocks_per_group]
            part = (slice(None), slice(group.start, group.stop), slice(None), rows, columns)
            one_frame = layout.blocks_per_group == 1 and len(group) == 1
            given = noisy[part][:, 0] if one_frame else noisy[part]
            for cache, appended in zip(caches, (None, before), strict=True):
                result = model.denoise(given, theta[:, block], cache, clean=appended)
                assert result.shape == given.shape
                assert_near(result.view(noisy[part].shape), expected[part], what=f"block {block}")
            before = clean[part]
            model.extend(caches[0], before)
    if layout.blocks_per_group == 1:
        at_once = model.new_cache(2, frames, height, width)
        model.extend(at_once, clean)
        assert_near(at_once._buffer, caches[0]._buffer)


@pytest.mark.parametrize("sinks", [0, 1, 3])
def test_a_rolling_cache_rolls_by_blocks(sinks: int) -> None:
    """A window of two blocks after the sinks equals a clip of the same frames with relative positions."""
    model = toy_model(layers=1, block_shape=(2, 0, 0), first_block_frames=1 if sinks else 0)
    first = 1 if sinks else 2
    frames = first + 2 * 4
    noisy, _, clean = toy_batch(1, frames=frames)
    rolling = model.new_cache(1, sinks + 4, 4, 6, sinks)
    model.extend(rolling, clean)
    kept = torch.cat((clean[:, :sinks], clean[:, -4:]), dim=1)
    short = toy_model(layers=1, block_shape=(2, 0, 0), first_block_frames=(1 if sinks else 0))
    fresh = short.new_cache(1, sinks + 4, 4, 6)
    short.extend(fresh, kept)
    theta = noisy.new_ones(1)
    assert_near(model.denoise(noisy[:, -2:], theta, rolling), short.denoise(noisy[:, -2:], theta, fresh))


@pytest.mark.parametrize(("fields", "size"), LAYOUTS, ids=str)
def test_features_are_in_the_order_of_frames(fields: dict[str, Any], size: tuple[int, int, int]) -> None:
    """Layer 0 is the patch embedding, which has no blocks."""
    model = toy_model(**fields)
    _, _, clean = batch_of(model, size, 1, 2)
    plain = toy_model(toy_config(patch_size=model.config.patch_size)).features(clean, [0])[0]
    assert_near(model.features(clean, [0])[0], plain)
    assert model.features(clean, [2])[2].shape == plain.shape


def test_one_block_has_no_clean_stream() -> None:
    """Full-sequence diffusion: the clean clip has no effect, with and without first_block_frames."""
    model = toy_model(block_shape=(0, 0, 0))
    noisy, theta, clean = batch_of(model, (3, 4, 6), 2, 2)
    assert torch.equal(model(noisy, theta, clean), model(noisy, theta))
    continuation = toy_model(block_shape=(0, 0, 0), first_block_frames=2)
    noisy, theta, clean = batch_of(continuation, (5, 4, 4), 2, 2)
    alone = continuation(noisy[:, 2:], theta[:, 1:], clean, frames=(2, 3, 4))
    assert_near(alone, continuation(noisy, theta, clean)[:, 2:])


@pytest.mark.parametrize(("fields", "size"), LAYOUTS, ids=str)
def test_last_blocks_need_the_frames_of_earlier_blocks_only(fields: dict[str, Any], size: tuple[int, int, int]) -> None:
    model = toy_model(**fields)
    noisy, theta, clean = batch_of(model, size, 2, 1)
    layout, frames = model.layout(*size[1:]), size[0]
    last, blocks = layout.last_group(frames), layout.blocks_per_group
    least = frames if blocks > 1 else last.start
    whole = model(noisy, theta, clean)[:, last.start :]
    noisy, theta = noisy[:, last.start :], theta[:, -blocks:]
    assert_near(model(noisy, theta, clean[:, :least], frames=tuple(last)), whole)
    if least:
        with pytest.raises(InputError, match=f"clean has {least - 1} frames, but the blocks before .* have {least}:"):
            model(noisy, theta, clean[:, : least - 1], frames=tuple(last))


@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [
        ({"block_shape": (2, 0, 0)}, (3, 4, 6), "contain only a part of a block"),
        ({"block_shape": (2, 0, 0), "first_block_frames": 3}, (2, 4, 6), "contain only a part of a block"),
        ({"block_shape": (1, 2, 2)}, (1, 4, 6), "do not divide into the blocks of 2x2 tokens"),
    ],
)
def test_clips_that_do_not_divide_are_refused(fields: dict[str, Any], size: tuple[int, int, int], message: str) -> None:
    model = toy_model(**fields)
    frames, height, width = size
    noisy, theta, clean = toy_batch(1, 1, frames, height, width)
    with pytest.raises(InputError, match=message):
        model(noisy, theta, clean)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_shape": (1, 2)}, "block_shape is .* three numbers"),
        ({"block_shape": (1, -2, 0)}, "block_shape is .* three numbers"),
        ({"first_block_frames": -1}, "first_block_frames is -1"),
        ({"block_shape": (1, 2, 2), "factorized": True}, "factorized must not be set, since block_shape"),
        ({"factorized": True, "classes": 3}, "factorized attention takes no condition as tokens"),
        ({"time_conditioning": "adaln", "time_site": "input"}, "time_site is input"),
        ({"time_conditioning": "embedding", "time_site": "none"}, "time_conditioning is embedding"),
        ({"target": "x0"}, "target 'x0' is not known: choose one of velocity, epsilon"),
    ],
)
def test_contradicting_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        toy_config(**fields)


@pytest.mark.parametrize(
    ("fields", "frames", "sinks", "message"),
    [
        ({"block_shape": (1, 2, 2)}, 3, 0, "a rolling cache needs blocks of a number of whole frames"),
        ({"block_shape": (0, 0, 0)}, 3, 0, "a rolling cache needs blocks of a number of whole frames"),
        ({"block_shape": (2, 0, 0)}, 3, 0, "would cut blocks of 2 frames"),
        ({"block_shape": (2, 0, 0)}, 5, 1, "would cut blocks of 2 frames"),
        ({"block_shape": (2, 0, 0), "first_block_frames": 1}, 4, 0, "would cut blocks of 2 frames"),
    ],
)
def test_windows_that_cut_blocks_are_refused(fields: dict[str, Any], frames: int, sinks: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        toy_model(**fields).new_cache(1, frames, 8, 8, sinks)


@pytest.mark.parametrize(("name", "millions"), [("b", 132), ("l", 460), ("xl", 677), ("h", 954)])
def test_sizes_of_acdit(name: str, millions: float) -> None:
    """ACDiT, Table 1."""
    config = GPDiTConfig.preset(f"acdit-{name}")
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in GPDiT(config).parameters())
    assert parameters == parameter_count(config)
    assert parameters / 1e6 == pytest.approx(millions, rel=0.02)
    assert BlockLayout.of(config, 32, 32).count(1) == 4


@pytest.mark.parametrize("name", ["adaln", "rotation_modulation", "embedding"])
def test_theta_has_no_effect_at_the_beginning(name: str) -> None:
    """With zero gates no branch changes a noisy token either; after a step every weight has a gradient."""
    torch.manual_seed(0)
    model = GPDiT(toy_config(time_conditioning=name)).double()
    torch.nn.init.normal_(model.output.weight)
    noisy, theta, clean = toy_batch(2, frames=3)
    assert torch.equal(model(noisy, theta, clean), model(noisy, theta / 2, clean))
    assert torch.equal(model(noisy, theta, clean), model(noisy, theta, clean + 1)) == (name != "embedding")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(noisy, theta, clean).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert not torch.equal(model(noisy, theta, clean), model(noisy, theta / 2, clean))
