"""Mixup and CutMix of latents: each clip is mixed with another one of its micro-batch.

Shapes: B clips, F latent frames, C channels, H x W latent pixels.
"""

import math
from typing import NamedTuple, Self

import numpy as np
from torch import Tensor


class Mixing(NamedTuple):
    """How the clips of a micro-batch are mixed: all in the same way, each with the clip at its place from the end.

    It is drawn once for a micro-batch, as in timm's mode `batch`, which MAE's fine-tuning uses. The numbers are on the
    host, so that the device is not waited for.

    Attributes:
        share: the share of the clip itself, also in its label.
        box: (top, bottom, left, right) in latent pixels, which CutMix replaces in all frames; None for mixup.
    """

    share: float
    box: tuple[int, int, int, int] | None = None

    @classmethod
    def draw(cls, numbers: np.random.Generator, mixup: float, cutmix: float, height: int, width: int) -> Self | None:
        """Draw the mixing of a micro-batch; None if both are off.

        Args:
            numbers: the random numbers.
            mixup: parameter of the Beta distribution of the share in mixup (arXiv:1710.09412); 0: no mixup.
            cutmix: the same for CutMix (arXiv:1905.04899). If both are above 0, each has half of the micro-batches.
            height, width: H and W.
        """
        if not (mixup or cutmix):
            return None
        cuts = cutmix > 0 and (mixup == 0 or numbers.random() < 0.5)
        parameter = cutmix if cuts else mixup
        share = float(numbers.beta(parameter, parameter))
        if not cuts:
            return cls(share)
        ratio = math.sqrt(1 - share)
        box: list[int] = []
        for length in (height, width):
            centre, cut = int(numbers.integers(length)), int(length * ratio)
            box += [max(0, centre - cut // 2), min(length, centre + cut // 2)]
        top, bottom, left, right = box
        return cls(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))

    def mixed(self, latents: Tensor) -> Tensor:
        """Return the mixed clips (B, F, C, H, W)."""
        others = latents.flip(0)
        if self.box is None:
            return self.share * latents + (1 - self.share) * others
        top, bottom, left, right = self.box
        latents = latents.clone()
        latents[..., top:bottom, left:right] = others[..., top:bottom, left:right]
        return latents
