"""Computed FLOPs against torch's counter of executed products."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gpdit_lightning.estimation.flops import (
    PassShape,
    attention_pairs,
    forward_flops,
    training_flops,
)
from gpdit_lightning.estimation.gpus import GPUS, peak_bf16_flops
from gpdit_lightning.model import GPDiT, GPDiTConfig
from gpdit_lightning.model.classifier import Classifier, clean_stream_config
from gpdit_lightning.model.layout import count_blocks
from tests.model.block_oracle import Token, attends, tokens_of
from tests.model.test_blocks import LAYOUTS

ADALN = {"time_conditioning": "adaln", "classes": 10}

# Fields of the configuration, and a pass. The count is a polynomial; these cases contain each of its terms.
CASES: list[tuple[dict[str, Any], PassShape]] = [
    ({"attention": "of2"}, PassShape(2, 2, 5, 24, 40)),
    ({"attention": "of"}, PassShape(2, 2, 5, 24, 40)),
    ({"attention": "of2", "size": "B"}, PassShape(3, 1, 5, 8, 12)),
    ({"attention": "of", "size": "H"}, PassShape(2, 0, 5, 8, 12)),
    ({"attention": "of"}, PassShape(2, 2, 1, 8, 12)),
    ({"attention": "of2"}, PassShape(3, 1, 2, 8, 12, draws=3)),
    ({"attention": "of2", "classes": 10}, PassShape(3, 1, 5, 8, 12, draws=2)),
    ({"attention": "of", "classes": 10, "layers": 1}, PassShape(2, 2, 5, 8, 12, draws=2)),
    ({"attention": "of2"}, PassShape(3, 1, 6, 8, 12, draws=2, noisy_frames=(1, 3, 5))),
    ({"attention": "of", "classes": 10}, PassShape(2, 2, 6, 8, 12, draws=2, noisy_frames=(0, 2))),
    ({"attention": "of2"}, PassShape(2, 0, 6, 8, 12, noisy_frames=(5,))),
    ({"patch_size": 4, "latent_channels": 3, "mlp_width": 100}, PassShape(3, 2, 3, 8, 12)),
    # Blocks of several frames, squares, one block; adaLN with labels; some noisy blocks.
    ({"block_shape": (2, 0, 0), "classes": 10}, PassShape(3, 1, 6, 8, 12, draws=2)),
    ({"block_shape": (2, 0, 0), "first_block_frames": 1, "attention": "of"}, PassShape(3, 2, 7, 8, 12, 2, (0, 3, 4))),
    ({"block_shape": (2, 0, 0), "first_block_frames": 3, **ADALN}, PassShape(3, 2, 7, 8, 12, draws=2)),
    ({"block_shape": (1, 2, 3), "patch_size": 1, **ADALN}, PassShape(3, 2, 1, 4, 6, draws=2)),
    ({"time_conditioning": "rotation_modulation", "factorized": True}, PassShape(3, 2, 3, 8, 12)),
    ({"time_conditioning": "embedding", "classes": 10}, PassShape(3, 2, 3, 8, 12, draws=2)),
    ({"block_shape": (2, 1, 2), "attention": "of"}, PassShape(3, 2, 4, 8, 12, noisy_frames=(2, 3))),
    ({"block_shape": (0, 0, 0)}, PassShape(3, 2, 5, 8, 12)),
    ({"block_shape": (0, 0, 0), "first_block_frames": 2, **ADALN}, PassShape(2, 2, 5, 8, 12, noisy_frames=(2, 3, 4))),
    ({"block_shape": (3, 0, 0), "causal_in_block": True, "attention": "of"}, PassShape(3, 2, 6, 8, 12, draws=2)),
    ({"block_shape": (3, 0, 0), "causal_in_block": True, "classes": 10}, PassShape(3, 2, 6, 8, 12)),
    ({"block_shape": (2, 0, 0), "factorized": True}, PassShape(3, 2, 6, 8, 12, 2, (2, 3))),
    (
        {"block_shape": (3, 0, 0), "first_block_frames": 2, "factorized": True, "causal_in_block": True, **ADALN},
        PassShape(3, 1, 5, 8, 12),
    ),
]


def meta_batch(config: GPDiTConfig, shape: PassShape) -> list[Tensor]:
    """Return the inputs noisy, theta and clean of a pass, without memory."""
    rows, noisy = shape.draws * shape.clips, len(shape.noisy)
    blocks = count_blocks(config, shape.noisy, shape.height, shape.width)

    def latents(*sizes: int) -> Tensor:
        sizes = (*sizes, config.latent_channels, shape.height, shape.width)
        return torch.zeros(sizes, device="meta", requires_grad=True)

    theta = torch.zeros(rows, blocks, device="meta", requires_grad=True)
    return [latents(rows, noisy), theta, latents(shape.context_clips, shape.frames)]


def run(model: GPDiT, shape: PassShape, labels: Tensor | None = None) -> Tensor:
    frames = None if shape.noisy_frames is None else tuple(shape.noisy_frames)
    return model(*meta_batch(model.config, shape), labels, draws=shape.draws, frames=frames)


def measured(config: GPDiTConfig, call: Callable[[GPDiT], Any]) -> dict[str, int]:
    """Count the FLOPs of a call by the parts of `forward_flops`: bmm for attention products, the others by module."""
    with torch.device("meta"):
        model = GPDiT(config)
    counter = FlopCounterMode(display=False, depth=10)
    with sdpa_kernel(SDPBackend.MATH), counter:
        call(model)
    modules = {name: Counter(ops) for name, ops in counter.get_flop_counts().items()}

    def linear(name: str) -> int:
        ops = modules.get(f"GPDiT.{name}", Counter())
        return ops[torch.ops.aten.mm] + ops[torch.ops.aten.addmm]

    blocks = range(config.layers)
    projections = [
        f"{attention}{name}" for attention in ("", "spatial.") for name in ("query", "key_value", "attention_output")
    ]
    parts = {
        "embedding": linear("patch_embedding"),
        "attention_projections": sum(linear(f"blocks.{layer}.{name}") for layer in blocks for name in projections),
        "attention_products": modules["Global"][torch.ops.aten.bmm],
        "mlp": sum(linear(f"blocks.{layer}.mlp") for layer in blocks),
        "output": linear("output"),
    }
    if config.time_conditioning != "rotation":
        names = ["time_embedding", "output_modulation", *(f"blocks.{layer}.modulation" for layer in blocks)]
        parts["modulation"] = sum(map(linear, names))
    assert sum(parts.values()) == counter.get_total_flops()  # the parts are complete
    return parts


@pytest.mark.parametrize(("fields", "shape"), CASES, ids=str)
def test_forward_flops_by_part(fields: dict[str, Any], shape: PassShape) -> None:
    config = GPDiTConfig(**{"size": "tiny", "layers": 3} | fields)
    assert measured(config, lambda model: run(model, shape)) == forward_flops(config, shape)
    if config.classes:  # without labels, each row has a token for no label instead, at the same cost
        labels = torch.zeros(shape.draws * shape.clips, device="meta", dtype=torch.int64)
        assert measured(config, lambda model: run(model, shape, labels)) == forward_flops(config, shape)


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({"attention": "of2"}, PassShape(3, 3, 5, 8, 12, noisy_frames=())),
        ({"attention": "of", "classes": 10}, PassShape(3, 3, 2, 8, 12, noisy_frames=())),
        ({"block_shape": (1, 2, 3), "patch_size": 1}, PassShape(2, 2, 1, 4, 6, noisy_frames=())),
        (
            {"block_shape": (3, 0, 0), "first_block_frames": 2, "factorized": True, "causal_in_block": True},
            PassShape(3, 3, 5, 8, 12, noisy_frames=()),
        ),
    ],
    ids=str,
)
def test_flops_of_the_clean_stream_alone(fields: dict[str, Any], shape: PassShape) -> None:
    """Those of a classifier, without its output layer."""
    config = clean_stream_config(GPDiTConfig(**{"size": "tiny", "layers": 3} | fields))
    clean = meta_batch(config, PassShape(shape.clips, shape.clips, shape.frames, shape.height, shape.width))[2]
    counter = FlopCounterMode(display=False)
    with torch.device("meta"):
        model = Classifier(config, classes=7)
    with sdpa_kernel(SDPBackend.MATH), counter:
        model(clean)
    of_output = 2 * shape.clips * config.width * 7
    assert counter.get_total_flops() - of_output == sum(forward_flops(config, shape).values())


@pytest.mark.parametrize("variant", ["of2", "of"])
@pytest.mark.parametrize(("fields", "size"), LAYOUTS, ids=str)
def test_no_masked_product_is_counted(fields: dict[str, Any], size: tuple[int, int, int], variant: str) -> None:
    """The pairs are those that the mask allows, token by token; with factorized attention at each place of a frame."""
    config = GPDiTConfig(size="tiny", attention=variant, **fields)
    frames, rows, columns = size[0], size[1] // config.patch_size, size[2] // config.patch_size
    streams = {name: tokens_of(config, name, frames, rows, columns) for name in ("clean", "noisy")}
    last = max(token.block for token in streams["clean"])  # no block attends to it, so it is not computed
    streams["clean"] = [token for token in streams["clean"] if token.block < last]

    def counts(query: Token, key: Token) -> bool:
        return attends(config, query, key) and not (config.factorized and query.place[1:] != key.place[1:])

    keys = [key for stream in streams.values() for key in stream]
    allowed = [sum(counts(query, key) for query in stream for key in keys) for stream in streams.values()]
    assert list(attention_pairs(config, PassShape(1, 1, *size))) == allowed


@pytest.mark.parametrize(("fields", "shape"), [CASES[2], CASES[9], CASES[14], CASES[-1]], ids=str)
def test_training_flops_are_three_times_the_forward_flops(fields: dict[str, Any], shape: PassShape) -> None:
    """Exactly, if the gradient of the latents is computed too."""
    config = GPDiTConfig(**{"size": "tiny", "layers": 3} | fields)
    counter = FlopCounterMode(display=False)
    with torch.device("meta"):
        model = GPDiT(config)
    with sdpa_kernel(SDPBackend.MATH), counter:
        run(model, shape).sum().backward()
    assert counter.get_total_flops() == sum(training_flops(config, shape).values())
    assert training_flops(config, shape).keys() == forward_flops(config, shape).keys()


def test_flops_saved_by_a_loss_on_targets() -> None:
    """For three pairs: five clean and three noisy frames instead of five and six."""
    everything, targets = (
        sum(forward_flops(GPDiTConfig.preset("H"), PassShape(4, 4, 6, 32, 32, noisy_frames=frames)).values())
        for frames in (None, (1, 3, 5))
    )
    assert targets / everything == pytest.approx(8 / 11, abs=0.01)


@pytest.mark.parametrize(("draws", "saved"), [(2, 0.22), (4, 0.33)])
def test_flops_saved_by_sharing_the_clean_stream(draws: int, saved: float) -> None:
    """Per supervised frame of H at five frames: (4 / K + 5) / 5 clean and noisy frames instead of 9/5."""
    config = GPDiTConfig.preset("H")
    once, several = (sum(forward_flops(config, PassShape(4, 4, 5, 24, 40, k)).values()) / k for k in (1, draws))
    assert 1 - several / once == pytest.approx(saved, abs=0.01)


def test_attention_products_are_a_small_part_of_h_at_five_frames() -> None:
    """A few per cent at 240 tokens per frame, as the documentation states."""
    flops = forward_flops(GPDiTConfig.preset("H"), PassShape(4, 4, frames=5, height=24, width=40))
    assert 0.02 < flops["attention_products"] / sum(flops.values()) < 0.08


@pytest.mark.parametrize(
    ("size", "frames", "side", "of_all", "of_attention"),
    [
        ("H", 5, (24, 40), 0.009, 0.23),
        ("H", 12, (24, 40), 0.030, 0.37),
        ("B", 5, (32, 32), 0.030, 0.23),
    ],
)
def test_flops_saved_by_lightweight_attention(
    size: str, frames: int, side: tuple[int, int], of_all: float, of_attention: float
) -> None:
    """The fractions that the recipes and documents state where they offer `of`."""
    of2, of = (
        training_flops(GPDiTConfig.preset(size, attention=variant), PassShape(4, 4, frames, *side))
        for variant in ("of2", "of")
    )
    assert 1 - sum(of.values()) / sum(of2.values()) == pytest.approx(of_all, abs=5e-4)
    assert 1 - of["attention_products"] / of2["attention_products"] == pytest.approx(of_attention, abs=5e-3)


# Dense TFLOP/s of the data sheets by the names that PyTorch reports. Twice as much would be the sparse figure.
PEAKS = {
    "NVIDIA GB200": 2500,
    "NVIDIA B200": 2250,
    "NVIDIA GH200 480GB": 989,
    "NVIDIA H200": 989,
    "NVIDIA H200 NVL": 835,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H800": 989,
    "NVIDIA H800 PCIe": 756,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A800-SXM4-80GB": 312,
    "NVIDIA A40": 150,
    "NVIDIA A30": 165,
    "NVIDIA A10": 125,
    "NVIDIA L40S": 362,
    "NVIDIA L40": 181,
    "NVIDIA L4": 121,
    "NVIDIA RTX 6000 Ada Generation": 364,
    "NVIDIA RTX A6000": 155,
    "NVIDIA GeForce RTX 5090": 209.5,
    "NVIDIA GeForce RTX 4090": 165,
    "NVIDIA GeForce RTX 3090": 71,
    "AMD Instinct MI325X": 1307,
    "AMD Instinct MI300X": 1307,
    "AMD Instinct MI300X VF": 1307,
}
UNKNOWN = (
    *("NVIDIA A10G", "NVIDIA RTX A1000", "Tesla V100-SXM2-16GB", "cpu"),
    *("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti"),
    *("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100 80GB HBM3 MIG 3g.40gb"),
)


def test_the_peak_of_a_device_is_the_dense_one() -> None:
    assert {name: peak_bf16_flops(name) for name in PEAKS} == {name: peak * 1e12 for name, peak in PEAKS.items()}
    assert {name: peak_bf16_flops(name) for name in UNKNOWN} == dict.fromkeys(UNKNOWN)


def test_every_peak_of_the_table_is_tested() -> None:
    assert {peak_bf16_flops(name) for name in (gpu.name for gpu in GPUS)} == {peak * 1e12 for peak in PEAKS.values()}
    words = [set(re.split(r"[^a-z0-9]+", name.lower())) for name in PEAKS]
    assert all(any(set(name.lower().split()) <= device for device in words) for name in (gpu.name for gpu in GPUS))
