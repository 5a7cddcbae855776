"""The curves of a run, read from TensorBoard's event files in its run folder."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path

from gpdit_lightning.errors import InputError

EVENT_FILES = "events.out.tfevents.*"
EARLIER_EVENTS = "tensorboard"  # folder of the event files in a run folder of earlier versions
RECENT = 0.1  # part of the steps before a step, and in ranges after it too, whose points count as values at it


def event_folder(run_dir: Path) -> str:
    """Return the folder of TensorBoard's event files, relative to the run folder.

    It is the run folder, since TensorBoard names a run by the folder of its event files. A run that an earlier version
    began continues in `tensorboard/`.
    """
    return EARLIER_EVENTS if any((run_dir / EARLIER_EVENTS).glob(EVENT_FILES)) else ""


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
        points = [point for point in self.finite if point[0] <= step]
        first = (1 - RECENT) * step
        return [value for at, value in points if at >= first] or [value for _, value in points[-1:]]

    def range_near(self, step: int) -> tuple[float, float] | None:
        """Return the smallest and the largest value near a step; None outside the curve.

        The values are those within a tenth of the step, before and after it, and the interpolated one at the step,
        which makes curves comparable that are logged at other steps.
        """
        points = self.finite
        if not points or not points[0][0] <= step <= points[-1][0]:
            return None
        values = [value for at, value in points if abs(at - step) <= RECENT * step]
        for (left, low), (right, high) in pairwise(points):
            if left < step < right:
                values.append(low + (high - low) * (step - left) / (right - left))
        return min(values), max(values)

    @property
    def finite(self) -> list[tuple[int, float]]:
        """The points whose value is finite."""
        return [point for point in zip(self.steps, self.values, strict=True) if math.isfinite(point[1])]

    @property
    def start(self) -> float | None:
        """The mean of the first two finite values; None if there is none. The first is often of a single step."""
        values = [value for _, value in self.finite[:2]]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class RunCurves:
    """The curves of a run.

    Attributes:
        curves: by tag.
        files: number of event files.
        begun: date of the first event.
    """

    curves: Mapping[str, Curve]
    files: int
    begun: date

    @property
    def last_step(self) -> int:
        """The last step that was logged."""
        return max(curve.steps[-1] for curve in self.curves.values())


def read_curves(run_dir: Path) -> RunCurves:
    """Read all curves of a run; the run may still be training, and may have been resumed any number of times.

    Points that a resumed run logged again replace the earlier ones, as in TensorBoard.

    Raises:
        InputError: the folder does not exist, has no event files, or these have no curves yet.
    """
    from tensorboard.backend.event_processing import event_accumulator  # takes a second to import

    if not run_dir.is_dir():
        raise InputError(f"{run_dir} is not a folder: give a run folder, such as runs/demo/stage3_long_video.")
    folder = run_dir / event_folder(run_dir)
    files = list(folder.glob(EVENT_FILES))
    if not files:
        runs = sorted({path.parent.name for path in run_dir.glob(f"*/{EVENT_FILES}")})
        raise InputError(
            f"{run_dir} has no event files of TensorBoard: "
            + (
                f"give one of the run folders in it, such as {run_dir / runs[0]}."
                if runs
                else "give a run folder whose run has trainer.logger at its default or a TensorBoardLogger there."
            )
        )
    # All points of a curve, and of images and texts, which take memory, the least that can be kept.
    kept = dict.fromkeys(event_accumulator.DEFAULT_SIZE_GUIDANCE, 1) | {event_accumulator.SCALARS: 0}
    events = event_accumulator.EventAccumulator(str(folder), size_guidance=kept)
    log = logging.getLogger("tensorboard")  # warns of each resumed run, whose later points it drops
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        events.Reload()
    finally:
        log.setLevel(level)
    curves = {}
    for tag in events.Tags()["scalars"]:
        points = {event.step: event.value for event in events.Scalars(tag)}
        steps = sorted(points)
        if steps:  # a resumed run purges the points after its checkpoint, which may be all of a tag
            curves[tag] = Curve(tuple(steps), tuple(points[step] for step in steps))
    if not curves:
        raise InputError(
            f"the event files in {folder} have no curves yet: wait for the first step of training, which logs the "
            "first points."
        )
    return RunCurves(curves, len(files), date.fromtimestamp(events.FirstEventTimestamp()))
