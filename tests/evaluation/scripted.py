"""Small TorchScript networks with the interfaces of the published networks and features that are easy to verify."""

from pathlib import Path

import torch
from torch import Tensor, nn

from gpdit_lightning.options.evaluate import NetworkOptions
from gpdit_lightning.regular_files import sha256_of


def saved(module: nn.Module, folder: Path) -> NetworkOptions:
    """Write a network and return the options that name its file."""
    path = folder / f"{type(module).__name__}.pt"
    torch.jit.script(module).save(str(path))
    return NetworkOptions(path=str(path), sha256=sha256_of(path))


class ScriptedI3D(nn.Module):
    """Interface of StyleGAN-V's file. Features are the mean colours of all frames and of the first frame."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        features = torch.cat([x.mean((2, 3, 4)), x[:, :, 0].mean((2, 3))], 1)
        if rescale and resize and return_features:
            return features
        return features + 1000


class ScriptedInception(nn.Module):
    """Interface of NVIDIA's file; counts its passes. The last layer gives class probabilities, at a temperature."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.output = nn.Linear(6, 4)
        self.temperature = temperature
        self.passes = 0

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        self.passes += 1
        values = img.float() / 255
        features = torch.cat([values.mean((2, 3)), values[:, :, 0, 0]], 1)
        if return_features:
            return features
        logits = features @ self.output.weight.t() / self.temperature
        if not no_output_bias:
            logits = logits + self.output.bias
        return logits.softmax(1)


class ScriptedPlain(nn.Module):
    """Features are pixels of the input and the number of pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :, ::50, ::70].flatten(1), torch.full([len(x), 1], float(x.shape[2] * x.shape[3]))], 1)


class ScriptedClassifier(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        assert pixels.dtype == torch.uint8
        return pixels.double().mean((2, 3))


class ClipColours(nn.Module):
    """A custom video network: mean colours of all frames and of the last frame, for clips of any length."""

    def forward(self, videos: Tensor) -> Tensor:
        return torch.cat([videos.float().mean((1, 3, 4)), videos[:, -1].float().mean((2, 3))], 1)


class ImageColours(nn.Module):
    """A custom image network: mean colours."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.float().mean((2, 3))
