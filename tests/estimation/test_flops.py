"""The analytic count against torch's counter, over the products as they run."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gpdit_lightning.estimation.flops import PassShape, forward_flops, peak_bf16_flops, training_flops
from gpdit_lightning.model import GPDiT, GPDiTConfig

CONTEXTS = [(2, 2), (3, 1), (2, 0)]


def meta_batch(
    config: GPDiTConfig,
    clips: int,
    context_clips: int,
    frames: int,
    height: int,
    width: int,
    draws: int = 1,
    noisy_frames: Sequence[int] | None = None,
) -> list[Tensor]:
    rows, noisy = draws * clips, frames if noisy_frames is None else len(noisy_frames)

    def latents(*shape: int) -> Tensor:
        return torch.zeros(*shape, config.latent_channels, height, width, device="meta", requires_grad=True)

    theta = torch.zeros(rows, noisy, device="meta", requires_grad=True)
    return [latents(rows, noisy), theta, latents(context_clips, frames)]


def measured(config: GPDiTConfig, run: Callable[[GPDiT], Any]) -> dict[str, int]:
    """FLOPs of `run` by the parts of `forward_flops`: attention products are bmm, the rest by module."""
    with torch.device("meta"):
        model = GPDiT(config)
    counter = FlopCounterMode(display=False, depth=10)
    with sdpa_kernel(SDPBackend.MATH), counter:
        run(model)
    modules = {name: Counter(ops) for name, ops in counter.get_flop_counts().items()}

    def linear(name: str) -> int:
        ops = modules.get(f"GPDiT.{name}", Counter())
        return ops[torch.ops.aten.mm] + ops[torch.ops.aten.addmm]

    blocks = range(config.layers)
    projections = ("query", "key_value", "attention_output")
    parts = {
        "embedding": linear("patch_embedding"),
        "attention_projections": sum(linear(f"blocks.{layer}.{name}") for layer in blocks for name in projections),
        "attention_products": modules["Global"][torch.ops.aten.bmm],
        "mlp": sum(linear(f"blocks.{layer}.mlp") for layer in blocks),
        "output": linear("output"),
    }
    assert sum(parts.values()) == counter.get_total_flops()  # nothing escaped the parts
    return parts


@pytest.mark.parametrize("variant", ["of2", "of"])
@pytest.mark.parametrize("size", ["tiny", "B", "H"])
@pytest.mark.parametrize(("clips", "context_clips"), CONTEXTS)
def test_forward_by_part(variant: str, size: str, clips: int, context_clips: int) -> None:
    config = GPDiTConfig.preset(size, attention=variant, layers=3)
    shape = (clips, context_clips, 5, 24, 40)
    run = measured(config, lambda model: model(*meta_batch(config, *shape)))
    assert run == forward_flops(config, PassShape(*shape))


@pytest.mark.parametrize("variant", ["of2", "of"])
@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize(("clips", "context_clips"), CONTEXTS)
@pytest.mark.parametrize("draws", [2, 3])
def test_forward_of_noisy_copies(variant: str, frames: int, clips: int, context_clips: int, draws: int) -> None:
    config = GPDiTConfig.preset("tiny", attention=variant, layers=3)
    shape = (clips, context_clips, frames, 8, 12, draws)
    run = measured(config, lambda model: model(*meta_batch(config, *shape), draws=draws))
    assert run == forward_flops(config, PassShape(*shape))


@pytest.mark.parametrize("variant", ["of2", "of"])
@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize(("clips", "context_clips"), CONTEXTS)
@pytest.mark.parametrize("layers", [1, 3])
def test_forward_with_labels(variant: str, frames: int, clips: int, context_clips: int, layers: int) -> None:
    """Without any label the model says so with a token, which is as much work."""
    config = GPDiTConfig.preset("tiny", attention=variant, layers=layers, classes=10)
    shape = (clips, context_clips, frames, 8, 12, 2)
    labels = torch.zeros(2 * clips, device="meta", dtype=torch.int64)
    told = measured(config, lambda model: model(*meta_batch(config, *shape), labels, draws=2))
    untold = measured(config, lambda model: model(*meta_batch(config, *shape), draws=2))
    assert told == untold == forward_flops(config, PassShape(*shape))


@pytest.mark.parametrize("variant", ["of2", "of"])
@pytest.mark.parametrize("noisy_frames", [(1, 3, 5), (0, 2), (5,), (0,), (3, 4)], ids=str)
@pytest.mark.parametrize(("clips", "context_clips"), CONTEXTS)
@pytest.mark.parametrize("classes", [0, 10])
def test_forward_of_some_noisy_frames(
    variant: str, noisy_frames: tuple[int, ...], clips: int, context_clips: int, classes: int
) -> None:
    config = GPDiTConfig.preset("tiny", attention=variant, layers=3, classes=classes)
    shape = (clips, context_clips, 6, 8, 12, 2, noisy_frames)
    run = measured(config, lambda model: model(*meta_batch(config, *shape), draws=2, frames=noisy_frames))
    assert run == forward_flops(config, PassShape(*shape))


def test_targets_alone_save_the_noisy_sources() -> None:
    """Of three pairs: five clean and three noisy frames instead of five and six."""
    everything, targets = (
        sum(forward_flops(GPDiTConfig.preset("H"), PassShape(4, 4, 6, 32, 32, noisy_frames=frames)).values())
        for frames in (None, (1, 3, 5))
    )
    assert targets / everything == pytest.approx(8 / 11, abs=0.01)


@pytest.mark.parametrize(("draws", "saved"), [(2, 0.22), (4, 0.33)])
def test_copies_save_what_the_clean_stream_costs(draws: int, saved: float) -> None:
    """Per supervised frame of H at five frames: from 9/5 clean and noisy frames to (4 / K + 5) / 5."""
    config = GPDiTConfig.preset("H")
    once, several = (sum(forward_flops(config, PassShape(4, 4, 5, 24, 40, k)).values()) / k for k in (1, draws))
    assert several / once == pytest.approx(1 - saved, abs=0.01)


@pytest.mark.parametrize("frames", [1, 2, 12])
@pytest.mark.parametrize("fields", [{"patch_size": 1}, {"layers": 1}, {"latent_channels": 4, "mlp_width": 100}])
def test_forward_of_other_shapes(frames: int, fields: dict[str, int]) -> None:
    config = GPDiTConfig(**{"size": "tiny", "layers": 2, **fields})
    shape = (3, 2, frames, 6, 10)
    run = measured(config, lambda model: model(*meta_batch(config, *shape)))
    assert run == forward_flops(config, PassShape(*shape))


@pytest.mark.parametrize("variant", ["of2", "of"])
@pytest.mark.parametrize(("clips", "context_clips"), CONTEXTS)
@pytest.mark.parametrize("classes", [0, 10])
@pytest.mark.parametrize("noisy_frames", [None, (1, 3)], ids=str)
def test_training_is_three_forwards(
    variant: str, clips: int, context_clips: int, classes: int, noisy_frames: tuple[int, ...] | None
) -> None:
    """Exactly, when the latents ask for their gradient as well."""
    config = GPDiTConfig.preset("tiny", attention=variant, classes=classes)
    shape = (clips, context_clips, 4, 8, 12, 2, noisy_frames)
    counter = FlopCounterMode(display=False)
    with torch.device("meta"):
        model = GPDiT(config)
    with sdpa_kernel(SDPBackend.MATH), counter:
        model(*meta_batch(config, *shape), draws=2, frames=noisy_frames).sum().backward()
    assert counter.get_total_flops() == sum(training_flops(config, PassShape(*shape)).values())
    assert training_flops(config, PassShape(*shape)).keys() == forward_flops(config, PassShape(*shape)).keys()


def test_attention_is_a_small_part_of_h_at_five_frames() -> None:
    """The share that docs and design rest on: a few per cent at 240 tokens a frame."""
    flops = forward_flops(GPDiTConfig.preset("H"), PassShape(4, 4, frames=5, height=24, width=40))
    assert 0.02 < flops["attention_products"] / sum(flops.values()) < 0.08


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA L40S", 362e12),
        ("cpu", None),
    ],
)
def test_peak_by_device_name(name: str, peak: float | None) -> None:
    assert peak_bf16_flops(name) == peak
