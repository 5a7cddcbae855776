"""The Inception-v3 of FID and IS, loaded from TorchScript files. `networks.py` lists the supported files."""

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from gpdit_lightning.evaluation.network_files import INCEPTION_SHA256, PREPROCESSING_OF_FILE
from gpdit_lightning.evaluation.torchscript import load_script

SIDE = 299  # pixels along each side of the network's input


def load_inception(path: Path) -> "NvidiaInception | PlainInception":
    """Load an Inception-v3 for features; NVIDIA's file also returns class probabilities.

    Raises:
        InputError: the file is not a TorchScript, or contains another network.
    """
    script, interface = load_script("image", path, "Inception", "one input")
    return NvidiaInception(script) if interface == "Inception" else PlainInception(script)


def load_classifier(path: Path) -> "NvidiaInception | LogitsClassifier":
    """Load a classifier: NVIDIA's file, or a TorchScript that returns logits.

    Raises:
        InputError: the file is not a TorchScript, or contains another network.
    """
    script, interface = load_script("classifier", path, "Inception", "one input")
    return NvidiaInception(script) if interface == "Inception" else LogitsClassifier(script, path.stem)


class NvidiaInception(nn.Module):
    """NVIDIA's file. Its class probabilities omit the last layer's bias, as in the first IS (Salimans et al., 2016)."""

    name = "Inception-v3 with classes"
    preprocessing = PREPROCESSING_OF_FILE
    published_sha256 = INCEPTION_SHA256

    def __init__(self, script: nn.Module) -> None:
        super().__init__()
        self.script = script
        # Whether the last layer maps the features to the probabilities; determined at the first call.
        self._one_pass: bool | None = None

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features (N, 2048) of images, uint8 (N, 3, H, W)."""
        return self.script(pixels, return_features=True)

    def probabilities(self, pixels: Tensor) -> Tensor:
        """Return class probabilities (N, 1008) of images, uint8 (N, 3, H, W)."""
        return self.script(pixels, no_output_bias=True)

    def features_and_probabilities(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return both, from one pass if the last layer of the file maps the features to the probabilities."""
        features = self(pixels)
        if self._one_pass:
            return features, self._last_layer(features)
        probabilities = self.probabilities(pixels)
        if self._one_pass is None:
            weight = self.script.state_dict().get("output.weight")
            fits = weight is not None and weight.shape == (probabilities.shape[1], features.shape[1])
            self._one_pass = fits and torch.allclose(self._last_layer(features), probabilities, rtol=1e-3, atol=1e-6)
        return features, probabilities

    def _last_layer(self, features: Tensor) -> Tensor:
        return (features @ self.script.state_dict()["output.weight"].T).softmax(1)


class PlainInception(nn.Module):
    """A file with the input of the first FID's network, float32 (N, 3, 299, 299), that returns only features."""

    name = "Inception-v3"
    preprocessing = f"{SIDE}x{SIDE} bilinear as TensorFlow 1 resizes, (value - 128) / 128"

    def __init__(self, script: nn.Module) -> None:
        super().__init__()
        self.script = script

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features (N, n) of images, uint8 (N, 3, H, W)."""
        return self.script((resize_as_tensorflow(pixels, SIDE) - 128) / 128)


class LogitsClassifier(nn.Module):
    """A file that takes uint8 (N, 3, H, W) and returns logits (N, classes)."""

    preprocessing = PREPROCESSING_OF_FILE

    def __init__(self, script: nn.Module, name: str) -> None:
        super().__init__()
        self.script, self.name = script, name

    def probabilities(self, pixels: Tensor) -> Tensor:
        """Return class probabilities (N, classes) of images, uint8 (N, 3, H, W)."""
        return torch.softmax(self.script(pixels), dim=1, dtype=torch.float32)


def resize_as_tensorflow(pixels: Tensor, side: int) -> Tensor:
    """Resize bilinearly without antialiasing, as TensorFlow 1 does for the first FID.

    NVIDIA's file and torchmetrics resize in the same way. Output pixel i is sampled at i * length / side, so that
    pixel 0 of both grids coincides; beyond the last input pixel its value is repeated. pytorch-fid aligns the
    centres of pixels instead (`F.interpolate`), so its scores differ slightly.

    Args:
        pixels: (N, C, H, W).
        side: height and width of the result in pixels.

    Returns:
        float32 (N, C, side, side).
    """
    rows, columns = (_resize_weights(length, side, pixels.device) for length in pixels.shape[2:])
    return rows @ pixels.float() @ columns.T


@lru_cache(maxsize=8)
def _resize_weights(length: int, side: int, device: torch.device) -> Tensor:
    """Return the weight of each input pixel in each output pixel along one axis: (side, length)."""
    positions = (torch.arange(side, dtype=torch.float64) * length / side).clamp(max=length - 1)
    return (1 - (positions[:, None] - torch.arange(length)).abs()).clamp(min=0).float().to(device)
