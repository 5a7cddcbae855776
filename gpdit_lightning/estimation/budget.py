"""The costs of a training run within a budget."""

from dataclasses import dataclass
from typing import Self

from gpdit_lightning.estimation.memory import parameter_count
from gpdit_lightning.estimation.requirements import RunSettings, memory, step_flops


@dataclass(frozen=True)
class RunCosts:
    """What a run costs, by the estimates of the library."""

    parameters: int
    """Parameters of the model."""
    steps: int
    """Optimizer steps."""
    step_flops: float
    """FLOPs of an optimizer step, over all devices."""
    memory: int
    """Bytes of training on each device."""

    @classmethod
    def of_steps(cls, run: RunSettings, steps: int) -> Self:
        """Return the costs of a number of optimizer steps."""
        return cls(parameter_count(run.backbone), steps, float(sum(step_flops(run).values())), memory(run)["total"])

    @classmethod
    def within_flops(cls, run: RunSettings, flops: float) -> Self:
        """Return the costs of as many optimizer steps as a number of FLOPs allows, rounded, but at least one."""
        return cls.of_steps(run, max(1, round(flops / sum(step_flops(run).values()))))

    @property
    def flops(self) -> float:
        """The FLOPs of all steps."""
        return self.steps * self.step_flops
