"""Computed bytes against those that autograd saves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.estimation.flops import PassShape
from gpdit_lightning.estimation.memory import (
    AUTOCAST,
    BF16,
    FLOAT32,
    PACKED,
    STRATEGIES,
    BytesPerValue,
    activation_bytes,
    held_bytes,
    parameter_count,
)
from gpdit_lightning.model.attention import flex, xformers_backends
from gpdit_lightning.model.attention.trial import saved_bytes
from gpdit_lightning.model.layout import count_blocks
from tests.estimation.memory_runs import LiveBytes, storages_of
from tests.model.attention.emulated import emulated_operators

Shape = tuple[int, int, int, int, int, int, tuple[int, ...] | None]

# B, B', F, h, w, K, positions of the noisy frames
SHAPES: list[Shape] = [
    (2, 2, 3, 16, 16, 1, None),
    (2, 1, 3, 16, 16, 2, None),
    (2, 0, 2, 16, 16, 1, None),
    (8, 0, 1, 16, 16, 1, None),
    (2, 2, 6, 16, 16, 1, (1, 3, 5)),
    (2, 1, 4, 16, 16, 2, (0, 2)),
    (2, 2, 3, 16, 16, 1, ()),  # the clean stream alone
]


class FusedNorm(torch.autograd.Function):
    """Saves the tensors of CUDA's kernel (_fused_rms_norm in torch's derivatives.yaml): input, weight, row scales."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed, weighted = (x * scale).to(x.dtype), gradient * weight
        input_gradient = (weighted - normed * (weighted * normed).mean(-1, keepdim=True)) * scale.to(x.dtype)
        return input_gradient, (gradient * normed).flatten(0, -2).sum(0), None


@pytest.fixture(autouse=True)
def use_fused_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: FusedNorm.apply(x, weight, eps))


def expected_bytes(config: GPDiTConfig, shape: Shape, precision: BytesPerValue) -> int:
    clips, context, frames, height, width, draws, noisy_frames = shape
    shape = PassShape(clips, context, frames, height, width, draws, noisy_frames)
    return activation_bytes(config, shape, precision)


def forward(config: GPDiTConfig, shape: Shape, precision: BytesPerValue) -> tuple[GPDiT, Callable[[], Tensor]]:
    clips, context, frames, height, width, draws, noisy_frames = shape
    noisy_count = frames if noisy_frames is None else len(noisy_frames)
    model = GPDiT(config).to(torch.float32 if precision.weight == 4 else torch.bfloat16)
    noisy = torch.randn(draws * clips, noisy_count, config.latent_channels, height, width)
    noisy_frames_or_all = range(frames) if noisy_frames is None else noisy_frames
    blocks = count_blocks(config, noisy_frames_or_all, height, width) if noisy_count else 0
    theta = torch.rand(draws * clips, blocks)
    clean = torch.randn(context, frames, config.latent_channels, height, width) if context else None

    def run() -> Tensor:
        # Without the cache, like Lightning's MixedPrecision.
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == AUTOCAST, cache_enabled=False):
            if clean is not None and not noisy_count:
                return model.features(clean, [config.layers])[config.layers]
            return model(noisy, theta, clean, draws=draws, frames=noisy_frames)

    return model, run


def bytes_saved_in_pass(config: GPDiTConfig, shape: Shape, precision: BytesPerValue) -> int:
    """Return the bytes that autograd saves in a forward pass, without parameters."""
    model, run = forward(config, shape, precision)
    return saved_bytes(run, model.parameters())


@pytest.mark.parametrize(
    ("shape", "precision", "variant", "checkpointing"),
    [
        (SHAPES[0], AUTOCAST, "of2", False),
        (SHAPES[1], AUTOCAST, "of", False),
        (SHAPES[2], AUTOCAST, "of2", True),
        (SHAPES[3], FLOAT32, "of2", False),
        (SHAPES[4], AUTOCAST, "of", False),
        (SHAPES[5], FLOAT32, "of", True),
        (SHAPES[0], BF16, "of2", False),
        (SHAPES[4], BF16, "of", True),
        (SHAPES[6], AUTOCAST, "of2", False),
        (SHAPES[6], FLOAT32, "of", True),
    ],
)
def test_bytes_saved_by_one_block(shape: Shape, precision: BytesPerValue, variant: str, checkpointing: bool) -> None:
    configs = [
        GPDiTConfig(size="tiny", layers=layers, attention=variant, activation_checkpointing=checkpointing)
        for layers in (2, 3)
    ]
    expected, measured = (
        count(configs[1], shape, precision) - count(configs[0], shape, precision)
        for count in (expected_bytes, bytes_saved_in_pass)
    )
    assert measured == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "fields",
    [
        {"width": 384, "heads": 4, "mlp_width": 768},
        {"time_site": "branch_inverse"},
        {"classes": 3},
        {"time_conditioning": "rotation_modulation"},
        {"time_conditioning": "embedding", "classes": 3},
    ],
)
@pytest.mark.parametrize("shape", [(2, 1, 3, 16, 12, 1, None), (2, 2, 6, 16, 12, 1, (1, 3, 5))])
def test_bytes_saved_by_one_block_of_other_architectures(shape: Shape, fields: dict[str, Any]) -> None:
    configs = [GPDiTConfig(size="tiny", layers=layers, **fields) for layers in (2, 3)]
    expected, measured = (
        count(configs[1], shape, AUTOCAST) - count(configs[0], shape, AUTOCAST)
        for count in (expected_bytes, bytes_saved_in_pass)
    )
    assert measured == pytest.approx(expected, rel=0.01)


# Fields of the configuration, and a pass. (Of a single clip, factorized attention copies less.)
LAYOUTS: list[tuple[dict[str, Any], Shape]] = [
    ({"block_shape": (2, 0, 0)}, (2, 1, 4, 16, 12, 2, None)),
    ({"block_shape": (2, 0, 0), "first_block_frames": 1}, (3, 2, 5, 16, 12, 1, (1, 2))),
    ({"block_shape": (1, 4, 3), "patch_size": 1}, (2, 2, 1, 8, 9, 1, None)),
    ({"block_shape": (0, 0, 0)}, (2, 2, 3, 16, 12, 1, None)),
    ({"block_shape": (3, 0, 0), "causal_in_block": True}, (2, 1, 6, 16, 12, 1, None)),
    ({"block_shape": (2, 0, 0), "factorized": True}, (3, 2, 6, 16, 12, 2, None)),
    ({"block_shape": (3, 0, 0), "factorized": True, "causal_in_block": True}, (2, 2, 6, 16, 12, 1, None)),
]


@pytest.mark.parametrize("precision", [AUTOCAST, BF16, FLOAT32], ids=["autocast", "bf16", "float32"])
@pytest.mark.parametrize("time", [{}, {"time_conditioning": "adaln"}], ids=["rotation", "adaln"])
@pytest.mark.parametrize(("fields", "shape"), LAYOUTS, ids=str)
def test_bytes_saved_by_one_block_of_other_layouts(
    fields: dict[str, Any], shape: Shape, time: dict[str, Any], precision: BytesPerValue
) -> None:
    configs = [GPDiTConfig(size="tiny", layers=layers, **fields, **time) for layers in (2, 3)]
    expected, measured = (
        count(configs[1], shape, precision) - count(configs[0], shape, precision)
        for count in (expected_bytes, bytes_saved_in_pass)
    )
    assert measured == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("shape", "precision", "fields", "checkpointing"),
    [
        (SHAPES[0], AUTOCAST, {}, False),
        (SHAPES[1], AUTOCAST, {"classes": 10}, False),
        (SHAPES[2], AUTOCAST, {}, True),
        (SHAPES[3], FLOAT32, {"classes": 10}, False),
        (SHAPES[4], FLOAT32, {}, True),
        (SHAPES[5], AUTOCAST, {}, False),
        (SHAPES[0], BF16, {}, True),
        (SHAPES[4], BF16, {"classes": 10}, False),
        (SHAPES[6], AUTOCAST, {}, False),
        (SHAPES[6], FLOAT32, {}, True),
        ((2, 2, 4, 16, 16, 1, None), AUTOCAST, {"block_shape": (2, 0, 0), "time_conditioning": "adaln"}, False),
        ((2, 2, 1, 16, 16, 1, None), BF16, {"block_shape": (1, 4, 4), "time_conditioning": "adaln"}, True),
        ((2, 2, 6, 16, 16, 1, None), FLOAT32, {"block_shape": (3, 0, 0), "causal_in_block": True}, False),
        ((2, 2, 6, 16, 16, 1, None), AUTOCAST, {"block_shape": (3, 0, 0), "factorized": True}, False),
    ],
)
def test_peak_of_forward_and_backward(
    shape: Shape, precision: BytesPerValue, fields: dict[str, Any], checkpointing: bool
) -> None:
    """Of the second micro-batch, whose gradients are added to those of the first."""
    config = GPDiTConfig(size="tiny", activation_checkpointing=checkpointing, **fields)
    model, run = forward(config, shape, precision)
    run().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with LiveBytes(storages_of([*model.parameters(), *gradients])) as live:
        run().sum().backward()
    assert live.peak - live.before == pytest.approx(expected_bytes(config, shape, precision), rel=0.08)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"classes": 101},
        {"text_width": 77},
        {"time_conditioning": "adaln", "patch_size": 1},
        {"time_conditioning": "adaln", "classes": 101, "factorized": True},
        {"time_conditioning": "rotation_modulation", "classes": 101, "factorized": True},
        {"time_conditioning": "embedding", "classes": 101},
        {"factorized": True, "block_shape": (4, 0, 0), "latent_channels": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", ["tiny", "B", "H"])
def test_parameter_count(size: str, fields: dict[str, Any]) -> None:
    config = GPDiTConfig.preset(size, **fields)
    with torch.device("meta"):
        model = GPDiT(config)
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())


def test_bytes_per_parameter_of_each_strategy() -> None:
    """ZeRO (arXiv:1910.02054, section 3): each stage divides more of 16 bytes per parameter by the number of ranks."""
    config, ranks = GPDiTConfig.preset("H"), 64
    count = parameter_count(config)
    held = {s.option: held_bytes(config, s, BF16, ranks) for s in STRATEGIES}
    names = ("weights", "gradients", "optimizer")
    total = {option: sum(parts[name] for name in names) / count for option, parts in held.items()}
    assert total["zero2"] == pytest.approx(2 + 16 / ranks)  # gradients are accumulated in float32
    assert total["zero3"] == pytest.approx(18 / ranks)
    assert total["fsdp2"] == pytest.approx(16 / ranks)
    assert held["zero3_offload"]["host_memory"] == pytest.approx((18 + 4) / ranks * count)
    assert held["zero2_offload"]["weights"] == 2 * count


class SavingAttention(torch.autograd.Function):
    """Saves what the kernel of FlexAttention does: query, key, value, result, and a number per row and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows_dim: int) -> Tensor:
        output, rows = query.clone(), query.select(-1, 0).float().contiguous()
        ctx.save_for_backward(query, key, value, output, rows)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise AssertionError("only the saved tensors are counted")


@pytest.mark.parametrize("backend", PACKED)
@pytest.mark.parametrize(
    ("shape", "fields"),
    [
        (SHAPES[1], {}),
        (SHAPES[5], {"attention": "of"}),
        (SHAPES[6], {}),
        (SHAPES[0], {"factorized": True}),
        (SHAPES[1], {"block_shape": (3, 0, 0), "causal_in_block": True}),
    ],
)
def test_backends_of_whole_layers_save_their_copies(backend: str, shape: Shape, fields: dict[str, Any]) -> None:
    with emulated_operators(), pytest.MonkeyPatch.context() as patch:
        saving = lambda query, key, value, **_: SavingAttention.apply(query, key, value, 1)  # noqa: E731
        patch.setattr(xformers_backends, "load_xformers_operator", lambda: saving)
        patch.setattr(flex, "load_flex_attention", lambda _: saving)
        configs = [GPDiTConfig(size="tiny", layers=layers, attention_backend=backend, **fields) for layers in (2, 3)]
        expected, measured = (
            count(configs[1], shape, AUTOCAST) - count(configs[0], shape, AUTOCAST)
            for count in (expected_bytes, bytes_saved_in_pass)
        )
    assert measured == pytest.approx(expected, rel=0.01)
