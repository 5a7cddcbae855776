"""Options of `ablate`."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from gpdit_lightning.errors import InputError
from gpdit_lightning.names import MAX_NAME_BYTES
from gpdit_lightning.options.shared import MAX_SEED, RecipeOptions, check_at_least

Budget = Literal["steps", "flops", "time"]

# Files in the folder of an ablation, beside the folders of its arms.
FILES = ("lock", "ablation.json", "ablation.md", "curves.png", "failures.json", "results.csv", "results.json")


def _as_name(value: Any) -> str:
    """Return the name of an arm as text: a number of YAML as it is written in JSON."""
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True, kw_only=True)
class AblateOptions(RecipeOptions):
    """Ablation.

    The recipes are the base of all arms. A recipe file may contain these options too, as those that ship in
    recipes/ablations do.
    """

    EXAMPLE: ClassVar[str] = "gpdit:ablations/time_conditioning"

    arms: Mapping[str, Mapping[str, Any]]
    """What is compared: the overrides of the base recipe, by name of the arm, such as {of2: {}, of:
    {model.init_args.backbone.attention: of}}. The first arm is the one that the others are compared with."""
    seeds: Sequence[int] = (0, 1, 2)
    """Seeds of the runs of each arm: of the initial weights, the order of the data, the noise and the noise levels."""
    budget: Budget = "steps"
    """What is equal for all arms: optimizer steps, training FLOPs, or seconds of training on this machine (CPU seconds
    on a CPU), which a short trial measures. The amount is that of the base recipe for its trainer.max_steps."""
    validations: int = 10
    """Validations during each run, at equal distances; the last one is at its end."""
    out: Path
    """Folder of all runs and results; the same command resumes."""
    dry_run: bool = False
    """Print the arms with their steps, FLOPs, parameters and estimated time, and train nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, validations=1)
        self._set("seeds", tuple(self.seeds))
        unusable = not self.seeds or len(set(self.seeds)) < len(self.seeds)
        if unusable or min(self.seeds) < 0 or max(self.seeds) > MAX_SEED:
            raise InputError(
                f"--seeds are {list(self.seeds)}: give different numbers from 0 to {MAX_SEED}, such as 0 1 2."
            )
        if not self.arms:
            raise InputError("--arms is empty: give the overrides of each arm by its name.")
        # The names of a command line may be numbers of YAML.
        self._set("arms", {_as_name(name): overrides for name, overrides in self.arms.items()})
        for name, overrides in self.arms.items():
            if not name or not all(c.isalnum() or c in " _.+=-" for c in name) or name[0] in " .":
                raise InputError(
                    f"the arm {name!r} cannot name a folder: give it a name of letters, digits, spaces and _ . + = -."
                )
            if name in FILES:
                raise InputError(f"the arm {name!r} has the name of a file of the ablation: give it another name.")
            if len(os.fsencode(name)) > MAX_NAME_BYTES:
                raise InputError(f"the arm {name!r} has a name of more than {MAX_NAME_BYTES} bytes: shorten it.")
            if not isinstance(overrides, Mapping):
                raise InputError(
                    f"the overrides of the arm {name!r} are {overrides!r}: give names with values, or {{}}."
                )

    @property
    def command_line(self) -> list[str]:
        """The words of the command after `ablate`."""
        own = {"arms": self.arms, "seeds": list(self.seeds), "budget": self.budget, "validations": self.validations}
        words = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in own.items()]
        return [*words, f"--out={self.out}", *self.fit_arguments]
