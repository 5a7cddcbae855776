"""The curves of a run, read from TensorBoard's event files in its run folder."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gpdit_lightning.diagnosis.event_files import read_scalars
from gpdit_lightning.errors import InputError
from gpdit_lightning.path_kinds import found_at, reason_and_cure

EVENT_FILES = "events.out.tfevents.*"
EARLIER_EVENTS = "tensorboard"  # folder of the event files in a run folder of earlier versions
MOST_STEPS = 1000  # of a curve at which ranges and means are computed
RECENT = 0.1  # part of the steps before a step, and in ranges after it too, whose points count as values at it


def event_folder(run_dir: Path) -> str:
    """Return the folder of TensorBoard's event files, relative to the run folder.

    It is the run folder, since TensorBoard names a run by the folder of its event files. A run that an earlier version
    began continues in `tensorboard/`.
    """
    return EARLIER_EVENTS if any((run_dir / EARLIER_EVENTS).glob(EVENT_FILES)) else ""


def _step_of(point: tuple[int, float]) -> int:
    return point[0]


@dataclass(frozen=True)
class Curve:
    """The points of a tag, by increasing step.

    Attributes:
        steps: optimizer steps, at least one.
        values: the logged values, as many.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def recent(self, step: int) -> list[float]:
        """Return the finite values of the last tenth of the steps up to a step, at least the last finite one.

        The list is empty if there is none.
        """
        end = bisect_right(self.finite, step, key=_step_of)
        first = bisect_left(self.finite, (1 - RECENT) * step, hi=end, key=_step_of)
        return [value for _, value in self.finite[first:end] or self.finite[:end][-1:]]

    def range_near(self, step: int) -> tuple[float, float] | None:
        """Return the smallest and the largest value near a step; None outside the curve.

        The values are those within a tenth of the step, before and after it, and the interpolated one at the step,
        which makes curves comparable that are logged at other steps.
        """
        points = self.finite
        if not points or not points[0][0] <= step <= points[-1][0]:
            return None
        first = bisect_left(points, (1 - RECENT) * step, key=_step_of)
        values = [value for _, value in points[first : bisect_right(points, (1 + RECENT) * step, key=_step_of)]]
        following = bisect_right(points, step, key=_step_of)
        if following < len(points):
            (left, low), (right, high) = points[following - 1 : following + 1]
            values.append(low + (high - low) * (step - left) / (right - left))
        return min(values), max(values)

    @cached_property
    def finite(self) -> list[tuple[int, float]]:
        """The points whose value is finite."""
        return [point for point in zip(self.steps, self.values, strict=True) if math.isfinite(point[1])]

    @property
    def start(self) -> float | None:
        """The mean of the first two finite values; None if there is none. The first is often of a single step."""
        values = [value for _, value in self.finite[:2]]
        return sum(values) / len(values) if values else None


def thinned(steps: Sequence[int]) -> list[int]:
    """Return at most `MOST_STEPS` of some steps at equal distances, with the last one."""
    distance = max(1, math.ceil(len(steps) / MOST_STEPS))
    return list(steps[::-distance])[::-1]


@dataclass(frozen=True)
class RunCurves:
    """The curves of a run.

    Attributes:
        curves: by tag.
        files: number of event files.
        begun: ISO date of the first point; empty if it has no valid time.
    """

    curves: Mapping[str, Curve]
    files: int
    begun: str

    @property
    def last_step(self) -> int:
        """The last step that was logged."""
        return max(curve.steps[-1] for curve in self.curves.values())


def read_curves(run_dir: Path) -> RunCurves:
    """Read all curves of a run; the run may still be training, and may have been resumed any number of times.

    Points that a resumed run logged again replace the earlier ones, as in TensorBoard.

    Raises:
        InputError: the folder does not exist, has no event files, one is not a regular file, or they have no curves
            yet.
    """
    example = "give a run folder, such as runs/demo/stage3_long_video"
    if not run_dir.is_dir():
        raise InputError(f"{run_dir} is no run folder, {reason_and_cure(run_dir, 'run', example)}.")
    folder = run_dir / event_folder(run_dir)
    files = sorted(folder.glob(EVENT_FILES))
    if not files:
        reason = f", {reason_and_cure(run_dir, 'run', example)}"
        if found_at(run_dir).kind == "run":
            reason = ": give a run folder whose run has trainer.logger at its default or a TensorBoardLogger there"
        raise InputError(f"{run_dir} has no event files of TensorBoard{reason}.")
    scalars = read_scalars(files)
    curves = {}
    for tag, points in scalars.points.items():
        steps = sorted(points)
        curves[tag] = Curve(tuple(steps), tuple(points[step] for step in steps))
    if not curves:
        raise InputError(
            f"the event files in {folder} have no curves yet: wait for the first step of training, which logs the "
            "first points."
        )
    return RunCurves(curves, len(files), scalars.begun)
