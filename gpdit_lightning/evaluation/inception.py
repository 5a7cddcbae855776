"""Inception-v3 behind FID and IS, from TorchScript files; see `networks.py` for which files there are."""

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from gpdit_lightning.evaluation.network_files import INCEPTION_SHA256, load_script

SIDE = 299  # pixels along each side of the network's input
PREPROCESSING_OF_FILE = "the file's own"


def load_inception(path: Path) -> "NvidiaInception | PlainInception":
    """The features, and with NVIDIA's file the class probabilities, of Inception-v3.

    Raises:
        InputError: the file is not a TorchScript, or one of another network.
    """
    script, interface = load_script("image", path, "Inception", "one input")
    return NvidiaInception(script) if interface == "Inception" else PlainInception(script)


def load_classifier(path: Path) -> "NvidiaInception | LogitsClassifier":
    """The class probabilities of NVIDIA's file, or of a TorchScript that returns logits.

    Raises:
        InputError: the file is not a TorchScript, or one of another network.
    """
    script, interface = load_script("classifier", path, "Inception", "one input")
    return NvidiaInception(script) if interface == "Inception" else LogitsClassifier(script, path.stem)


class NvidiaInception(nn.Module):
    """NVIDIA's file. Its classes omit the bias of the last layer, as in the first IS (Salimans et al., 2016)."""

    name = "Inception-v3 with classes"
    preprocessing = PREPROCESSING_OF_FILE
    published_sha256 = INCEPTION_SHA256

    def __init__(self, script: nn.Module) -> None:
        super().__init__()
        self.script = script
        # Whether the probabilities follow from the features by the last layer; found out at the first call.
        self._one_pass: bool | None = None

    def forward(self, pixels: Tensor) -> Tensor:
        """Features (N, 2048) of uint8 (N, 3, H, W)."""
        return self.script(pixels, return_features=True)

    def probabilities(self, pixels: Tensor) -> Tensor:
        """Class probabilities (N, 1008) of uint8 (N, 3, H, W)."""
        return self.script(pixels, no_output_bias=True)

    def features_and_probabilities(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Both, from one pass where the probabilities follow from the features by the file's last layer."""
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
    """A file that takes images as the first FID's network did, float32 (N, 3, 299, 299), and returns features alone."""

    name = "Inception-v3"
    preprocessing = f"{SIDE}x{SIDE} bilinear as TensorFlow 1 resizes, (value - 128) / 128"

    def __init__(self, script: nn.Module) -> None:
        super().__init__()
        self.script = script

    def forward(self, pixels: Tensor) -> Tensor:
        """Features (N, n) of uint8 (N, 3, H, W)."""
        return self.script((resize_as_tensorflow(pixels, SIDE) - 128) / 128)


class LogitsClassifier(nn.Module):
    """A file that takes uint8 (N, 3, H, W) and returns logits (N, classes)."""

    preprocessing = PREPROCESSING_OF_FILE

    def __init__(self, script: nn.Module, name: str) -> None:
        super().__init__()
        self.script, self.name = script, name

    def probabilities(self, pixels: Tensor) -> Tensor:
        """Class probabilities (N, classes) of uint8 (N, 3, H, W)."""
        return torch.softmax(self.script(pixels), dim=1, dtype=torch.float32)


def resize_as_tensorflow(pixels: Tensor, side: int) -> Tensor:
    """Bilinear without antialiasing, as TensorFlow 1 did for the first FID; NVIDIA's file and torchmetrics do the same.

    Output pixel i is sampled at i * length / side, so that the corners of both grids are aligned; beyond the last input
    pixel its value is repeated. pytorch-fid aligns the centres of pixels instead (`F.interpolate`), so that its scores
    differ slightly.

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
    """The weight of each input pixel in each output pixel along one axis: (side, length)."""
    positions = (torch.arange(side, dtype=torch.float64) * length / side).clamp(max=length - 1)
    return (1 - (positions[:, None] - torch.arange(length)).abs()).clamp(min=0).float().to(device)
