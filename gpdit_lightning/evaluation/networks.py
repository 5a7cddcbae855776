"""The networks behind FVD, FID and IS: opened from local files and known by their sha256. Nothing is unpickled.

For videos (FVD), one of
- I3D's weights of Kinetics-400 as safetensors, in the layout of :meth:`I3D.from_safetensors`;
- the TorchScript of the same network that StyleGAN-V made common, `i3d_torchscript.pt`.

For pictures (FID, IS), one of
- NVIDIA's TorchScript of the Inception-v3 of 2015-12-05, `inception-2015-12-05.pt`: it resizes by itself, and gives
  features and the probabilities of 1008 classes;
- any TorchScript of that network which takes float32 (N, 3, 299, 299), (value - 128) / 128, and returns features alone.

`network_files.py` has the addresses of the first of each, and their sha256.

For the classes of IS alone, beside a file without classes: NVIDIA's file again, or any TorchScript that takes uint8
(N, 3, H, W), prepares it by itself and returns logits (N, classes). IS over other classes than those 1008 compares with
nothing published.

All compute in evaluation mode and float32. The same picture or video in another batch gives the same features up to
rounding, for libraries choose their kernels by shape.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation import i3d
from gpdit_lightning.evaluation.network_files import I3D_SHA256, INCEPTION_SHA256, CheckedFile
from gpdit_lightning.options.evaluate import NetworkFile

INCEPTION_SIDE = 299  # pixels along each side of what Inception-v3 sees
INCEPTION_PREPROCESSING = f"{INCEPTION_SIDE}x{INCEPTION_SIDE} bilinear as TensorFlow 1 resizes, (value - 128) / 128"
OWN_PREPROCESSING = "the file's own"
ONE_PICTURE = torch.arange(3 * 32 * 32).mul(37).remainder(256).to(torch.uint8).reshape(1, 3, 32, 32)

T = TypeVar("T")


class MetricNetwork(nn.Module):
    """A network that is ready to compute, and what reports say of it.

    Attributes:
        sha256: of the file's bytes.
        name: what the file holds.
        preprocessing: what is done to uint8 pixels.
        device: where it computes; pixels may come from anywhere.
    """

    def __init__(self, network: nn.Module, file: CheckedFile, name: str, preprocessing: str) -> None:
        super().__init__()
        self.network = network.to(file.device).eval().requires_grad_(False)
        self.path, self.sha256, self.device = file.path, file.sha256, file.device
        self.name, self.preprocessing = name, preprocessing

    def _compute(self, function: Callable[[Tensor], T], pixels: Tensor, axes: str) -> T:
        if pixels.dtype != torch.uint8 or pixels.ndim != len(axes.split()) or pixels.shape[-3] != 3:
            raise InputError(
                f"The pixels are {pixels.dtype} {tuple(pixels.shape)} where {self.path} takes torch.uint8 ({axes}): "
                "convert them."
            )
        # Unless told not to, cuDNN convolves float32 in TF32, which keeps ten of its 23 binary digits.
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return function(pixels.to(self.device))


class VideoNetwork(MetricNetwork):
    """Features of whole videos; see :func:`open_video_network`.

    Attributes:
        num_features: n, 400 for I3D.
        min_frames: fewer make no features.
    """

    min_frames = i3d.MIN_FRAMES

    def __init__(self, network: nn.Module, file: CheckedFile, name: str, preprocessing: str) -> None:
        super().__init__(network, file, name, preprocessing)
        self.num_features = file.columns(self, torch.zeros(1, self.min_frames, 3, 32, 32, dtype=torch.uint8))

    def forward(self, videos: Tensor) -> Tensor:
        """Features, on the network's device.

        Args:
            videos: uint8 (B, T, 3, H, W).

        Returns:
            float32 (B, n).

        Raises:
            InputError: pixels of another type or shape, or fewer than `min_frames` frames.
        """
        if videos.ndim == 5:
            i3d.check_frames(videos.shape[1])
        return self._compute(self.network, videos, "B, T, 3, H, W")


class ImageClassifier(MetricNetwork):
    """Probabilities of classes; see :func:`open_classifier`.

    Attributes:
        num_classes: how many.
    """

    network: "_Inception | _Classifier"

    def __init__(self, network: "_Inception | _Classifier", file: CheckedFile, name: str) -> None:
        super().__init__(network, file, name, OWN_PREPROCESSING)
        self.num_classes = file.columns(self, ONE_PICTURE)

    def forward(self, pixels: Tensor) -> Tensor:
        """Probabilities, on the network's device.

        Args:
            pixels: uint8 (N, 3, H, W).

        Returns:
            float32 (N, `num_classes`), rows that sum to one.

        Raises:
            InputError: pixels of another type or shape.
        """
        return self._compute(self.network.probabilities, pixels, "N, 3, H, W")


class ImageNetwork(MetricNetwork):
    """Features of pictures, and probabilities of classes where there are any; see :func:`open_image_network`.

    Attributes:
        num_features: n, 2048 for Inception-v3.
        has_classes: whether there are probabilities, the network's own or the classifier's.
    """

    network: "_Inception | _PlainInception"

    def __init__(
        self,
        network: "_Inception | _PlainInception",
        file: CheckedFile,
        name: str,
        preprocessing: str,
        classifier: ImageClassifier | None,
    ) -> None:
        super().__init__(network, file, name, preprocessing)
        self.classifier = classifier
        self.has_classes = classifier is not None or isinstance(network, _Inception)
        self.num_features = file.columns(self, ONE_PICTURE)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features alone, on the network's device.

        Args:
            pixels: uint8 (N, 3, H, W).

        Returns:
            float32 (N, n).

        Raises:
            InputError: pixels of another type or shape.
        """
        return self._compute(self.network, pixels, "N, 3, H, W")

    def features_and_probabilities(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Both, in one pass where the classes are the network's own.

        Args:
            pixels: uint8 (N, 3, H, W).

        Returns:
            float32 (N, n), and float32 (N, classes) whose rows sum to one, or None without classes.

        Raises:
            InputError: pixels of another type or shape.
        """
        if self.classifier is None and isinstance(self.network, _Inception):
            return self._compute(self.network.features_and_probabilities, pixels, "N, 3, H, W")
        return self(pixels), None if self.classifier is None else self.classifier(pixels)


def open_video_network(file: NetworkFile, device: str | torch.device = "cpu") -> VideoNetwork:
    """Open I3D in either form that the head of this module tells of.

    Raises:
        InputError: missing, of another sha256, unreadable, or another kind of network.
    """
    checked = CheckedFile.of(file, "video", device)
    if checked.path.suffix == ".safetensors":
        return VideoNetwork(i3d.I3D.from_safetensors(checked.path), checked, "I3D, Kinetics-400", i3d.PREPROCESSING)
    script, _ = checked.script("I3D")
    name = known_as(checked, "I3D, Kinetics-400, TorchScript", I3D_SHA256)
    return VideoNetwork(_ScriptedI3D(script), checked, name, OWN_PREPROCESSING)


def open_image_network(
    file: NetworkFile, device: str | torch.device = "cpu", classifier: NetworkFile | None = None
) -> ImageNetwork:
    """Open Inception-v3 in either form that the head of this module tells of.

    Args:
        file: of the network.
        device: to compute on.
        classifier: whose probabilities to give; the network's own, if it has any, when not given.

    Raises:
        InputError: a file that is missing, of another sha256, unreadable, or another kind of network.
    """
    classes = None if classifier is None else open_classifier(classifier, device)
    checked = CheckedFile.of(file, "image", device)
    script, form = checked.script("Inception", "one input")
    if form == "Inception":
        inception = checked.attempt(lambda: _Inception(script, ONE_PICTURE.to(checked.device)))
        return ImageNetwork(inception, checked, name_of_inception(checked), OWN_PREPROCESSING, classes)
    return ImageNetwork(_PlainInception(script), checked, "Inception-v3", INCEPTION_PREPROCESSING, classes)


def open_classifier(file: NetworkFile, device: str | torch.device = "cpu") -> ImageClassifier:
    """Open a network of classes alone, as the head of this module tells.

    Raises:
        InputError: missing, of another sha256, unreadable, or another kind of network.
    """
    checked = CheckedFile.of(file, "classifier", device)
    script, form = checked.script("Inception", "one input")
    if form == "Inception":
        inception = checked.attempt(lambda: _Inception(script, ONE_PICTURE.to(checked.device)))
        return ImageClassifier(inception, checked, name_of_inception(checked))
    return ImageClassifier(_Classifier(script), checked, checked.path.stem)


def name_of_inception(file: CheckedFile) -> str:
    """What a file with the arguments of NVIDIA's is called."""
    return known_as(file, "Inception-v3 with classes", INCEPTION_SHA256)


def known_as(file: CheckedFile, name: str, sha256: str) -> str:
    """The name of the file that everybody takes, or that this is another."""
    return name if file.sha256 == sha256 else f"{name}, not the file of the usual sha256"


def resize_as_tensorflow(pixels: Tensor, side: int) -> Tensor:
    """Bilinear without antialiasing, as TensorFlow 1 did for the first FID; NVIDIA's file and torchmetrics do the same.

    Output i is taken from i * length / side, so that first lies on first, and what is beyond the last pixel repeats it.
    pytorch-fid lays middle on middle instead (`F.interpolate`), so its scores differ a little.

    Args:
        pixels: (N, C, H, W).
        side: of the result, in pixels.

    Returns:
        float32 (N, C, side, side).
    """
    rows, columns = (_weights_of_resize(length, side).to(pixels.device) for length in pixels.shape[2:])
    return rows @ pixels.float() @ columns.T


def _weights_of_resize(length: int, side: int) -> Tensor:
    """How much of each pixel goes into each of the result: (side, length)."""
    places = (torch.arange(side, dtype=torch.float64) * length / side).clamp(max=length - 1)
    return (1 - (places[:, None] - torch.arange(length)).abs()).clamp(min=0).float()


class _ScriptedI3D(nn.Module):
    """Calls StyleGAN-V's file: (B, 3, T, H, W) in 0..255, which it resizes and rescales; logits come back."""

    def __init__(self, script: nn.Module) -> None:
        super().__init__()
        self.script = script

    def forward(self, videos: Tensor) -> Tensor:
        values = videos.transpose(1, 2).float().contiguous()
        return self.script(values, rescale=True, resize=True, return_features=True)


class _Inception(nn.Module):
    """Calls NVIDIA's file; its classes leave out the last layer's bias, as the first IS did (Salimans et al. 2016)."""

    def __init__(self, script: nn.Module, picture: Tensor) -> None:
        super().__init__()
        self.script = script
        self.last_layer: Tensor | None = None  # (classes, features), if the probabilities follow from the features
        weight = script.state_dict().get("output.weight")
        with torch.no_grad():
            features, expected = self(picture), self.probabilities(picture)
            if weight is not None and weight.shape == (expected.shape[1], features.shape[1]):
                found = (features @ weight.T).softmax(1)
                self.last_layer = weight if torch.allclose(found, expected, rtol=1e-3, atol=1e-6) else None

    def forward(self, pixels: Tensor) -> Tensor:
        return self.script(pixels, return_features=True)

    def probabilities(self, pixels: Tensor) -> Tensor:
        return self.script(pixels, no_output_bias=True)

    def features_and_probabilities(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self(pixels)
        if self.last_layer is None:
            return features, self.probabilities(pixels)
        return features, (features @ self.last_layer.T).softmax(1)


class _PlainInception(nn.Module):
    """Calls a file that takes pictures as the first FID's network did."""

    def __init__(self, script: nn.Module) -> None:
        super().__init__()
        self.script = script

    def forward(self, pixels: Tensor) -> Tensor:
        return self.script((resize_as_tensorflow(pixels, INCEPTION_SIDE) - 128) / 128)


class _Classifier(nn.Module):
    """Calls a file that takes uint8 pictures and returns logits."""

    def __init__(self, script: nn.Module) -> None:
        super().__init__()
        self.script = script

    def probabilities(self, pixels: Tensor) -> Tensor:
        return torch.softmax(self.script(pixels), dim=1, dtype=torch.float32)
