"""The networks of FVD, FID and IS. The package contains none of them; `network_files.py` has their URLs and sha256.

The video network (FVD, precision, recall) is one of
- I3D's weights of Kinetics-400 as safetensors, in the layout of :meth:`I3D.from_safetensors`;
- the TorchScript of the same network that the authors of StyleGAN-V publish, `i3d_torchscript.pt`;
- a custom subclass of `nn.Module`, which maps uint8 (B, T, 3, H, W) to float32 (B, n).

The image network (FID, IS) is one of
- NVIDIA's TorchScript of the Inception-v3 of 2015-12-05, `inception-2015-12-05.pt`, which resizes its input and returns
  features and the probabilities of 1008 classes;
- any TorchScript of that network that takes float32 (N, 3, 299, 299), (value - 128) / 128, and returns only features;
- a custom subclass of `nn.Module`, which maps uint8 (N, 3, H, W) to float32 (N, n); it serves IS too if it has a method
  `features_and_probabilities` that returns float32 (N, n) and (N, classes).

The classifier (IS, where the image network returns no class probabilities) is one of
- NVIDIA's file;
- any TorchScript that takes uint8 (N, 3, H, W), including preprocessing, and returns logits (N, classes);
- a custom subclass of `nn.Module` with a method `probabilities`, from uint8 (N, 3, H, W) to float32 (N, classes).
IS over classes other than those 1008 is not comparable with published values.

All networks run in evaluation mode and float32. Features are independent of batch composition up to rounding, since
libraries choose their kernels by shape.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpdit_lightning.codecs.base import fingerprint_of
from gpdit_lightning.errors import InputError, message_line
from gpdit_lightning.evaluation.i3d import load_i3d
from gpdit_lightning.evaluation.inception import load_classifier, load_inception
from gpdit_lightning.evaluation.network_files import (
    PREPROCESSING_OF_FILE,
    REMEDIES,
    NetworkRecord,
    time_limit,
    verify_file,
)
from gpdit_lightning.imports import report_custom_errors, resolve, value_summary
from gpdit_lightning.options.evaluate import NetworkOptions

# The values of `kind` besides the import path of a custom class.
VIDEO_NETWORKS: dict[str, Callable[..., nn.Module]] = {"i3d": load_i3d}
IMAGE_NETWORKS: dict[str, Callable[..., nn.Module]] = {"inception": load_inception}
CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {"torchscript": load_classifier}

# Example on which a network is tested after loading.
EXAMPLE = torch.arange(3 * 32 * 32).mul(37).remainder(256).to(torch.uint8).reshape(1, 3, 32, 32)


# What a custom class must do, by the role of the network, for messages.
CONTRACTS = {
    "video": "it must map uint8 (B, T, 3, H, W) to finite float32 (B, n)",
    "image": "it must map uint8 (N, 3, H, W) to finite float32 (N, n), and its method features_and_probabilities, if "
    "there is one, to a tuple of these and of probabilities, float32 (N, classes) whose rows sum to one",
    "classifier": "its method probabilities must map uint8 (N, 3, H, W) to float32 (N, classes) whose rows sum to one",
}
# Optional attributes of a custom network.
ATTRIBUTES: dict[str, type] = {"name": str, "preprocessing": str, "min_frames": int}


MAX_OUTPUTS = 2**16  # features or classes: a covariance has as many numbers squared


class LoadedNetwork(NamedTuple):
    """A network with its record for the report, and its origin and a remedy for error messages."""

    module: nn.Module
    record: NetworkRecord
    origin: str
    is_custom: bool
    remedy: str


def load_video_network(options: NetworkOptions, device: str | torch.device = "cpu") -> "VideoNetwork":
    """Load a network for FVD, in any form that the docstring of this module lists.

    Raises:
        InputError: the file is missing, has another sha256 or contains another network, or the class cannot be used.
    """
    return VideoNetwork(_load("video", options, VIDEO_NETWORKS), device)


def load_image_network(
    options: NetworkOptions, device: str | torch.device = "cpu", classifier: NetworkOptions | None = None
) -> "ImageNetwork":
    """Load a network for FID and IS, in any form that the docstring of this module lists.

    Args:
        options: of the network.
        device: to compute on.
        classifier: of a network whose class probabilities replace those of the image network.

    Raises:
        InputError: as :func:`load_video_network`.
    """
    classes = None if classifier is None else load_image_classifier(classifier, device)
    return ImageNetwork(_load("image", options, IMAGE_NETWORKS), device, classes)


def load_image_classifier(options: NetworkOptions, device: str | torch.device = "cpu") -> "ImageClassifier":
    """Load a network for IS only, in any form that the docstring of this module lists.

    Raises:
        InputError: as :func:`load_video_network`.
    """
    return ImageClassifier(_load("classifier", options, CLASSIFIERS), device)


def _load(role: str, options: NetworkOptions, registry: Mapping[str, Callable[..., nn.Module]]) -> LoadedNetwork:
    kind = options.kind or next(iter(registry))
    is_custom = kind not in registry
    factory = resolve(kind, registry, f"{role} network", base=nn.Module)
    arguments = dict(options.arguments)
    file, sha256 = kind, ""
    if options.path is None and options.sha256 is not None:
        raise InputError(f"the {role} network has a sha256 but no path: give both, or leave the sha256 out.")
    if options.path is not None:
        remedy = "give its file of weights" if is_custom else REMEDIES[role]
        path, sha256 = verify_file(role, options.path, options.sha256, remedy)
        file, arguments = path.name, {"path": path, **arguments}
    if is_custom:
        module, fingerprint = _construct(role, kind, factory, arguments)
        sha256 = sha256 or fingerprint
    elif options.path is None:
        raise InputError(f"the {role} network has no path: {REMEDIES[role]}.")
    elif options.arguments:
        raise InputError(f"the {role} network {kind} takes no arguments: leave them out, or give a custom class.")
    else:
        module = factory(**arguments)
    name = getattr(module, "name", kind)
    if getattr(module, "published_sha256", sha256) != sha256:
        name += ", not the published file"
    if options.arguments:
        name += f" ({', '.join(f'{key}={value}' for key, value in options.arguments.items())})"
    record = NetworkRecord(name, file, sha256, getattr(module, "preprocessing", PREPROCESSING_OF_FILE))
    origin = kind if is_custom else str(options.path)
    return LoadedNetwork(module, record, origin, is_custom, CONTRACTS[role] if is_custom else REMEDIES[role])


def _construct(
    role: str, kind: str, factory: Callable[..., nn.Module], arguments: Mapping[str, Any]
) -> tuple[nn.Module, str]:
    """Construct a custom network, and check its attributes; return it and the fingerprint of its weights, if any.

    Raises:
        InputError: the constructor fails, or an attribute has another type.
    """
    expected = "`arguments` must be those of its constructor, which also receives `path` if a path is given"
    with report_custom_errors(f"the {role} network", kind, expected):
        module = factory(**arguments)
        weights = module.state_dict()
        fingerprint = fingerprint_of(weights) if weights else ""
    for name, expected_type in ATTRIBUTES.items():
        value = getattr(module, name, None)
        if value is not None and (not isinstance(value, expected_type) or value == 0):
            words = "text" if expected_type is str else "a whole number, at least 1"
            raise InputError(f"the {role} network '{kind}' has {name} = {value!r}: it must be {words}.")
    return module, fingerprint


class MetricNetwork(nn.Module):
    """A network on its device, which checks its input.

    Args:
        loaded: the network, which takes uint8 pixels.
        device: to compute on; pixels may be on any device.
    """

    role: str
    axes: str  # names of the axes of the pixels

    def __init__(self, loaded: LoadedNetwork, device: str | torch.device) -> None:
        super().__init__()
        self.record, self.device = loaded.record, torch.device(device)
        self._origin, self._is_custom, self._remedy = loaded.origin, loaded.is_custom, loaded.remedy
        with self._report_errors():
            self.network = loaded.module.to(device).eval().requires_grad_(False)

    def move_to(self, device: str | torch.device) -> None:
        """Move the network; it computes on that device from then on."""
        self.device = torch.device(device)
        with self._report_errors():
            self.network.to(device)

    def _compute(self, function: Callable[[Tensor], Any], pixels: Tensor, outputs: int = 1) -> Any:
        """Return the output of a function of the network, or the tuple of its outputs.

        Raises:
            InputError: the pixels have another type or shape, a custom network fails, or an output is not float32 with
                one row for each image or video.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != len(self.axes.split()) or pixels.shape[-3] != 3:
            raise InputError(
                f"the pixels are {pixels.dtype} {tuple(pixels.shape)}, but the {self.role} network takes torch.uint8 "
                f"({self.axes}): convert them."
            )
        # By default cuDNN computes float32 convolutions in TF32, which keeps 10 of the 23 mantissa bits.
        with (
            torch.no_grad(),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
            self._report_errors(),
            time_limit(self.role, self._origin),
        ):
            result = function(pixels.to(self.device))
        if outputs > 1 and not (isinstance(result, tuple) and len(result) == outputs):
            raise self._error(f"returns {value_summary(result)}, but a tuple of {outputs} tensors is expected")
        for output in result if outputs > 1 else (result,):
            is_matrix = isinstance(output, Tensor) and output.dtype == torch.float32 and output.ndim == 2
            if not is_matrix or len(output) != len(pixels):
                raise self._error(
                    f"returns {value_summary(output)} for pixels {tuple(pixels.shape)}, but float32 ({len(pixels)}, n) "
                    "is expected"
                )
        return result

    def _num_outputs(
        self, function: Callable[[Tensor], Tensor], example: Tensor, are_probabilities: bool = False
    ) -> int:
        """Return n, the number of outputs of a function of the network for an example.

        Args:
            function: returns float32 (N, n).
            example: one image or video; a custom network gets two, so that one that merges them is found.
            are_probabilities: the outputs must be probabilities.

        Raises:
            InputError: the network fails, or the output is not of that form or not finite.
        """
        try:
            output = function(example.expand(2 if self._is_custom else 1, *example.shape[1:]))
        except InputError:
            raise
        except Exception as error:  # the code in the file may raise anything
            raise self._error(f"could not compute on an example ({message_line(error, -1)})") from None
        if not 1 <= output.shape[1] <= MAX_OUTPUTS:
            raise self._error(f"returns {output.shape[1]:,} numbers, but 1 to {MAX_OUTPUTS:,} are expected")
        if not output.isfinite().all():
            raise self._error("returns numbers that are not finite")
        if are_probabilities and ((output < 0).any() or (output.sum(1) - 1).abs().max() > 1e-2):
            raise self._error("returns probabilities that are negative or do not sum to one")
        return output.shape[1]

    def _report_errors(self) -> AbstractContextManager[None]:
        """Replace errors of a custom network by InputErrors."""
        if not self._is_custom:
            return nullcontext()
        return report_custom_errors(f"the {self.role} network", self._origin, self._remedy)

    def _error(self, reason: str) -> InputError:
        return InputError(f"the {self.role} network {self._origin} {reason}: {self._remedy}.")


class VideoNetwork(MetricNetwork):
    """Features of whole videos; see :func:`load_video_network`.

    Attributes:
        num_features: n, 400 for I3D.
        min_frames: minimum number of frames of a video.
    """

    role, axes = "video", "B, T, 3, H, W"

    def __init__(self, loaded: LoadedNetwork, device: str | torch.device) -> None:
        super().__init__(loaded, device)
        self.min_frames: int = getattr(self.network, "min_frames", 1)
        self.num_features = self._num_outputs(self, EXAMPLE[None].expand(1, self.min_frames, -1, -1, -1))

    def forward(self, videos: Tensor) -> Tensor:
        """Return features, on the device of the network.

        Args:
            videos: uint8 (B, T, 3, H, W).

        Returns:
            float32 (B, n).

        Raises:
            InputError: the pixels have another type or shape, or there are fewer than `min_frames` frames.
        """
        if videos.ndim == 5:
            self.check_frames(videos.shape[1])
        return self._compute(self.network, videos)

    def check_frames(self, frames: int) -> None:
        """Raise `InputError` for videos of fewer than `min_frames` frames."""
        if frames < self.min_frames:
            raise InputError(
                f"the videos have {frames} frames, but {self.record.name} takes at least {self.min_frames}: use "
                "longer clips, or include the context."
            )


class ImageClassifier(MetricNetwork):
    """Class probabilities of images; see :func:`load_image_classifier`.

    Attributes:
        num_classes: number of classes.
    """

    role, axes = "classifier", "N, 3, H, W"

    def __init__(self, loaded: LoadedNetwork, device: str | torch.device) -> None:
        super().__init__(loaded, device)
        if not callable(getattr(self.network, "probabilities", None)):
            raise self._error("has no method probabilities")
        self.num_classes = self._num_outputs(self, EXAMPLE, are_probabilities=True)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return class probabilities, on the device of the network.

        Args:
            pixels: uint8 (N, 3, H, W).

        Returns:
            float32 (N, `num_classes`), rows that sum to one.

        Raises:
            InputError: the pixels have another type or shape.
        """
        return self._compute(self.network.probabilities, pixels)  # type: ignore[arg-type]


class ImageNetwork(MetricNetwork):
    """Features of images, and class probabilities if available; see :func:`load_image_network`.

    Attributes:
        num_features: n, 2048 for Inception-v3.
        classifier: computes the class probabilities in place of the network, or None.
        has_classes: whether class probabilities are available.
    """

    role, axes = "image", "N, 3, H, W"

    def __init__(
        self, loaded: LoadedNetwork, device: str | torch.device, classifier: ImageClassifier | None = None
    ) -> None:
        super().__init__(loaded, device)
        self.classifier = classifier
        self.has_classes = classifier is not None or hasattr(self.network, "features_and_probabilities")
        self.num_features = self._num_outputs(self, EXAMPLE)
        if self.has_classes:
            self._num_outputs(self._probabilities, EXAMPLE, are_probabilities=True)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return only features, on the device of the network.

        Args:
            pixels: uint8 (N, 3, H, W).

        Returns:
            float32 (N, n).

        Raises:
            InputError: the pixels have another type or shape.
        """
        return self._compute(self.network, pixels)

    def features_and_probabilities(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return features and class probabilities, from one pass if the network computes both.

        Args:
            pixels: uint8 (N, 3, H, W).

        Returns:
            float32 (N, n), and float32 (N, classes) whose rows sum to one, or None without classes.

        Raises:
            InputError: the pixels have another type or shape.
        """
        if self.classifier is None and self.has_classes:
            return self._compute(self.network.features_and_probabilities, pixels, outputs=2)  # type: ignore[arg-type]
        return self(pixels), None if self.classifier is None else self.classifier(pixels)

    def _probabilities(self, pixels: Tensor) -> Tensor:
        probabilities = self.features_and_probabilities(pixels)[1]
        assert probabilities is not None
        return probabilities
