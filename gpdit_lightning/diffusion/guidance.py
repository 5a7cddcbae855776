"""Classifier-free guidance: away from what the model would do if it knew less (Ho and Salimans, 2022)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gpdit_lightning.diffusion.noise_levels import NoiseSchedule
from gpdit_lightning.errors import InputError


@dataclass(frozen=True)
class Guidance:
    """How strongly each condition is stressed. GPDiT takes a context scale of 1.2 for H and 2.0 for B (section 5.2).

    The guided velocity is that of the fully conditioned model plus, for each condition, (scale - 1) times what it
    changes given the other; with one condition that is unconditional + scale * (conditional - unconditional).

    Raises:
        InputError: a scale that is not a number, or levels that are no range within [0, 1].
    """

    context: float = 1.0
    """Scale of the frames before; 1 leaves them as they are and costs nothing, other values a further noisy frame,
    which has no context, at each network call."""
    label: float = 1.0
    """Scale of the class label or text, likewise."""
    least_level: float = 0.0
    """Only at noise levels t from here on ..."""
    most_level: float = 1.0
    """... up to here: guidance at the strongest noise costs variety, at the weakest it changes little (Kynkäänniemi et
    al., 2024)."""

    def __post_init__(self) -> None:
        for name in ("context", "label"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(
                    f"the guidance scale of the {name} is {getattr(self, name)}; give a number, 1 for none."
                )
        if not 0 <= self.least_level <= self.most_level <= 1:
            raise InputError(
                f"guidance at noise levels from {self.least_level} to {self.most_level} is no range: give two numbers "
                "from 0 to 1, the lower one first."
            )

    @property
    def everywhere(self) -> bool:
        """Whether all noise levels are guided."""
        return (self.least_level, self.most_level) == (0, 1)

    def at(self, theta: float, schedule: NoiseSchedule) -> bool:
        """Whether the angle `theta` lies within the guided levels."""
        levels = torch.tensor([self.least_level, self.most_level], dtype=torch.float64)
        least, most = schedule.theta(levels).tolist()
        return least - 1e-6 <= theta <= most + 1e-6  # angles come in float32

    def combine(self, conditioned: Tensor, without_label: Tensor | None, without_context: Tensor | None) -> Tensor:
        """The guided velocity (B, ...) of the model's answers; None where a condition is not stressed."""
        guided = conditioned
        if without_label is not None:
            guided = guided + (self.label - 1) * (conditioned - without_label)
        if without_context is not None:
            guided = guided + (self.context - 1) * (conditioned - without_context)
        return guided
