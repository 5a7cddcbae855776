"""Classifier-free guidance over the context and over the label or text (Ho and Salimans, 2022)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gpdit_lightning.devices import check_device
from gpdit_lightning.diffusion.noise_levels import NoiseSchedule
from gpdit_lightning.errors import InputError

MAX_SCALE = 1000  # beyond it, numbers overflow within a few steps


@dataclass(frozen=True)
class Guidance:
    """Guidance scale of each condition. GPDiT uses a context scale of 1.2 for H and 2.0 for B (section 5.2).

    The guided velocity is the conditional velocity plus, for each condition, (scale - 1) times the difference between
    the conditional velocity and the one without that condition. With one condition this is
    unconditional + scale * (conditional - unconditional).

    Raises:
        InputError: a scale is not finite or beyond `MAX_SCALE`, or the levels are not a range within [0, 1].
    """

    context: float = 1.0
    """Scale of the context; 1: no guidance. Any other value adds a noisy block without context to each network call."""
    label: float = 1.0
    """Scale of the class label or text; 1: no guidance. Any other value adds a noisy block without it."""
    least_level: float = 0.0
    """The lowest noise level t at which guidance is applied; it has little effect at low levels (Kynkäänniemi et al.,
    2024)."""
    most_level: float = 1.0
    """The highest noise level t at which guidance is applied; at high levels it reduces diversity (the same paper)."""

    def __post_init__(self) -> None:
        for name in ("context", "label"):
            if not abs(getattr(self, name)) <= MAX_SCALE:
                raise InputError(
                    f"the guidance scale of the {name} is {getattr(self, name)}; give a number from "
                    f"-{MAX_SCALE} to {MAX_SCALE}, 1 for none."
                )
        if not 0 <= self.least_level <= self.most_level <= 1:
            raise InputError(
                f"guidance at noise levels from {self.least_level} to {self.most_level} is not a range: give two "
                "numbers from 0 to 1, the lower one first."
            )

    @property
    def at_all_levels(self) -> bool:
        """Return whether guidance is applied at all noise levels."""
        return (self.least_level, self.most_level) == (0, 1)

    def applies_at(self, theta: float, schedule: NoiseSchedule) -> bool:
        """Return whether guidance is applied at the angle `theta` of a schedule."""
        levels = torch.tensor([self.least_level, self.most_level], dtype=torch.float64, device="cpu")
        lowest, highest = schedule.theta(levels).tolist()
        return lowest - 1e-6 <= theta <= highest + 1e-6  # angles are in float32

    def combine(self, conditioned: Tensor, without_label: Tensor | None, without_context: Tensor | None) -> Tensor:
        """Compute the guided velocity from the model's velocities (B, ...).

        Args:
            conditioned: with all conditions.
            without_label: without the label or text; None without guidance over it.
            without_context: without the context; None without guidance over it.

        Raises:
            InputError: the velocities are on several devices.
        """
        others = {"without_label": without_label, "without_context": without_context}
        check_device(conditioned.device, "conditioned", **others)
        guided = conditioned
        if without_label is not None:
            guided = guided + (self.label - 1) * (conditioned - without_label)
        if without_context is not None:
            guided = guided + (self.context - 1) * (conditioned - without_context)
        return guided
