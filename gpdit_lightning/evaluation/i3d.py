"""The network of FVD: Inflated 3D Inception-v1 (Carreira & Zisserman 2017, figure 3), trained on Kinetics-400.

The implementation follows the TF-Hub module `deepmind/i3d-kinetics-400`, with which FVD was defined (Unterthiner et
al. 2018). Modules have the same names as in that network, so its weights load without a mapping of names.
"""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpdit_lightning.errors import InputError, TransientError
from gpdit_lightning.evaluation.network_files import I3D_SHA256, PREPROCESSING_OF_FILE
from gpdit_lightning.evaluation.torchscript import load_script
from gpdit_lightning.tensor_files import check_finite, safetensors_header

MIN_FRAMES = 10
SIDE = 224  # pixels along each side of the network's input
CLASSES = 400
PREPROCESSING = f"short side to {SIDE} bilinear without antialiasing, centre crop, values in [-1, 1]"

# Output channels of the four branches of each block: 1x1x1; two of 1x1x1 then 3x3x3; max pooling then 1x1x1.
MIXED = {
    "3b": (64, (96, 128), (16, 32), 32),
    "3c": (128, (128, 192), (32, 96), 64),
    "4b": (192, (96, 208), (16, 48), 64),
    "4c": (160, (112, 224), (24, 64), 64),
    "4d": (128, (128, 256), (24, 64), 64),
    "4e": (112, (144, 288), (32, 64), 64),
    "4f": (256, (160, 320), (32, 128), 128),
    "5b": (256, (160, 320), (32, 128), 128),
    "5c": (384, (192, 384), (48, 128), 128),
}
POOL_SIZE_BEFORE = {"4b": 3, "5b": 2}  # blocks that follow max pooling of this size and stride 2


def load_i3d(path: Path) -> "I3D | ScriptedI3D":
    """Load I3D from safetensors, or from the TorchScript that the authors of StyleGAN-V publish.

    Raises:
        InputError: the file is unreadable or contains another network.
    """
    if path.suffix == ".safetensors":
        return I3D.from_safetensors(path)
    return ScriptedI3D(load_script("video", path, "I3D")[0])


def pad_same(x: Tensor, kernel: Sequence[int], stride: Sequence[int], value: float = 0.0) -> Tensor:
    """Pad as TensorFlow's "SAME" does: ceil(length / stride) outputs per axis; an odd remainder is padded at the end.

    Args:
        x: (B, C, T, H, W).
        kernel, stride: along (T, H, W).
        value: of the padding.
    """
    pads: list[int] = []
    for length, size, step in zip(x.shape[2:], kernel, stride, strict=True):
        missing = max((-(-length // step) - 1) * step + size - length, 0)
        pads = [missing // 2, missing - missing // 2, *pads]  # F.pad starts from the last axis
    return F.pad(x, pads, value=value) if any(pads) else x


class ConvUnit(nn.Module):
    """Convolution, batch normalisation with stored statistics and without a scale (epsilon 0.001), and ReLU."""

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int, out_channels: int, size: int, stride: int = 1) -> None:
        super().__init__()
        self.size, self.stride = (size,) * 3, (stride,) * 3
        self.weight = nn.Parameter(torch.zeros(out_channels, channels, *self.size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("mean", torch.zeros(out_channels))
        self.register_buffer("var", torch.ones(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, T, H, W) to (B, C', T', H', W'); lengths are divided by the stride and rounded up."""
        x = F.conv3d(pad_same(x, self.size, self.stride), self.weight, stride=self.stride)
        return F.batch_norm(x, self.mean, self.var, bias=self.bias, eps=1e-3).relu_()


class MaxPool(nn.Module):
    """Max pooling with padding "SAME". The padding is -inf, so it is never the maximum."""

    def __init__(self, size: int | Sequence[int], stride: int | Sequence[int]) -> None:
        super().__init__()
        self.size = (size,) * 3 if isinstance(size, int) else tuple(size)
        self.stride = (stride,) * 3 if isinstance(stride, int) else tuple(stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, T, H, W) to (B, C, T', H', W'); lengths are divided by the stride and rounded up."""
        return F.max_pool3d(pad_same(x, self.size, self.stride, -torch.inf), self.size, self.stride)


class Mixed(nn.Module):
    """Inception block: four parallel branches, concatenated along the channels."""

    def __init__(self, channels: int, first: int, second: tuple[int, int], third: tuple[int, int], last: int) -> None:
        super().__init__()
        self.Branch_0 = _chain(Conv3d_0a_1x1=ConvUnit(channels, first, 1))
        self.Branch_1 = _chain(Conv3d_0a_1x1=ConvUnit(channels, second[0], 1), Conv3d_0b_3x3=ConvUnit(*second, 3))
        self.Branch_2 = _chain(Conv3d_0a_1x1=ConvUnit(channels, third[0], 1), Conv3d_0b_3x3=ConvUnit(*third, 3))
        self.Branch_3 = _chain(MaxPool3d_0a_3x3=MaxPool(3, 1), Conv3d_0b_1x1=ConvUnit(channels, last, 1))
        self.channels = first + second[1] + third[1] + last

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, T, H, W) to (B, `channels`, T, H, W)."""
        return torch.cat([branch(x) for branch in self.children()], dim=1)


class I3D(nn.Module):
    """I3D, which maps videos to the logits of the 400 classes of Kinetics-400. FVD uses the logits as features.

    A new instance is untrained; see :meth:`from_safetensors`.
    """

    name = "I3D, Kinetics-400"
    preprocessing = PREPROCESSING
    min_frames = MIN_FRAMES

    def __init__(self) -> None:
        super().__init__()
        self.layers = _chain(
            Conv3d_1a_7x7=ConvUnit(3, 64, 7, 2),
            MaxPool3d_2a_3x3=MaxPool((1, 3, 3), (1, 2, 2)),
            Conv3d_2b_1x1=ConvUnit(64, 64, 1),
            Conv3d_2c_3x3=ConvUnit(64, 192, 3),
            MaxPool3d_3a_3x3=MaxPool((1, 3, 3), (1, 2, 2)),
        )
        channels = 192
        for name, branches in MIXED.items():
            if name in POOL_SIZE_BEFORE:
                self.layers.add_module(f"MaxPool3d_{name[0]}a", MaxPool(POOL_SIZE_BEFORE[name], 2))
            block = Mixed(channels, *branches)
            self.layers.add_module(f"Mixed_{name}", block)
            channels = block.channels
        self.head = nn.Conv3d(channels, CLASSES, 1)

    @classmethod
    def from_safetensors(cls, path: str | Path) -> Self:
        """Load the network in evaluation mode from weights in Flax's layout.

        The file must have exactly the keys and shapes of :meth:`flax_tensors`.

        Raises:
            InputError: the file is unreadable or does not have the weights of this network.
        """
        remedy = "give the I3D weights of Kinetics-400 in Flax's layout"
        try:
            stored, _ = safetensors_header(Path(path), remedy)
        except TransientError:
            raise
        except InputError as error:
            raise InputError(f"{path} cannot be read: {error}") from None
        network = cls()
        tensors = network.flax_tensors()
        differing = sorted(tensors.keys() ^ stored.keys())
        if differing:
            problem = f"lacks {differing[0]}" if differing[0] in tensors else f"has {differing[0]}, which I3D lacks"
            raise InputError(f"{path} {problem} ({len(differing)} tensors missing or surplus): {remedy}.")
        with torch.no_grad():
            for key, tensor in tensors.items():
                if stored[key].shape != tuple(tensor.shape):
                    raise InputError(
                        f"{path} has {key} of shape {stored[key].shape} where I3D's is {tuple(tensor.shape)}: {remedy}."
                    )
                values = stored[key].read()
                check_finite({key: values}, str(path), remedy)
                tensor.copy_(values)
        return network.eval().requires_grad_(False)

    def flax_tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the network by their names in Flax, as views in Flax's layout.

        Kernels are (T, H, W, in, out), statistics (1, 1, 1, 1, channels), biases (channels,).
        """
        tensors: dict[str, Tensor] = {}
        for name, unit in self.layers.named_modules():
            if isinstance(unit, ConvUnit):
                tensors[f"params.{name}.Conv_0.kernel"] = unit.weight.permute(2, 3, 4, 1, 0)
                tensors[f"params.{name}.BatchNorm_0.bias"] = unit.bias
                tensors[f"batch_stats.{name}.BatchNorm_0.mean"] = unit.mean.view(1, 1, 1, 1, -1)
                tensors[f"batch_stats.{name}.BatchNorm_0.var"] = unit.var.view(1, 1, 1, 1, -1)
        tensors["params.Logits.Conv3d_0c_1x1.Conv_0.kernel"] = self.head.weight.permute(2, 3, 4, 1, 0)
        tensors["params.Logits.Conv3d_0c_1x1.Conv_0.bias"] = self.head.get_parameter("bias")
        return tensors

    def forward(self, videos: Tensor) -> Tensor:
        """Return the logits of videos, averaged over time as in the TF-Hub module.

        Args:
            videos: uint8 (B, T, 3, H, W), T >= 10.

        Returns:
            float32 (B, 400), before the softmax.

        Raises:
            InputError: the videos have fewer than 10 frames.
        """
        if videos.shape[1] < MIN_FRAMES:
            raise InputError(f"the videos have {videos.shape[1]} frames, but I3D takes at least {MIN_FRAMES}.")
        x = self.layers(preprocess(videos).transpose(1, 2))
        return self.head(F.avg_pool3d(x, (2, 7, 7), stride=1)).mean((2, 3, 4))


class ScriptedI3D(nn.Module):
    """The TorchScript that the authors of StyleGAN-V publish. It takes (B, 3, T, H, W) in 0..255, and resizes it."""

    name = "I3D, Kinetics-400, TorchScript"
    preprocessing = PREPROCESSING_OF_FILE
    published_sha256 = I3D_SHA256
    min_frames = MIN_FRAMES

    def __init__(self, script: nn.Module) -> None:
        super().__init__()
        self.script = script

    def forward(self, videos: Tensor) -> Tensor:
        """Return the logits (B, 400) of videos, uint8 (B, T, 3, H, W)."""
        pixels = videos.transpose(1, 2).float().contiguous()
        return self.script(pixels, rescale=True, resize=True, return_features=True)


def preprocess(videos: Tensor) -> Tensor:
    """Scale, crop and normalise videos for I3D, as `PREPROCESSING` describes.

    The scaled long side is 224 times the ratio of the sides, rounded up.

    Args:
        videos: uint8 (B, T, 3, H, W).

    Returns:
        float32 (B, T, 3, 224, 224) in [-1, 1].
    """
    height, width = videos.shape[3:]
    short = min(height, width)
    size = -(-height * SIDE // short), -(-width * SIDE // short)
    frames = F.interpolate(videos.flatten(0, 1).float(), size, mode="bilinear", align_corners=False)
    top, left = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    cropped = frames[:, :, top : top + SIDE, left : left + SIDE]
    return (cropped / 127.5 - 1).unflatten(0, videos.shape[:2])


def _chain(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))
