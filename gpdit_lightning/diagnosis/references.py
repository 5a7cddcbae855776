"""Curves of healthy runs: records that ship with the package, files of other records, and run folders."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpdit_lightning.diagnosis import facts as run_facts
from gpdit_lightning.diagnosis.curves import Curve, RunCurves
from gpdit_lightning.diagnosis.facts import DATA, LOSS, OWN_SETTINGS, SIZE, STAGE, TRAINING, Facts
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write
from gpdit_lightning.regular_files import read_bounded
from gpdit_lightning.schema import COUNT, NUMBER, OBJECT, TEXT, check, parse_json

FOLDER = Path(__file__).parent / "references"
MAX_BYTES = 2**24  # of a file
DIGITS = 4  # significant ones of a recorded value
FORMAT = 1
# Tags that are recorded and compared, with the groups of settings that must be equal for their levels to be comparable.
LEVELS = (STAGE, SIZE, LOSS, DATA)
TAGS: dict[str, tuple[str, ...]] = {
    **{f"train/loss_q{number}": LEVELS for number in (1, 2, 3, 4)},
    "loss/train": LEVELS,
    "train/grad_norm": LEVELS,
    "train/ema_distance": LEVELS,
    **{tag: (*LEVELS, group) for tag, group in OWN_SETTINGS.items()},
}
SCHEMA = {
    "format": COUNT,
    "title": TEXT,
    "facts": run_facts.SCHEMA,
    "runs": [{"seed": COUNT, "commit": TEXT, "date": TEXT, "hardware": TEXT, "curves": OBJECT}],
}
CURVE = {"steps": [COUNT], "values": [NUMBER]}
CURE = "write it again with `python -m benchmarks.healthy_runs`"


@dataclass(frozen=True)
class HealthyRun:
    """The curves of one run of a reference.

    Attributes:
        seed: of the run.
        commit: of the package; empty if it is not known.
        date: ISO date of its first event; empty if it is not known.
        hardware: in words; empty if it is not known.
        curves: by tag.
    """

    seed: int
    commit: str
    date: str
    hardware: str
    curves: Mapping[str, Curve]


@dataclass(frozen=True)
class Reference:
    """Healthy runs of one recipe on the same data.

    Attributes:
        name: of the file without its suffix, or the run folders.
        title: recipe and data in one line.
        facts: the settings that the curves depend on.
        runs: at least one; they differ in their seeds.
    """

    name: str
    title: str
    facts: Facts
    runs: Sequence[HealthyRun]

    @property
    def last_step(self) -> int:
        """The last step that all runs have."""
        return min(max(curve.steps[-1] for curve in run.curves.values()) for run in self.runs)

    def curves(self, tag: str) -> list[Curve]:
        """Return the curve of each run that has it."""
        return [run.curves[tag] for run in self.runs if tag in run.curves]

    def band(self, tag: str, step: int) -> tuple[float, float] | None:
        """Return the range at a step, over runs and over the points near it; None if no run has the step.

        The points of a single run show the noise of a curve, those of several runs the differences between seeds too.
        """
        ranges = [found for curve in self.curves(tag) if (found := curve.range_near(step))]
        return (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None

    def circumstances(self) -> str:
        """Return the number of runs, their seeds, dates, commits and hardware in one line."""
        seeds = ", ".join(str(run.seed) for run in self.runs)
        commits = (f"commit {run.commit}" if run.commit else "" for run in self.runs)
        columns = ([run.hardware for run in self.runs], [run.date for run in self.runs], commits)
        rest = filter(None, (", ".join(dict.fromkeys(filter(None, values))) for values in columns))
        return f"{'seed' if len(self.runs) == 1 else 'seeds'} {seeds}; {'; '.join(rest)}"


def rounded(value: float) -> float:
    """Return a value with few digits, for a file."""
    return float(f"{value:.{DIGITS}g}")


def recorded(run: RunCurves) -> dict[str, Curve]:
    """Return those curves of a run that a reference has, without values that are not finite."""
    found = {tag: run.curves[tag].finite for tag in TAGS if tag in run.curves}
    return {
        tag: Curve(*zip(*((step, rounded(value)) for step, value in points), strict=True))
        for tag, points in found.items()
        if points
    }


def write_reference(reference: Reference, path: Path) -> None:
    """Write a reference as JSON, a line for each curve."""
    runs = []
    for run in reference.runs:
        curves = ",\n    ".join(
            f"{json.dumps(tag)}: {json.dumps({'steps': curve.steps, 'values': curve.values})}"
            for tag, curve in run.curves.items()
        )
        head = {name: getattr(run, name) for name in ("seed", "commit", "date", "hardware")}
        runs.append(f'  {json.dumps(head)[:-1]}, "curves": {{\n    {curves}}}}}')
    head = {"format": FORMAT, "title": reference.title, "facts": reference.facts}
    text = f'{json.dumps(head)[:-1]}, "runs": [\n' + ",\n".join(runs) + "]}\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_reference(path: Path) -> Reference:
    """Read a file of :func:`write_reference`.

    Raises:
        InputError: the file cannot be read, or has another content.
    """
    try:
        content = parse_json(read_bounded(path, MAX_BYTES), str(path), CURE)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {CURE}.") from None
    check(content, SCHEMA, "", str(path), CURE)
    if content["format"] != FORMAT:
        raise InputError(f"{path} has the format {content['format']} instead of {FORMAT}: {CURE}.")
    runs = []
    for number, run in enumerate(content["runs"]):
        curves = {}
        for tag, curve in run["curves"].items():
            name = f"runs[{number}].curves[{tag!r}]"
            check(curve, CURVE, name, str(path), CURE)
            steps = curve["steps"]
            if len(steps) != len(curve["values"]) or steps != sorted(set(steps)):
                raise InputError(f"{path} has a curve {name} without one value for each of increasing steps: {CURE}.")
            curves[tag] = Curve(tuple(steps), tuple(map(float, curve["values"])))
        if not curves:
            raise InputError(f"{path} has no curves of runs[{number}]: {CURE}.")
        runs.append(HealthyRun(run["seed"], run["commit"], run["date"], run["hardware"], curves))
    return Reference(path.stem, content["title"], content["facts"], runs)


def shipped_names() -> list[str]:
    """Return the names of the references that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def shipped_reference(name: str) -> Reference:
    """Return a reference that ships with the package.

    Raises:
        InputError: none has this name.
    """
    names = shipped_names()
    if name not in names:
        raise InputError(
            f"--reference is {name}, which is no folder or file and names no reference that ships: give one of "
            f"{', '.join(names)}, a run folder, or a file of `python -m benchmarks.healthy_runs`."
        )
    return read_reference(FOLDER / f"{name}.json")


def fitting_reference(facts: Facts) -> Reference | None:
    """Return the shipped reference whose settings are closest to those of a run.

    It has the same sources, target and blocks; None if there is no such reference. Of several, the data decide first,
    then the size, the stage, the loss and the training.
    """
    same = {
        STAGE: ("sources",),
        LOSS: ("backbone.target", "backbone.block_shape", "backbone.first_block_frames"),
    }
    candidates = [
        reference
        for reference in map(shipped_reference, shipped_names())
        if all(reference.facts[group].get(name) == facts[group].get(name) for group in same for name in same[group])
    ]

    def closeness(reference: Reference) -> list[int]:
        data, size, loss, training = (
            -len(differences(facts, reference.facts, [group])) for group in (DATA, SIZE, LOSS, TRAINING)
        )
        return [data, size, facts[STAGE] == reference.facts[STAGE], loss, training]

    return max(candidates, key=closeness, default=None)


def differences(facts: Facts, others: Facts, groups: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """Return the settings of some groups that differ, with both values, by name.

    The class of a stage is none of them, since its sources and its loss have their own settings. Nor are settings for
    training that only one of the two has, which are of another version of the package.
    """
    found = {}
    for group in groups:
        names = dict.fromkeys([*others[group], *facts[group]])
        for name in names:
            values = facts[group].get(name), others[group].get(name)
            unknown = group != DATA and None in values
            if values[0] != values[1] and not unknown and (group != STAGE or name == "sources"):
                found[name] = values
    return found
