"""The codecs `pca` and `pca_digits`: linear codecs whose weights (62 KB each) ship with the package.

A latent frame is the first 16 principal components of each block of 4x8x8 pixels; the blocks of the first frame are
1x8x8. Both sets of components are orthonormal, so encoding followed by decoding is a projection, which has the least
squared error on the fitted images of all linear codes of 16 numbers per block. `fit_pca.py` computes the weights: those
of `pca` from photographs and digits, those of `pca_digits` from the training videos of `demo`.
"""

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from gpdit_lightning.codecs.base import Codec, fingerprint_of
from gpdit_lightning.errors import InputError, TransientError
from gpdit_lightning.tensor_files import check_finite, safetensors_header

SHIPPED_WEIGHTS = Path(__file__).with_name("pca.safetensors")
COMPONENTS = 16
BLOCK = 8  # pixels along a side
GROUP = 4  # pixel frames in each latent frame after the first
# Four equal frames have twice the norm of one: with this gain, the first latent frame of a still video equals the later
# ones.
FIRST_FRAME_GAIN = GROUP**0.5
WEIGHT_SHAPES = {
    "first_components": (COMPONENTS, 1 * 3 * BLOCK * BLOCK),
    "later_components": (COMPONENTS, GROUP * 3 * BLOCK * BLOCK),
    "centre": (3,),
    "mean": (COMPONENTS,),
    "std": (COMPONENTS,),
}


class PcaCodec(Codec):
    """Codec of 16 principal components of pixel blocks.

    Attributes:
        shipped_weights: the weights of the codec without a `source`.

    Args:
        weights: `first_components` (16, 192) and `later_components` (16, 768), orthonormal rows over blocks flattened
            from (frames, colours, rows, columns); `centre` (3,), the mean colour in [-1, 1]; `mean` and `std` (16,).
        source: file of the weights; None for the shipped ones.
    """

    latent_channels, spatial_factor, temporal_factor = COMPONENTS, BLOCK, GROUP
    shipped_weights: ClassVar[Path] = SHIPPED_WEIGHTS

    def __init__(self, weights: dict[str, Tensor], source: str | None = None) -> None:
        self.weights = {name: weights[name].to(torch.float32) for name in WEIGHT_SHAPES}
        self.source = source
        self.mean, self.std = self.weights["mean"].clone(), self.weights["std"].clone()
        self.fingerprint = fingerprint_of(self.weights)

    @classmethod
    def load(cls, source: str | None = None) -> Self:
        """Load the shipped weights, or a file written by `python -m gpdit_lightning.codecs.fit_pca`.

        Raises:
            InputError: the file is missing, or is not a weights file of this codec.
        """
        path = cls.shipped_weights if source is None else Path(source)
        cure = "make one with `python -m gpdit_lightning.codecs.fit_pca --out FILE`"
        try:
            stored, _ = safetensors_header(path, cure)
        except TransientError:
            raise
        except InputError as error:
            reason = str(error).partition(f": {cure}")[0]
            raise InputError(
                f"{path} is not a readable weights file of the codec '{cls.name}' ({reason}): {cure}."
            ) from None
        is_of_codec = {name: tensor.shape for name, tensor in stored.items()} == WEIGHT_SHAPES
        if not is_of_codec or not all(tensor.dtype.is_floating_point for tensor in stored.values()):
            raise InputError(f"{path} does not contain the tensors of the codec '{cls.name}': {cure}.")
        weights = {name: tensor.read() for name, tensor in stored.items()}
        check_finite(weights, str(path), cure)
        if not (weights["std"] > 0).all():
            raise InputError(f"{path} has standard deviations that are not above 0: {cure}.")
        return cls(weights, source)

    def to(self, device: str | torch.device) -> Self:
        """Move the weights; return the codec itself."""
        self.device = torch.device(device)
        self.weights = {name: values.to(self.device) for name, values in self.weights.items()}
        return self

    def encode_values(self, values: Tensor) -> Tensor:
        """Project the blocks of the frames onto the components."""
        # In float64 on a CPU, so that the result in float32 depends neither on the number of threads nor on the batch.
        precision = torch.float64 if self.device.type == "cpu" else torch.float32
        values = (values - self._centre).to(precision)
        first_components, later_components = (
            self.weights[name].to(precision) for name in ("first_components", "later_components")
        )
        first = blocks_of(values[:, :1], 1) @ first_components.T * FIRST_FRAME_GAIN
        later = blocks_of(values[:, 1:], GROUP) @ later_components.T
        return torch.cat([first, later], dim=1).permute(0, 1, 4, 2, 3).float().contiguous()

    def decode_frame(self, latent: Tensor, first: bool, state: list[Any]) -> Tensor:
        """Sum the components of each block; the state is not used."""
        latent = latent.permute(0, 2, 3, 1)[:, None]
        if first:
            return pixels_of(latent / FIRST_FRAME_GAIN @ self.weights["first_components"], 1) + self._centre
        return pixels_of(latent @ self.weights["later_components"], GROUP) + self._centre

    @property
    def _centre(self) -> Tensor:
        return self.weights["centre"].view(3, 1, 1)


class DigitsPcaCodec(PcaCodec):
    """The same codec with the components of the videos of `demo`, for these videos only."""

    shipped_weights = Path(__file__).with_name("pca_digits.safetensors")


def blocks_of(values: Tensor, group: int) -> Tensor:
    """Cut frames (B, F * group, 3, h * 8, w * 8) into blocks (B, F, h, w, group * 3 * 8 * 8)."""
    B, T, _, H, W = values.shape
    F, h, w = T // group, H // BLOCK, W // BLOCK
    values = values.reshape(B, F, group, 3, h, BLOCK, w, BLOCK)
    return values.permute(0, 1, 4, 6, 2, 3, 5, 7).reshape(B, F, h, w, group * 3 * BLOCK * BLOCK)


def pixels_of(blocks: Tensor, group: int) -> Tensor:
    """Return the frames of blocks; the inverse of `blocks_of`."""
    B, F, h, w, _ = blocks.shape
    blocks = blocks.reshape(B, F, h, w, group, 3, BLOCK, BLOCK).permute(0, 1, 4, 5, 2, 6, 3, 7)
    return blocks.reshape(B, F * group, 3, h * BLOCK, w * BLOCK)
