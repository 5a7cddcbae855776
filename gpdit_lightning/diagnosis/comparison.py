"""The curves of a run beside those of healthy runs: what differs, and where the cause is described."""

import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gpdit_lightning.diagnosis.curves import RunCurves, thinned
from gpdit_lightning.diagnosis.facts import ERROR_RATIO, LOSS, OWN_SETTINGS, TRAINING, Facts
from gpdit_lightning.diagnosis.references import LEVELS, TAGS, Reference, differences

PAGE = "docs/troubleshooting.md"
QUARTILES = tuple(f"train/loss_q{number}" for number in (1, 2, 3, 4))
# A value is outside a range if it is above or below it by more than this part of the limit.
TOLERANCE = 0.1
ROUNDING = 1e-3  # part by which recorded values may be rounded
# Of its start, what is left of a loss that has not fallen, and of one that has.
NOT_FALLEN, FALLEN = 0.95, 0.85
LEAST_STEPS = 50  # before which no loss is expected to have fallen
# The mean square of whitened latents, which an untrained network shows as its loss at strong noise, is about 1.
WHITENED = 0.25, 4.0
RISEN = 1.15  # of the least mean of a loss
PEAK = 2.0  # of the first value of a loss
OVERFITTED = 1.05  # of the least validation loss
MOST_WAITING = 0.1  # of the time of training
GRADIENT_RISEN = 3.0  # of the mean in the middle of the steps so far


class Row(NamedTuple):
    """A curve of the run beside the reference.

    Attributes:
        tag: of the curve.
        step: the last step of the run that the reference has too.
        value: mean of the run over the last tenth of the steps up to it.
        low: least value of the reference there.
        high: largest value of the reference there.
    """

    tag: str
    step: int
    value: float
    low: float
    high: float

    @property
    def range(self) -> str:
        """The range of the reference as text."""
        low, high = f"{self.low:.3g}", f"{self.high:.3g}"
        return low if low == high else f"{low} to {high}"

    @property
    def place(self) -> str:
        """Where the value lies: `within`, `above` or `below` the range, or neither far from it: `near`."""
        if self.low * (1 - ROUNDING) <= self.value <= self.high * (1 + ROUNDING):
            return "within"
        if self.value > self.high:
            return "above" if self.value > self.high * (1 + TOLERANCE) else "near"
        return "below" if self.value < self.low * (1 - TOLERANCE) else "near"


class Finding(NamedTuple):
    """A sign of trouble.

    Attributes:
        sentence: what the curves show, without a period.
        heading: of the section of the page that describes causes and cures, as in an address.
    """

    sentence: str
    heading: str

    def __str__(self) -> str:
        return f"{self.sentence}: see {PAGE}#{self.heading}"


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Attributes:
        reference: healthy runs; None if none fits.
        differences: settings that decide on the levels of curves and differ, with both values; without them, levels
            can be compared.
        training: settings that decide how fast curves fall and differ, with both values.
        own: settings that only one curve depends on and that differ, with both values, by its tag; without them, its
            levels can be compared.
        judged_from: the step from which values are judged.
        rows: curves beside the reference. If levels cannot be compared, values are relative to the start of each run,
            and the reference is taken at the same part of its training.
        findings: signs of trouble.
    """

    reference: Reference | None
    differences: dict[str, tuple[Any, Any]]
    training: dict[str, tuple[Any, Any]]
    own: dict[str, dict[str, tuple[Any, Any]]]
    judged_from: int
    rows: Sequence[Row]
    findings: Sequence[Finding]

    @property
    def has_levels(self) -> bool:
        """Whether levels can be compared."""
        return self.reference is not None and not self.differences


def compare(run: RunCurves, facts: Facts, reference: Reference | None) -> Comparison:
    """Compare the curves of a run with those of a reference, and check what needs none."""
    other, training, *of_curves = (
        {} if reference is None else differences(facts, reference.facts, groups)
        for groups in (LEVELS, (TRAINING,), *((group,) for group in OWN_SETTINGS.values()))
    )
    own = {tag: found for tag, found in zip(OWN_SETTINGS, of_curves, strict=True) if found}
    rows, findings, judged_from = list[Row](), list(counted_events(run)), first_step(facts)
    if reference is not None and not other:
        rows = list(level_rows(run, facts, reference))
        judged = rows if run.last_step >= judged_from else []
        findings += [finding for row in judged if (finding := level_finding(row, run)) is not None]
    elif reference is not None:
        rows = list(shape_rows(run, facts, reference))
        findings += [
            Finding(
                f"{row.tag} is {row.value:.2f} of its start at step {row.step}; the reference is {row.range} of its "
                "start at that part of its training",
                "loss-plateaus-at-1",
            )
            for row in rows
            if row.value > NOT_FALLEN and row.high < FALLEN and row.step >= judged_from
        ]
    findings += checks(run, facts, {row.tag for row in rows})
    return Comparison(reference, other, training, own, judged_from, rows, findings)


def mean(values: Sequence[float]) -> float:
    """Return the mean of values; NaN if there are none."""
    return sum(values) / len(values) if values else math.nan


def first_step(facts: Facts) -> int:
    """Return the step from which values are judged: after the warm-up of the learning rate."""
    return int(max(LEAST_STEPS, 2 * (facts[TRAINING].get("optimizer.warmup_steps") or 0)))


def level_rows(run: RunCurves, facts: Facts, reference: Reference) -> Iterator[Row]:
    """Yield a row for each curve that both have, and whose levels can be compared."""
    for tag, groups in TAGS.items():
        curves = reference.curves(tag)
        if tag not in run.curves or not curves or differences(facts, reference.facts, groups):
            continue
        step = min(run.curves[tag].steps[-1], max(curve.steps[-1] for curve in curves))
        band, values = reference.band(tag, step), run.curves[tag].recent(step)
        if band is not None and values:
            yield Row(tag, step, mean(values), *band)


def level_finding(row: Row, run: RunCurves) -> Finding | None:
    """Return what a row shows, if its value is outside the range; None otherwise, or if it is no sign of trouble."""
    start = run.curves[row.tag].start
    has_fallen = start is None or row.value < NOT_FALLEN * start
    headings = {
        ("train/grad_norm", "above"): "large-gradients",
        ("train/ema_distance", "above"): "averaged-weights-lag-behind",
        (ERROR_RATIO, "above"): "error-ratio-of-previews-above-1",
        ("scores_vs_decoded/fvd", "above"): "error-ratio-of-previews-above-1",
    }
    if "loss" in row.tag:
        headings[row.tag, "above"] = "losses-above-the-reference" if has_fallen else "loss-plateaus-at-1"
        headings[row.tag, "below"] = "losses-below-the-reference"
    heading = headings.get((row.tag, row.place))
    sentence = f"{row.tag} is {row.value:.3g} at step {row.step}; the reference is {row.range}"
    return Finding(sentence, heading) if heading else None


def shape_rows(run: RunCurves, facts: Facts, reference: Reference) -> Iterator[Row]:
    """Yield a row for each loss by noise level, with values relative to the start of each run.

    The reference is taken at the same part of its training, which is shorter than that of a larger model, and at no
    later step than that of the run.
    """
    lengths = facts[TRAINING]["trainer.max_steps"], reference.facts[TRAINING]["trainer.max_steps"]
    scale = lengths[1] / lengths[0] if min(lengths) > 0 else 1.0
    for tag in QUARTILES:
        curve, others = run.curves.get(tag), reference.curves(tag)
        if curve is None or not curve.start or not others:
            continue
        step = min(round(curve.steps[-1] * min(scale, 1)), *(other.steps[-1] for other in others))
        start = mean([other.start for other in others if other.start])
        band, values = reference.band(tag, step), curve.recent(curve.steps[-1])
        if band is not None and values:
            yield Row(tag, curve.steps[-1], mean(values) / curve.start, band[0] / start, band[1] / start)


def counted_events(run: RunCurves) -> Iterator[Finding]:
    """Yield the events that the run itself has counted, and values that are not finite."""
    for name, heading, what in (
        ("skipped_steps", "nan", "steps were skipped, since their loss or gradient was not finite"),
        ("spikes", "large-gradients", "steps had a spike of the gradient"),
        ("damaged_samples", "damaged-samples", "training samples could not be read and were replaced"),
    ):
        curve = run.curves.get(f"warnings/{name}")
        if curve is not None and curve.finite and curve.finite[-1][1] > 0:
            yield Finding(f"{curve.finite[-1][1]:.0f} {what} (warnings/{name})", heading)
    for tag, curve in run.curves.items():
        if len(curve.finite) < len(curve.steps):
            step = next(s for s, value in zip(curve.steps, curve.values, strict=True) if not math.isfinite(value))
            yield Finding(f"{tag} is not finite at step {step}", "nan")


def checks(run: RunCurves, facts: Facts, compared: Container[str]) -> Iterator[Finding]:
    """Yield the signs of trouble that need no reference.

    Args:
        run: the curves.
        facts: the settings that they depend on.
        compared: tags whose levels are compared with a reference.
    """
    yield from whitening_findings(run, facts)
    yield from loss_findings(run)
    norms = run.curves.get("train/grad_norm")
    if norms is not None and norms.finite:
        last, clip = mean(norms.recent(norms.steps[-1])), facts[TRAINING].get("trainer.gradient_clip_val")
        middle = mean(norms.recent(norms.steps[-1] // 2))
        if last > GRADIENT_RISEN * middle and norms.steps[-1] >= 2 * LEAST_STEPS:
            yield Finding(
                f"train/grad_norm rises: {last:.3g} at step {norms.steps[-1]}, and {middle:.3g} at half of the steps",
                "large-gradients",
            )
        if clip and last > clip and run.last_step >= first_step(facts):
            yield Finding(
                f"train/grad_norm is {last:.3g} at step {norms.steps[-1]}, above trainer.gradient_clip_val "
                f"({clip:g}), so most steps are clipped",
                "large-gradients",
            )
    waits = run.curves.get("system/data_wait")
    if waits is not None and (waiting := mean(waits.recent(waits.steps[-1]))) > MOST_WAITING:
        yield Finding(f"training waits for data {waiting:.0%} of the time (system/data_wait)", "slow-data")
    ratios = run.curves.get(ERROR_RATIO)
    known = ratios is None or ERROR_RATIO in compared
    if ratios is not None and not known and len(ratios.finite) > 1 and (last := ratios.finite[-1][1]) > 1:
        yield Finding(
            f"{ERROR_RATIO} is {last:.3g} at step {ratios.steps[-1]}, so continuations are no better than "
            "repeating the last frame, which is normal at first",
            "error-ratio-of-previews-above-1",
        )


def whitening_findings(run: RunCurves, facts: Facts) -> Iterator[Finding]:
    """Yield the mean square of the latents, as the loss of an untrained network shows it, if it is far from 1.

    A network that predicts the velocity 0 has the loss cos² theta + sin² theta m at the angle theta, where m is the
    mean square. At strong noise it is about m.
    """
    first = run.curves.get("train/loss_q4")
    untrained = facts[TRAINING]["initial_weights"] == "random" and facts[LOSS]["backbone.target"] == "velocity"
    if first is None or not first.finite or first.steps[0] > 1 or not untrained:
        return
    square = first.finite[0][1]
    if not WHITENED[0] <= square <= WHITENED[1]:
        yield Finding(
            f"train/loss_q4 is {square:.3g} at step 1, about the mean square of the latents, which should be near 1",
            "wrong-latent-statistics",
        )


def loss_findings(run: RunCurves) -> Iterator[Finding]:
    """Yield a training loss that rises or had risen, and a validation loss that rises while the training loss falls."""
    losses, validation = run.curves.get("loss/train"), run.curves.get("loss/val")
    if losses is None or not losses.finite:
        return
    steps = thinned([step for step, _ in losses.finite if step >= LEAST_STEPS])
    means = [(step, mean(losses.recent(step))) for step in steps]
    if means and means[-1][1] > RISEN * (least := min(value for _, value in means)):
        yield Finding(
            f"loss/train rises: it is {means[-1][1]:.3g} at step {means[-1][0]}, and was {least:.3g} before",
            "large-gradients",
        )
    peak_step, peak = max(losses.finite, key=lambda point: point[1])
    if peak > PEAK * (first := losses.finite[0][1]):
        yield Finding(
            f"loss/train rose to {peak:.3g} at step {peak_step}, and began at {first:.3g}",
            "large-gradients",
        )
    if validation is None or len(validation.finite) < 2:
        return
    step, least = min(validation.finite, key=lambda point: point[1])
    last_step, last = validation.finite[-1]
    trained = [mean(losses.recent(at)) for at in (step, last_step)]
    if last > OVERFITTED * least and trained[1] < trained[0]:
        yield Finding(
            f"loss/val rises while loss/train falls: it is {last:.3g} at step {last_step}, and was {least:.3g} at step "
            f"{step}",
            "overfitting",
        )
