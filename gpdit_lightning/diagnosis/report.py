"""The text and the figure of a comparison."""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpdit_lightning.diagnosis.comparison import PAGE, QUARTILES, TOLERANCE, Comparison
from gpdit_lightning.diagnosis.curves import RECENT, RunCurves, thinned
from gpdit_lightning.diagnosis.facts import ERROR_RATIO
from gpdit_lightning.diagnosis.references import Reference
from gpdit_lightning.files import atomic_write
from gpdit_lightning.names import counted, figure_text, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_DIFFERENCES = 6
MOST_AHEAD = 2  # times the steps of the run, up to which the reference is drawn
SHORT = reprlib.Repr()
SHORT.maxlist, SHORT.maxstring = 4, 60
BAND, RUN, VALIDATION = "#9aa5b1", "#3b7dd8", "#e4743c"
LOGARITHMIC = ("train/grad_norm", "scores_vs_decoded/fvd")
# Panels: the title, the curve with a band, and a second curve of the run.
PANELS = (
    *((f"{tag}, val/loss_q{tag[-1]}", tag, f"val/loss_q{tag[-1]}") for tag in QUARTILES),
    ("loss/val", "loss/val", ""),
    ("train/grad_norm", "train/grad_norm", ""),
    (ERROR_RATIO, ERROR_RATIO, ""),
    ("scores_vs_decoded/fvd", "scores_vs_decoded/fvd", ""),
)


def setting_texts(found: Mapping[str, tuple[Any, Any]]) -> str:
    """Return settings that differ as text: at most a few."""
    texts = [
        f"{name} is {SHORT.repr(own)} (reference: {SHORT.repr(other)})"
        for name, (own, other) in found.items()
        if own is not None
    ]
    texts += ["the data are not found on this machine"] * (len(texts) < len(found))
    more = len(texts) - MOST_DIFFERENCES
    return "; ".join(texts[:MOST_DIFFERENCES]) + (f"; and {counted(more, 'other')}" if more > 0 else "")


def report(name: str, run: RunCurves, comparison: Comparison) -> str:
    """Return what a comparison shows: circumstances, table and findings.

    Args:
        name: of the run.
        run: its curves.
        comparison: with the reference.
    """
    reference = comparison.reference
    lines = [f"run: {name}, step {run.last_step}, {counted(run.files, 'event file')}"]
    if reference is None:
        lines.append("reference: none that ships fits this run; give one of your own runs with --reference RUN_DIR.")
    else:
        lines.append(f"reference: {reference.name}: {reference.title} ({reference.circumstances()})")
        lines += comparability(comparison)
        if run.last_step < comparison.judged_from:
            lines.append(f"Values are not judged before step {comparison.judged_from}, when the warm-up is over.")
    if comparison.rows:
        lines += ["", table(comparison)]
    lines += ["", "findings:"]
    lines += [f"- {finding}" for finding in comparison.findings]
    if not comparison.findings:
        lines.append(f"- none. Faults that curves do not show, such as flicker or grey frames: {PAGE}")
    return "\n".join(map(printable, "\n".join(lines).split("\n")))  # a reference is a file of others


def comparability(comparison: Comparison) -> list[str]:
    """Return whether levels can be compared, and why not."""
    lines = []
    if comparison.has_levels:
        lines.append("The settings that determine the levels of curves are equal: levels can be compared.")
        if comparison.training:
            lines.append(f"Settings that determine how fast curves fall differ: {setting_texts(comparison.training)}.")
        for tag, settings in comparison.own.items():
            lines.append(f"{tag} cannot be compared: {setting_texts(settings)}.")
    else:
        lines += [
            f"Levels cannot be compared: {setting_texts(comparison.differences)}.",
            "What healthy runs have in common: the loss at each noise level falls below its start, the gradient norm "
            "does not rise, the validation loss falls with the training loss, and the error ratio of previews falls.",
        ]
    return lines


def table(comparison: Comparison) -> str:
    """Return the rows of a comparison as a Markdown table."""
    columns = ("run", "reference") if comparison.has_levels else ("run, of its start", "reference, of its start")
    lines = [f"| curve | step | {' | '.join(columns)} | |", f"|{'---|' * 5}"]
    for row in comparison.rows:
        place = {"near": f"less than {TOLERANCE:.0%} away"}.get(row.place, row.place)
        lines.append(
            f"| {row.tag} | {row.step} | {row.value:.3g} | {row.range} | {place if comparison.has_levels else ''} |"
        )
    note = f"Values are means over the last {RECENT:.0%} of the steps, ranges those of all points near the step."
    return "\n".join([*lines, "", note])


def draw(name: str, run: RunCurves, comparison: Comparison, path: Path) -> None:
    """Draw the curves of a run over the range of the reference.

    Args:
        name: of the run.
        run: its curves.
        comparison: with the reference.
        path: of the PNG.
    """
    from matplotlib.figure import Figure  # takes half a second to import

    reference = comparison.reference
    panels = [panel for panel in PANELS if panel[1] in run.curves or (reference and reference.curves(panel[1]))]
    rows = 1 if len(panels) <= 4 else 2
    columns = max(1, -(-len(panels) // rows))
    figure = Figure(figsize=(4 * columns, 0.8 + 3.2 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for place, (title, tag, second) in zip(axes, panels, strict=False):
        draw_panel(place, run, reference, tag, second)
        place.set_xlim(0, min(place.get_xlim()[1], MOST_AHEAD * run.last_step))
        place.set_title(title if second in run.curves or not second else tag, fontsize=9)
    for place in axes[len(panels) :]:
        place.set_axis_off()
    labelled = [place.get_legend_handles_labels() for place in figure.axes]
    handles = {label: line for lines, labels in labelled for line, label in zip(lines, labels, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    levels = "" if comparison.has_levels else "; levels cannot be compared" if reference else ""
    title = f"{name}, beside {reference.name}{levels}" if reference else name
    figure.suptitle(figure_text(title), fontsize=10)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def draw_panel(axes: "Axes", run: RunCurves, reference: Reference | None, tag: str, second: str) -> None:
    """Draw one curve of the run over the range of the reference."""
    if reference is not None and (curves := reference.curves(tag)):
        steps = thinned(sorted({step for curve in curves for step in curve.steps}))
        bands = [(step, band) for step in steps if (band := reference.band(tag, step)) is not None]
        low, high = zip(*(band for _, band in bands), strict=True)
        axes.fill_between([step for step, _ in bands], low, high, color=BAND, alpha=0.5, label="reference")
    for name, colour, style, label in ((tag, RUN, "-", "run"), (second, VALIDATION, "o-", "run, validation")):
        if name in run.curves:
            curve = run.curves[name]
            axes.plot(curve.steps, curve.values, style, color=colour, linewidth=1.2, markersize=3, label=label)
    if tag == ERROR_RATIO:
        axes.axhline(1, color="grey", linestyle="--", linewidth=0.8)
    if tag in LOGARITHMIC:
        axes.set_yscale("log")
    axes.set_xlabel("optimizer step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
