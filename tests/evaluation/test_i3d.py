"""I3D compared with an independent implementation and with published distances."""

import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.i3d import I3D, ConvUnit, MaxPool, preprocess

# Carreira & Zisserman 2017, figure 3: input channels, then those of (1x1x1, 1x1x1 -> 3x3x3 twice, pool -> 1x1x1).
BLOCKS = {
    "Mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "Mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "Mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "Mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "Mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "Mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "Mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "Mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "Mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}


def units() -> Iterator[tuple[str, int, int, int]]:
    """Yield (name, kernel size, input channels, output channels) of every convolution with batch normalisation."""
    yield from (("Conv3d_1a_7x7", 7, 3, 64), ("Conv3d_2b_1x1", 1, 64, 64), ("Conv3d_2c_3x3", 3, 64, 192))
    for block, (channels, first, narrow1, wide1, narrow2, wide2, last) in BLOCKS.items():
        yield f"{block}.Branch_0.Conv3d_0a_1x1", 1, channels, first
        yield f"{block}.Branch_1.Conv3d_0a_1x1", 1, channels, narrow1
        yield f"{block}.Branch_1.Conv3d_0b_3x3", 3, narrow1, wide1
        yield f"{block}.Branch_2.Conv3d_0a_1x1", 1, channels, narrow2
        yield f"{block}.Branch_2.Conv3d_0b_3x3", 3, narrow2, wide2
        yield f"{block}.Branch_3.Conv3d_0b_1x1", 1, channels, last


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Random weights with the names and the layout of Flax."""
    torch.manual_seed(0)
    tensors = {}
    for name, size, channels, out_channels in units():
        gain = math.sqrt(2 / (channels * size**3))
        tensors[f"params.{name}.Conv_0.kernel"] = gain * torch.randn(size, size, size, channels, out_channels)
        tensors[f"params.{name}.BatchNorm_0.bias"] = 0.1 * torch.randn(out_channels)
        tensors[f"batch_stats.{name}.BatchNorm_0.mean"] = 0.1 * torch.randn(1, 1, 1, 1, out_channels)
        tensors[f"batch_stats.{name}.BatchNorm_0.var"] = 0.5 + torch.rand(1, 1, 1, 1, out_channels)
    tensors["params.Logits.Conv3d_0c_1x1.Conv_0.kernel"] = torch.randn(1, 1, 1, 1024, 400) / 32
    tensors["params.Logits.Conv3d_0c_1x1.Conv_0.bias"] = torch.randn(400)
    return tensors


@pytest.fixture(scope="module")
def weights_file(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("i3d") / "i3d.safetensors"
    save_file(weights, path)
    return path


def same_padding(length: int, size: int, stride: int) -> tuple[int, int]:
    """Return the padding at both ends of an axis, as TensorFlow documents "SAME"."""
    total = max(size - stride, 0) if length % stride == 0 else max(size - length % stride, 0)
    return total // 2, total - total // 2


def windows(x: Tensor, size: int, stride: int) -> Iterator[tuple[tuple[int, ...], Tensor, tuple[slice, ...]]]:
    """Yield for each output: its position, the part of x (C, T, H, W) in its window, and the slices that it fills."""
    outputs = [math.ceil(length / stride) for length in x.shape[1:]]
    for position in product(*map(range, outputs)):
        inside, filled = [], []
        for output, length in zip(position, x.shape[1:], strict=True):
            start = output * stride - same_padding(length, size, stride)[0]
            inside.append(slice(max(start, 0), min(start + size, length)))
            filled.append(slice(max(-start, 0), min(size, length - start)))
        yield position, x[:, *inside], tuple(filled)


@pytest.mark.parametrize(("size", "stride"), [(2, 2), (3, 1), (7, 2)])
def test_padding_is_that_of_tensorflow(size: int, stride: int) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 5, 8, 7, dtype=torch.float64)
    unit = ConvUnit(2, 3, size, stride).double().eval().requires_grad_(False)
    unit.weight.normal_()
    convolved, pooled = unit(x[None])[0], MaxPool(size, stride)(x[None])[0]
    assert convolved.shape[1:] == pooled.shape[1:] == tuple(math.ceil(length / stride) for length in x.shape[1:])
    for position, inside, filled in windows(x, size, stride):
        expected = (unit.weight[:, :, *filled] * inside).sum((1, 2, 3, 4)) / math.sqrt(1.001)
        torch.testing.assert_close(convolved[:, *position], expected.clamp(min=0))
        torch.testing.assert_close(pooled[:, *position], inside.amax((1, 2, 3)))


def reference(weights: dict[str, Tensor], values: Tensor) -> Tensor:
    """Return the features of float64 (B, 3, T, H, W) before average pooling, layer by layer as in the paper."""

    def pad(x: Tensor, size: tuple[int, ...], stride: tuple[int, ...], value: float) -> Tensor:
        edges = [same_padding(*axis) for axis in zip(x.shape[2:], size, stride, strict=True)]
        return F.pad(x, [edge for pair in reversed(edges) for edge in pair], value=value)

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel = weights[f"params.{name}.Conv_0.kernel"].double().permute(4, 3, 0, 1, 2)
        x = F.conv3d(pad(x, tuple(kernel.shape[2:]), (stride,) * 3, 0), kernel, stride=stride)
        keys = (f"{group}.{name}.BatchNorm_0" for group in ("batch_stats", "batch_stats", "params"))
        mean, var, bias = (
            weights[f"{key}.{part}"].double().view(-1, 1, 1, 1)
            for key, part in zip(keys, ("mean", "var", "bias"), strict=True)
        )
        return ((x - mean) / (var + 0.001).sqrt() + bias).clamp(min=0)

    def pool(x: Tensor, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        return F.max_pool3d(pad(x, size, stride, -1e9), size, stride)

    x = conv(values, "Conv3d_1a_7x7", 2)
    x = conv(conv(pool(x, (1, 3, 3), (1, 2, 2)), "Conv3d_2b_1x1"), "Conv3d_2c_3x3")
    x = pool(x, (1, 3, 3), (1, 2, 2))
    for block in BLOCKS:
        if block == "Mixed_4b":
            x = pool(x, (3, 3, 3), (2, 2, 2))
        if block == "Mixed_5b":
            x = pool(x, (2, 2, 2), (2, 2, 2))
        second, third = (
            conv(conv(x, f"{block}.Branch_{branch}.Conv3d_0a_1x1"), f"{block}.Branch_{branch}.Conv3d_0b_3x3")
            for branch in (1, 2)
        )
        last = conv(pool(x, (3, 3, 3), (1, 1, 1)), f"{block}.Branch_3.Conv3d_0b_1x1")
        x = torch.cat([conv(x, f"{block}.Branch_0.Conv3d_0a_1x1"), second, third, last], dim=1)
    return x


@pytest.mark.parametrize("size", [(10, 32, 32), (13, 35, 46)])
def test_layers_equal_an_independent_implementation(
    size: tuple[int, int, int], weights: dict[str, Tensor], weights_file: Path
) -> None:
    values = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = reference(weights, values)
    assert expected.std() > 0.1
    torch.testing.assert_close(I3D.from_safetensors(weights_file).double().layers(values), expected)


def test_logits_are_averaged_over_time(weights: dict[str, Tensor], weights_file: Path) -> None:
    video = torch.randint(0, 256, (1, 17, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    network = I3D.from_safetensors(weights_file)
    outputs: list[Tensor] = []
    network.layers.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    logits = network(video)
    assert outputs[0].shape == (1, 1024, 3, 7, 7)
    means = outputs[0].double().mean((3, 4))[0]
    kernel = weights["params.Logits.Conv3d_0c_1x1.Conv_0.kernel"].double()[0, 0, 0]
    bias = weights["params.Logits.Conv3d_0c_1x1.Conv_0.bias"].double()
    pair_logits = [(means[:, step] + means[:, step + 1]) / 2 @ kernel + bias for step in range(2)]
    torch.testing.assert_close(logits[0].double(), (pair_logits[0] + pair_logits[1]) / 2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(9, 14), (240, 321)])
def test_preprocessing_scales_the_short_side_and_crops_the_centre(height: int, width: int) -> None:
    videos = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (1, 2, 3, height, width), dtype=np.uint8))
    size = [math.ceil(length * 224 / min(height, width)) for length in (height, width)]
    expected = videos[0].double().numpy()
    for axis, length, target in zip((2, 3), (height, width), size, strict=True):
        # Positions of the pixel centres of the result in the coordinates of the frame.
        positions = ((np.arange(target) + 0.5) * length / target - 0.5).clip(0, length - 1)
        lower = np.floor(positions).astype(int)
        fraction = (positions - lower).reshape([-1 if other == axis else 1 for other in range(4)])
        upper = np.minimum(lower + 1, length - 1)
        expected = expected.take(lower, axis) * (1 - fraction) + expected.take(upper, axis) * fraction
    top, left = (size[0] - 224) // 2, (size[1] - 224) // 2
    expected = expected[:, :, top : top + 224, left : left + 224] / 127.5 - 1
    torch.testing.assert_close(preprocess(videos)[0].double(), torch.from_numpy(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored.pop("batch_stats.Mixed_4d.Branch_3.Conv3d_0b_1x1.BatchNorm_0.var"), "lacks batch_stats"),
        (lambda stored: stored.update(step=torch.zeros(1)), "has step, which I3D lacks"),
        (
            lambda stored: stored.update({"params.Conv3d_2b_1x1.BatchNorm_0.bias": torch.zeros(63)}),
            r"Conv3d_2b_1x1.BatchNorm_0.bias of shape \(63,\) where I3D's is \(64,\)",
        ),
    ],
)
def test_weights_of_another_network_are_refused(
    change, message: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    stored = dict(weights)
    change(stored)
    save_file(stored, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=f"other.safetensors.*{message}"):
        I3D.from_safetensors(tmp_path / "other.safetensors")


def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match=r"text.safetensors cannot be read"):
        I3D.from_safetensors(tmp_path / "text.safetensors")


def test_fewer_than_ten_frames_are_refused() -> None:
    with pytest.raises(InputError, match="9 frames, but I3D takes at least 10"):
        I3D()(torch.zeros(1, 9, 3, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("frames", "distance"),
    [(15, 133.9), pytest.param(16, 152.9, marks=pytest.mark.slow), pytest.param(30, 151.392, marks=pytest.mark.slow)],
)
def test_the_distance_of_black_and_white_videos_is_as_published(frames: int, distance: float, assets: Path) -> None:
    # All videos of a set are equal, so the covariances of the Frechet distance are zero. The TF-Hub module gives
    # 151.39244 for 30 frames.
    network = I3D.from_safetensors(assets / "weights" / "i3d" / "i3d-kinetics-400.safetensors")
    black = torch.zeros(1, frames, 3, 64, 64, dtype=torch.uint8)
    squared_distance = (network(black) - network(black + 255)).double().square().sum().item()
    assert squared_distance == pytest.approx(distance, abs=0.05 if frames < 30 else 0.001)
